"""What the kinds of SAE promise: inference, calibration, folding, layout, counters."""

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from synthetic import BATCH_KINDS, DENSE_KINDS, KINDS, SIZES, closed_form, normal, random_sae, spec
from torch import Tensor

from sae_core.formats.checkpoint import load_sae, save_sae
from sae_core.sae import sparse_ops
from sae_core.sae.config import TAGS, SAEConfig, SAEType
from sae_core.sae.kinds import KINDS as REGISTRY
from sae_core.sae.kinds import build, jumprelu
from sae_core.sae.reconstruction import Compute, Reconstruction
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.errors import SAEError
from sae_core.utils.seeding import generator

EXACT = {"rtol": 1e-12, "atol": 1e-12}
any_kind = pytest.mark.parametrize("kind", KINDS)


def test_registry() -> None:
    assert set(REGISTRY) == set(get_args(SAEType)) == set(TAGS) == set(KINDS)
    for kind, cls in REGISTRY.items():
        assert type(build(spec(kind))) is cls
    with pytest.raises(SAEError, match="'magic' is not one of batch_topk, gated, jumprelu, "):
        build(spec("magic"))


def test_tags_are_unambiguous() -> None:
    tags = {SAEConfig(sae_type=kind, topk=k).tag for kind in KINDS for k in (1, 32)}
    assert len(tags) == 2 * len(KINDS) - 2  # two kinds have no k


@pytest.mark.parametrize(("top_k", "kind"), [(3, "batch_topk"), (0, "standard")])
def test_kind_of_an_old_configuration_follows_from_top_k(top_k: int, kind: str) -> None:
    assert type(build(spec("", top_k=top_k))) is REGISTRY[kind]


# Inference


@any_kind
def test_encode_in_closed_form(kind: str) -> None:
    sae, x = random_sae(kind), normal(5, 7, 6)
    features = closed_form(sae, x)
    assert 0.1 < (features > 0).double().mean() < 0.6
    torch.testing.assert_close(sae.encode(x), features, **EXACT)
    x_hat = torch.einsum("blf,fd->bld", features, sae.W_dec) + sae.b_dec
    torch.testing.assert_close(sae(x), x_hat, **EXACT)
    torch.testing.assert_close(sae.decode(features), x_hat, **EXACT)


def test_threshold_below_0_activates_nothing_negative() -> None:
    sae = random_sae()
    sae.threshold.fill_(-1.0)
    assert (sae.encode(normal(50, 6)) >= 0).all()


@any_kind
def test_inference_sees_one_token_at_a_time(kind: str) -> None:
    sae, x = random_sae(kind), normal(50, 6)
    alone = torch.cat([sae.encode(token[None]) for token in x])
    torch.testing.assert_close(sae.encode(x), alone, **EXACT)
    louder = torch.cat([x[:1], 100 * x[1:]])
    torch.testing.assert_close(sae.encode(louder)[0], alone[0], **EXACT)
    in_training = sae.reconstruct(x).x_hat[0] - sae.reconstruct(louder).x_hat[0]
    assert (in_training.abs().max() > 0.1) == (kind in BATCH_KINDS)  # where the batch matters


@any_kind
@pytest.mark.parametrize("row_block", [None, 1, 7])
def test_reconstruction_at_inference(kind: str, row_block: int | None) -> None:
    """What validation measures is what `encode` and `decode` give."""
    sae, x = random_sae(kind), normal(50, 6)
    code, made = sae.encode(x), sae.reconstruct_at_inference(x, compute=Compute(row_block))
    torch.testing.assert_close(made.x_hat, sae.decode(code).detach(), **EXACT)
    assert not made.x_hat.requires_grad
    assert made.l0 == pytest.approx(float((code > 0).sum(1).double().mean()))
    assert torch.equal(made.fired, (code > 0).any(0))
    penalised = torch.relu(sae.pre_activations(x)) if kind == "gated" else code
    torch.testing.assert_close(made.l1, penalised.sum(1).mean().detach(), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*BATCH_KINDS, "jumprelu"])
@pytest.mark.parametrize("seed", range(8))
def test_calibrated_l0_is_exactly_k(seed: int, kind: str, dtype: torch.dtype) -> None:
    sae = random_sae(kind, seed=seed, dtype=dtype)
    batches = [normal(40, 6, seed=100 * seed + i, dtype=dtype) for i in range(4)]
    if kind in BATCH_KINDS:
        sae.threshold.fill_(100.0)  # whatever stood there before
    sae.calibrate(iter(batches))
    assert int((sae.encode(torch.cat(batches)) > 0).sum()) == 160 * sae.spec.top_k


