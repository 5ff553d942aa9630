"""Products in bfloat16: that a GPU is given no others, and what they give beside float64."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ordered_sums import OrderedSums
from pretend_gpu import GPU, PretendGPU, _move_module
from short_training import make_sae
from synthetic import BATCH_KINDS, KINDS, SparseDirections, normal, random_sae
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_core.sae import dense_ops, largest_entries, sparse_ops
from sae_core.sae.losses import l1_loss, reconstruction_loss
from sae_core.sae.precision import Precision
from sae_core.sae.reconstruction import Compute
from sae_core.sae.sparse_code import Weights
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import TrainingConfig
from sae_core.trainer.events import Observer
from sae_core.training import Trainer

EXACT = Precision(torch.bfloat16, torch.float32)
ROUNDED = Precision(torch.bfloat16, torch.bfloat16)
N, D, FEATURES = 40, 256, 60


class Products(TorchDispatchMode):
    """Notes the number formats of matrices that are multiplied while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_on_a_gpu_multiplies_bfloat16_alone(
    kind: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with dead features, a validation and a calibration. And every sum has its order."""
    monkeypatch.setattr(dense_ops, "DENSE_SHARE", 0.0 if dense else 1.0)
    source = SparseDirections(n_train=24)
    with PretendGPU(), OrderedSums(), Products() as products:
        sae = make_sae(kind, n_dead=9, aux_penalty=0.5)
        if kind in BATCH_KINDS:
            sae.threshold.fill_(0.3)  # without a guess, the first calibration is in float32
        settings = TrainingConfig(num_epochs=1, early_stopping_patience=0)
        training = Trainer(
            _move_module(sae, GPU),
            source,
            settings,
            Observer(),
            Compute(precision=ROUNDED),
        )
        [record] = training.train()
    assert products.dtypes == {torch.bfloat16}
    assert 0 < record.metrics["val_recon_loss"] < 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BATCH_KINDS])
def test_a_cpu_multiplies_in_the_format_of_the_weights(kind: str) -> None:
    x = normal(N, 16).float()
    for precision in (EXACT, ROUNDED):
        with Products() as products:
            made = make_sae(kind).reconstruct(x, compute=Compute(precision=precision))
        assert products.dtypes == {torch.float32}
        assert torch.equal(made.x_hat, make_sae(kind).reconstruct(x).x_hat)


def step(sae: SparseAutoencoder, x: Tensor, compute: Compute) -> dict[str, Tensor]:
    """A step's reconstruction, figures and gradients."""
    made = sae.reconstruct(x, compute=compute)
    loss = reconstruction_loss(x, made.x_hat) + 0.1 * made.l1 + made.kind_loss
    loss.backward()
    found = {"x_hat": made.x_hat, "l1": made.l1, "kind_loss": made.kind_loss, "loss": loss}
    return found | {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


def assert_close_to(found: Tensor, right: Tensor, name: str, most: float) -> None:
    """By the length of the difference."""
    error = (found.detach().cpu().as_subclass(Tensor).double() - right.detach()).norm()
    assert error <= most * right.detach().norm(), name


def trained(kind: str) -> SparseAutoencoder:
    """An SAE whose every tensor takes part, in float64."""
    changes = {"matryoshka_sizes": [15, 30, FEATURES]} if "matryoshka" in kind else {}
    sae = random_sae(kind, d_in=D, d_sae=FEATURES, **changes)
    for name, tensor in sae.named_parameters():
        if name == "threshold":
            tensor.data.fill_(0.29)
        elif name != "W_dec":
            tensor.data.copy_(sae.W_dec.T if name == "W_enc" else 0.02 * tensor)
    return sae


STRENGTHS = {
    "batch_topk": ([[1.0, 0.9, 0.8]], 0.5),
    "multi_batch_topk": ([[2.0, 2.0, 1.4, 0.7, 0.7, 0.7], [2.0, 1.4, 1.4, 0.7, 0.7, 0.7]], 0.1),
}
"""Those of a token's features, for some tokens in turn, and the length of what is something else.
Three features per token are kept, of the second kind also one and a half and six."""


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_gpu_is_that_of_float64(
    kind: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of activations that are a few features each and something else, so that rounding changes no
    choice but where that is no jump. Each product is off by about 2^-8."""
    monkeypatch.setattr(dense_ops, "DENSE_SHARE", 0.0 if dense else 1.0)
    twin = trained(kind)
    strength, length = STRENGTHS.get(kind, STRENGTHS["batch_topk"])
    strength = torch.tensor(strength).double().repeat(N // len(strength), 1)
    active = normal(N, FEATURES, seed=6).topk(strength.shape[1]).indices
    code = torch.zeros(N, FEATURES).double().scatter(1, active, strength)
    rest = length * F.normalize(normal(N, D, seed=7), dim=1)
    x = (code @ twin.W_dec + twin.b_dec).detach() + rest
    right = step(twin, x, Compute())
    with PretendGPU(), Products() as products:
        sae = copy.deepcopy(twin).float()
        found = step(_move_module(sae, GPU), x.float().to(GPU), Compute(precision=ROUNDED))
    assert products.dtypes == {torch.bfloat16} or not dense
    assert set(found) == set(right) and len(right) >= 8
    for name, tensor in right.items():
        assert_close_to(found[name], tensor, name, 0.02)


def test_a_norm_is_summed_in_float32() -> None:
    assert float(l1_loss(torch.ones(1001).bfloat16(), 1)) == 1001


def weights(dtype: torch.dtype = torch.float64) -> Weights:
    drawn = normal(FEATURES, D), normal(FEATURES), normal(FEATURES, D, seed=2), normal(D)
    given = Weights(*(tensor.to(dtype) for tensor in drawn))
    return given._replace(W_enc=given.W_enc.T)


@pytest.mark.parametrize("rows", [N, 7])
def test_dense_products_are_those_of_pairs(rows: int) -> None:
    """In float64 they differ by nothing but the order of sums, in however many blocks."""
    x, pulled = normal(N, D, seed=3), normal(N, D, seed=4)

    def results(dense: bool) -> list[Tensor]:
        own = Weights(*(w.clone().requires_grad_() for w in weights()))
        W_enc, b_enc, W_dec, b_dec = own
        code = sparse_ops.batch_topk(x, own, 5 * N)
        if dense:
            value = dense_ops.DenseEncode.apply(x, code, rows, torch.float64, W_enc, b_enc, b_dec)
            x_hat = dense_ops.DenseDecode.apply(code.pairs, value, rows, torch.float64, W_dec)
        else:
            value = sparse_ops.encode(x, own, 5 * N).value
            x_hat = sparse_ops.decode(sparse_ops.SparseCode(code.pairs, value), own) - b_dec
        ((x_hat * pulled).sum() + value.pow(2).sum()).backward()
        return [value, x_hat, *(w.grad for w in own if w.grad is not None)]

    for mine, theirs in zip(results(True), results(False), strict=False):
        torch.testing.assert_close(mine, theirs)


def test_the_dense_product_takes_over_where_enough_of_the_code_is_active() -> None:
    own, x = weights(torch.float32), normal(N, D).float()
    for total, format in ((N * FEATURES // 100, None), (N * FEATURES // 100 + 1, torch.bfloat16)):
        code = sparse_ops.batch_topk(x, own, total)
        with Products() as products:
            sparse_ops.decode(code, own, ROUNDED)
            sparse_ops.decode(code, own, EXACT)
            sparse_ops.decode(code, own)
        assert products.dtypes == ({format} if format else set())


@pytest.mark.parametrize("each", [True, False], ids=["of each feature", "of all"])
@pytest.mark.parametrize("row_block", [None, 7])
def test_what_exceeds_a_threshold(each: bool, row_block: int | None) -> None:
    """Values in float32 are those of a float32 product. Rounded ones miss and add no entry that
    is further from the threshold than rounding moves it."""
    x, own = normal(N, D).float(), weights(torch.float32)
    threshold = 3 * normal(FEATURES, seed=5).float() if each else torch.tensor(2.0)
    found, rounded, right = (
        sparse_ops.above(x, own, threshold, how, row_block=row_block).to_dense()
        for how in (EXACT, ROUNDED, None)
    )
    assert torch.equal(found > 0, right > 0)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)
    pre = (x.double() - weights().b_dec) @ weights().W_enc + weights().b_enc
    lengths = (x - own.b_dec).norm(dim=1, keepdim=True) * own.W_enc.norm(dim=0)
    error, bound = largest_entries.ROUNDING * (lengths + 1), threshold.clamp(min=0)
    assert (rounded > 0)[pre > bound + error].all() and not (rounded > 0)[pre < bound - error].any()
    kept = rounded > 0
    assert ((rounded - pre).abs() <= error)[kept].all()


@pytest.mark.parametrize("kind", [*BATCH_KINDS, "jumprelu"])
def test_a_fast_product_calibrates_to_the_same_threshold(kind: str) -> None:
    x, thresholds = normal(200, 6).float(), []
    for precision in (None, ROUNDED):
        sae = random_sae(kind, torch.float32)
        sae.calibrate(x, precision)
        thresholds.append(sae.threshold.detach())
    torch.testing.assert_close(*thresholds)