def test_calibration_keeps_every_positive_feature_when_there_are_too_few() -> None:
    sae, x = random_sae(top_k=15), normal(40, 6)
    sae.calibrate([x])
    assert sae.threshold == 0
    positive = (sae.pre_activations(x) > 0).sum()
    assert (sae.encode(x) > 0).sum() == positive < 40 * 15


def test_calibration_of_jumprelu_shifts_all_thresholds_alike() -> None:
    sae = random_sae("jumprelu")
    before = sae.threshold.detach().clone()
    sae.calibrate([normal(40, 6)])
    shift = sae.threshold.detach() - before
    torch.testing.assert_close(shift, shift[0].expand(20), **EXACT)
    assert shift[0] > 0.1
    sae.threshold.data += 100.0  # nothing is near: nothing is known of what lies below
    before = sae.threshold.detach().clone()
    sae.calibrate([normal(40, 6)])
    assert torch.equal(sae.threshold, before)


@pytest.mark.parametrize("kind", ["topk", "gated", "standard"])
def test_other_kinds_need_no_calibration(kind: str) -> None:
    sae = random_sae(kind)
    sae.calibrate([normal(40, 6)])
    assert sae.threshold == 0


@any_kind
@pytest.mark.parametrize("row_block", [None, 1, 7])
def test_training_batch(kind: str, row_block: int | None) -> None:
    """`reconstruct` is `decode` of a code whose figures it reports."""
    sae, x = random_sae(kind), normal(30, 6)
    sae.b_enc.data[:5] = -100.0  # features that never fire
    pre = torch.relu(sae.pre_activations(x))
    code = closed_form(sae, x[None])[0]
    if kind in BATCH_KINDS:
        code = pre * (pre >= pre.flatten().topk(30 * sae.spec.top_k).values[-1])
    made = sae.reconstruct(x, compute=Compute(row_block))
    torch.testing.assert_close(made.x_hat, sae.decode(code), **EXACT)
    penalised = pre if kind == "gated" else code
    torch.testing.assert_close(made.l1, penalised.sum(1).mean(), **EXACT)
    assert made.l0 == pytest.approx(float((code > 0).sum(1).double().mean()), abs=1e-12)
    assert torch.equal(made.fired, (code > 0).any(0)) and not made.fired[:5].any()
    if kind in BATCH_KINDS:
        assert made.l0 == sae.spec.top_k


def dense_topk(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    code = closed_form(sae, x[None])[0]
    return twin(x, sae.decode(code), code, code, x.new_zeros(()))


def dense_matryoshka(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    code = torch.relu(sae.pre_activations(x))
    code = code * (code >= code.flatten().topk(len(x) * sae.spec.top_k).values[-1])
    nested = [code[:, :size] @ sae.W_dec[:size] + sae.b_dec for size in SIZES[:-1]]
    kind_loss = sum((x - x_hat).pow(2).sum(1).mean() for x_hat in nested) / len(nested)
    return twin(x, sae.decode(code), code, code, kind_loss)


def dense_multi(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    pre = torch.relu(sae.pre_activations(x))
    total = len(x) * sae.spec.top_k
    sizes = total, total // 2, 2 * total
    codes = [pre * (pre >= pre.flatten().topk(size).values[-1]) for size in sizes]
    errors = [(x - sae.decode(code)).pow(2).sum(1).mean() for code in codes]
    return twin(x, sae.decode(codes[0]), codes[0], codes[0], (errors[1] + errors[2]) / 2)


def dense_gated(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    gate = torch.relu(sae.pre_activations(x))
    magnitude = (x - sae.b_dec) @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag
    code = torch.relu(magnitude) * (gate > 0)
    by_gate = gate @ sae.W_dec.detach() + sae.b_dec.detach()
    return twin(x, sae.decode(code), code, gate, (x - by_gate).pow(2).sum(1).mean())


def dense_jumprelu(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    """The straight-through gradient of the threshold as that of a term whose value is 0."""
    pre, theta, eps = sae.pre_activations(x), sae.threshold, jumprelu.BANDWIDTH
    active = (pre > theta) & (pre > 0)
    near = ((pre - theta).abs() < eps / 2).detach() * (pre > 0)
    moved = (theta - theta.detach()) * near / eps
    code = pre * active - theta.detach() * moved
    l0 = (active.double() - moved).sum(1).mean()
    return twin(x, sae.decode(code), code, code, (l0 / sae.spec.top_k - 1) ** 2)


def twin(
    x: Tensor, x_hat: Tensor, code: Tensor, penalised: Tensor, kind_loss: Tensor
) -> Reconstruction:
    active = code.detach() > 0
    l0 = float(active.sum()) / len(x)
    return Reconstruction(x_hat, penalised.sum(1).mean(), l0, active.any(0), kind_loss)


TWINS = {
    "topk": dense_topk,
    "matryoshka_batch_topk": dense_matryoshka,
    "multi_batch_topk": dense_multi,
    "gated": dense_gated,
    "jumprelu": dense_jumprelu,
}


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("row_block", [None, 7])
def test_loss_and_gradients_are_those_of_the_dense_twin(
    kind: str, row_block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jumprelu, "BANDWIDTH", 0.5)  # some pre-activations lie that near
    sae, x = random_sae(kind), normal(30, 6)
    values = []
    for made in (sae.reconstruct(x, compute=Compute(row_block)), TWINS[kind](sae, x)):
        loss = (x - made.x_hat).pow(2).sum(1).mean() + 0.3 * made.l1 + 0.7 * made.kind_loss
        gradients = torch.autograd.grad(loss, list(sae.parameters()), materialize_grads=True)
        values.append([loss, made.kind_loss, *gradients])
    names = ["loss", "kind_loss", *dict(sae.named_parameters())]
    for name, ours, dense in zip(names, *values, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)
        assert dense.abs().max() > 0.01 or (name, kind) == ("kind_loss", "topk"), name


@pytest.mark.parametrize("row_block", [None, 7])
def test_nested_reconstructions_are_those_of_the_first_features(row_block: int | None) -> None:
    sae, x = random_sae("matryoshka_batch_topk"), normal(30, 6)
    code = sparse_ops.batch_topk(x, sae.weights, 90, row_block=row_block)
    nested = sae.nested_reconstructions(code)
    assert nested.shape == (3, 30, 6)
    for size, x_hat in zip(SIZES, nested, strict=True):
        first = code.to_dense() * (torch.arange(20) < size)
        torch.testing.assert_close(x_hat, sae.decode(first), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_pairs_of_a_step(kind: str) -> None:
    """The smallest value that a batch keeps is that of the `trained_k` largest per token."""
    sae, x = random_sae(kind), normal(30, 6)
    config, least = SAEConfig(sae_type=kind, topk=sae.spec.top_k), sae.reconstruct(x).least
    if least is not None:
        kept = (sae.pre_activations(x) >= least).sum()
        assert kept == 30 * config.trained_k
    assert (config.trained_k == 0) == (kind in DENSE_KINDS)


@pytest.mark.parametrize(("top_k", "l0"), [(4, 64), (100, 256)])
def test_jumprelu_starts_with_16_k_features_or_half_of_all(top_k: int, l0: int) -> None:
    sae = build(spec("jumprelu", d_in=64, d_sae=512, top_k=top_k))
    sae.initialise(generator(0, "weights"))
    x = torch.randn(500, 64, generator=generator(1)) / 8  # E||x||^2 = 1
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(l0, rel=0.2)
    assert sae.threshold.shape == (512,)


def test_earlier_batches_do_not_change_a_training_batch() -> None:
    """The bound that one batch leaves behind for the next is only a guess."""
    sae, x, bound = random_sae(), normal(30, 6), sparse_ops.LowerBound()
    bound.update(sae.reconstruct(1000 * normal(30, 6, seed=9)).least)
    assert bound.value > 100
    found = sae.reconstruct(x, compute=Compute(lower_bound=bound.value))
    torch.testing.assert_close(found.x_hat, sae.reconstruct(x).x_hat, **EXACT)
    assert found.l0 == sae.spec.top_k


# Weights


def test_initial_weights() -> None:
    first, second, other = (build(spec()) for _ in range(3))
    for sae, seed in ((first, 1), (second, 1), (other, 2)):
        sae.initialise(generator(seed, "weights"))
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(first.W_enc, 0.3 * first.W_dec.T)
    standard = build(spec("standard"))
    standard.initialise(generator(1, "weights"))
    assert torch.equal(standard.W_enc, first.W_dec.T)
    assert torch.equal(first.W_dec, second.W_dec) and not torch.equal(first.W_dec, other.W_dec)
    assert not first.b_enc.any() and not first.b_dec.any() and not first.ever_fired.any()


@any_kind
@pytest.mark.parametrize("scale", [0.25, 7.0])
def test_folded_takes_raw_activations(kind: str, scale: float) -> None:
    inner, mean, x = random_sae(kind), normal(6, seed=4), normal(50, 6)
    inner(x).sum().backward()
    before = copy.deepcopy(inner.state_dict())
    outer = inner.folded(mean, scale, torch.float64)
    raw = mean + scale * x
    torch.testing.assert_close(outer.encode(raw), scale * inner.encode(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outer(raw), mean + scale * inner(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(outer.W_enc, inner.W_enc) and torch.equal(outer.W_dec, inner.W_dec)
    assert all(parameter.grad is None for parameter in outer.parameters())
    assert all(torch.equal(before[name], value) for name, value in inner.state_dict().items())
    half = inner.folded(mean, scale, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.ever_fired.dtype == torch.bool


def test_decoder_gradient_has_no_part_along_its_row() -> None:
    sae = random_sae()
    gradient = normal(20, 6, seed=5)
    sae.W_dec.grad = gradient.clone()
    sae.project_decoder_gradient()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(20).double())
    # what is taken away lies along the row
    taken = gradient - sae.W_dec.grad
    along = (taken * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    torch.testing.assert_close(taken, along, **EXACT)


def test_decoder_rows_come_back_to_unit_norm() -> None:
    sae = random_sae()
    directions = sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 5, 20).double()[:, None])
        sae.W_dec[3] = 0.0
    directions[3] = 0.0
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.detach(), directions, **EXACT)


def encoder_after(how: str, folder: Path) -> Tensor:
    sae: SparseAutoencoder = random_sae(dtype=torch.float32)
    if how == "save, load":
        save_sae(folder / "sae", sae, {})
        return load_sae(folder / "sae").W_enc
    if how == "step":
        sae.reconstruct(normal(9, 6, dtype=torch.float32)).x_hat.sum().backward()
        torch.optim.Adam(sae.parameters(), fused=True).step()
        return sae.W_enc
    changed = {
        "build": lambda: build(spec()),
        "to bfloat16": lambda: sae.to(torch.bfloat16),
        "to float64": lambda: sae.double(),
        "deepcopy": lambda: copy.deepcopy(sae),
        "folded": lambda: sae.folded(torch.zeros(6), 2.0, torch.float16),
    }[how]()
    return changed.W_enc


@pytest.mark.parametrize(
    "how", ["build", "to bfloat16", "to float64", "deepcopy", "folded", "save, load", "step"]
)
def test_a_feature_of_the_encoder_is_contiguous(how: str, tmp_path: Path) -> None:
    W_enc = encoder_after(how, tmp_path)
    assert W_enc.shape == (6, 20)
    assert W_enc.T.is_contiguous()


@any_kind
def test_stored_tensors_are_contiguous(kind: str) -> None:
    sae = random_sae(kind)
    stored = sae.tensors()
    own = {"gated": {"r_mag": (20,), "b_mag": (20,)}, "jumprelu": {"threshold": (20,)}}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "W_enc": (6, 20),
        "b_enc": (20,),
        "W_dec": (20, 6),
        "b_dec": (6,),
        "threshold": (),
        "ever_fired": (20,),
        "num_batches_not_active": (20,),
        **own.get(kind, {}),
    }
    assert all(t.is_contiguous() and not t.requires_grad for t in stored.values())
    assert torch.equal(stored["W_enc"], sae.W_enc)


def test_activity_counters() -> None:
    """Dead after more than `n_batches_to_dead` (5) silent batches, alive again when it fires."""
    sae, fired = random_sae(), torch.zeros(20, dtype=torch.bool)
    fired[:4] = True
    for _ in range(5):
        sae.record_activity(fired)
    assert sae.num_batches_not_active.tolist() == [0] * 4 + [5] * 16
    assert not sae.dead_features.any()
    sae.record_activity(fired)
    assert torch.equal(sae.dead_features, ~fired) and torch.equal(sae.ever_fired, fired)
    sae.record_activity(~fired)
    assert sae.num_batches_not_active.tolist() == [1] * 4 + [0] * 16
    assert not sae.dead_features.any() and sae.ever_fired.all()


def test_no_more_features_can_be_active_than_there_are() -> None:
    config = SAEConfig(topk=33, sae_expansion=2)
    with pytest.raises(SAEError, match="--topk 33: the SAE has 32 features"):
        config.n_features(16)
    assert SAEConfig(topk=32, sae_expansion=2).n_features(16) == 32
