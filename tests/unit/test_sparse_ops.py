"""The pairwise arithmetic against its dense twin, in float64: values, gradients and memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from largest_tensor import LargestTensor
from synthetic import normal, random_sae, spec
from torch import Tensor

from sae_core.sae import largest_entries, pair_products, sparse_ops
from sae_core.sae.dense_start import BANDWIDTH
from sae_core.sae.kinds import build
from sae_core.sae.losses import l1_loss, reconstruction_loss
from sae_core.sae.sparse_ops import (
    LowerBound,
    Precision,
    SparseCode,
    Weights,
    batch_topk,
    decode,
    encode,
    select,
)
from sae_core.utils.seeding import generator

D, FEATURES = 6, 20
TOO_HIGH = 1e6


def make_weights(integers: bool = False, seed: int = 0) -> Weights:
    """Random weights; small integers make exact ties, and sums without rounding."""
    shapes = {"W_enc": (FEATURES, D), "b_enc": (FEATURES,), "W_dec": (FEATURES, D), "b_dec": (D,)}
    tensors = {name: draw(*shape, integers=integers, seed=seed) for name, shape in shapes.items()}
    tensors["W_enc"] = tensors["W_enc"].T
    return Weights(**{name: tensor.requires_grad_() for name, tensor in tensors.items()})


def draw(*shape: int, integers: bool = False, seed: int = 0) -> Tensor:
    numbers = normal(*shape, seed=seed + 31 * shape[0] + len(shape))
    return numbers.round() if integers else numbers


def dense_topk(x: Tensor, weights: Weights, total: int) -> Tensor:
    """(N, F) the code, by a stable sort of all pre-activations."""
    code = torch.relu((x - weights.b_dec) @ weights.W_enc + weights.b_enc)
    kept = torch.sort(code.flatten(), descending=True, stable=True).indices[:total]
    mask = torch.zeros(code.numel(), dtype=code.dtype).index_fill_(0, kept, 1.0)
    return code * mask.view_as(code)


def gradients(x: Tensor, x_hat: Tensor, code: Tensor, weights: Weights) -> list[Tensor]:
    loss = reconstruction_loss(x, x_hat) + 0.3 * l1_loss(code, len(x))
    return list(torch.autograd.grad(loss, list(weights)))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles even in the small batches here."""
    monkeypatch.setattr(largest_entries, "TILE_ROWS", 4)


def assert_same(ours: list[Tensor], dense: list[Tensor]) -> None:
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("integers", [False, True], ids=["reals", "ties"])
@pytest.mark.parametrize("row_block", [None, 1, 5])
@pytest.mark.parametrize("lower_bound", [-1.0, 0.0, 0.3, TOO_HIGH])
@pytest.mark.parametrize(("n", "total"), [(17, 51), (17, 1), (1, 3), (17, 10_000)])
def test_equals_dense_autograd(
    n: int, total: int, lower_bound: float, row_block: int | None, integers: bool
) -> None:
    weights, x = make_weights(integers), draw(n, D, integers=integers, seed=5)
    code = encode(x, weights, total, lower_bound=lower_bound, row_block=row_block)
    x_hat = decode(code, weights)
    expected = dense_topk(x, weights, total)
    expected_hat = expected @ weights.W_dec + weights.b_dec
    assert_same([code.to_dense(), x_hat], [expected, expected_hat])
    assert_same(
        gradients(x, x_hat, code.value, weights), gradients(x, expected_hat, expected, weights)
    )


@pytest.mark.parametrize(
    ("shift", "n_positive"), [(-5.0, range(1, 51)), (-100.0, range(1))], ids=["few", "none"]
)
@pytest.mark.parametrize("lower_bound", [0.0, TOO_HIGH])
def test_fewer_positive_than_asked_for(shift: float, n_positive: range, lower_bound: float) -> None:
    weights, x = make_weights(), draw(17, D)
    weights = weights._replace(b_enc=(weights.b_enc.detach() + shift).requires_grad_())
    code = encode(x, weights, 51, lower_bound=lower_bound, row_block=4)
    x_hat, expected = decode(code, weights), dense_topk(x, weights, 51)
    expected_hat = expected @ weights.W_dec + weights.b_dec
    assert code.value.numel() == int((expected > 0).sum()) and code.value.numel() in n_positive
    assert_same([code.to_dense(), x_hat], [expected, expected_hat])
    assert_same(
        gradients(x, x_hat, code.value, weights), gradients(x, expected_hat, expected, weights)
    )


def test_all_zero() -> None:
    zero = Weights(*(torch.zeros_like(w).requires_grad_() for w in make_weights()))
    code = encode(torch.zeros(4, D, dtype=torch.float64), zero, 8)
    assert code.value.numel() == 0  # a pre-activation of 0 is not active
    x_hat = decode(code, zero)
    assert x_hat.shape == (4, D) and not x_hat.any()
    assert not any(g.any() for g in torch.autograd.grad(x_hat.sum() + code.value.sum(), zero[:3]))


def test_ties_go_to_the_earlier_entry() -> None:
    """Four tokens whose every pre-activation is 1."""
    weights = make_weights()
    flat = weights._replace(
        W_enc=torch.zeros_like(weights.W_enc), b_enc=torch.ones_like(weights.b_enc)
    )
    code = batch_topk(draw(4, D), flat, FEATURES + 3, row_block=1)
    assert code.pairs.row.tolist() == [0] * FEATURES + [1] * 3
    assert code.pairs.column.tolist() == [*range(FEATURES), 0, 1, 2]


def same_code(a: SparseCode, b: SparseCode) -> bool:
    """Whether two codes are the same, pair by pair; values to rounding."""
    same = torch.equal(a.pairs.row, b.pairs.row) and torch.equal(a.pairs.column, b.pairs.column)
    return same and torch.allclose(a.value, b.value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.2])
def test_a_bfloat16_product_finds_exactly_what_a_dense_one_does(
    share: float, scale: float, seed: int
) -> None:
    """Many entries lie closer together than bfloat16 tells apart, and outliers raise the norm."""
    n, d, width = 50, 24, 300
    sae = random_sae(d_in=d, d_sae=width, seed=seed)
    x = normal(n, d, seed=seed)
    x[3] *= scale
    expected = batch_topk(x, sae.weights, 4 * n)
    bound = share * float(expected.value.min()) * (1 - 1e-9)
    for row_block in (None, 7):
        found = batch_topk(
            x,
            sae.weights,
            4 * n,
            lower_bound=bound,
            row_block=row_block,
            precision=Precision(torch.bfloat16, torch.float64),
        )
        assert same_code(found, expected)


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32),
    "float32 by way of bfloat16": Precision(torch.bfloat16, torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.95, 1.1])
def test_the_number_of_tokens_in_a_block_changes_no_bit(
    share: float, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix product's last bits may depend on its number of rows, and a value's on the bound
    that it is found above; a bad guess at it makes more candidates than are kept."""
    monkeypatch.setattr(largest_entries, "TILE_ROWS", 64)
    n, d, width, k = 1000, 576, 640, 5
    sae, x = random_sae(d_in=d, d_sae=width, dtype=torch.float32), normal(n, d).float()
    bound = share * float(batch_topk(x, sae.weights, n * k).value.min())
    codes = [
        batch_topk(x, sae.weights, n * k, lower_bound=bound, row_block=rows, precision=precision)
        for rows in (None, 1, 64, 100, 333, 512, 10_000)
    ]
    for code in codes[1:]:
        assert torch.equal(code.value, codes[0].value)
        assert torch.equal(code.pairs.column, codes[0].pairs.column)
    bound = torch.tensor(2.0 * d**0.5)
    chosen = [select(x, sae.weights, lambda pre: pre > bound, row_block=r) for r in (None, 1, 333)]
    assert len(chosen[0].value) and all(torch.equal(c.value, chosen[0].value) for c in chosen)


def test_bfloat16_values_are_those_of_a_rounded_product() -> None:
    n, d, width = 50, 24, 300
    sae, x = random_sae(d_in=d, d_sae=width), normal(n, d)
    exact = batch_topk(x, sae.weights, 4 * n)
    both = Precision(torch.bfloat16, torch.bfloat16)
    rounded = batch_topk(x, sae.weights, 4 * n, lower_bound=0.5, precision=both)
    assert rounded.value.dtype == x.dtype and len(rounded.value) == 4 * n
    ours, dense = rounded.to_dense(), exact.to_dense()
    both_keep, one_keeps = (ours > 0) & (dense > 0), (ours > 0) != (dense > 0)
    torch.testing.assert_close(ours[both_keep], dense[both_keep], rtol=0.01, atol=0.02)
    assert not torch.equal(ours[both_keep], dense[both_keep])
    edge = (ours + dense)[one_keeps]
    torch.testing.assert_close(edge, exact.value.min().expand_as(edge), rtol=0.02, atol=0)


def test_the_lower_bound_follows_the_least_kept_value_as_it_falls() -> None:
    weights, x, bound = make_weights(), draw(17, D, seed=5), LowerBound()
    code = batch_topk(x, weights, 51)
    least = float(code.value.min())
    bound.update(code.least)
    assert bound.value == pytest.approx(0.95 * least)
    fallen = batch_topk(0.9 * x, weights._replace(b_enc=0.9 * weights.b_enc,
                                                  b_dec=0.9 * weights.b_dec), 51)  # fmt: skip
    bound.update(fallen.least)
    assert bound.value == pytest.approx(0.95 * 0.9 * 0.9 * least)
    bound.update(None)  # a batch without a top-k
    assert bound.value == pytest.approx(0.95 * 0.9 * 0.9 * least)
    bound.update(batch_topk(x, weights, 10_000).least)  # fewer are positive: there is no bound
    assert bound.value == 0


@pytest.mark.parametrize("row_block", [None, 3])
def test_bound_at_the_least_kept_value_loses_nothing(row_block: int | None) -> None:
    weights, x = make_weights(integers=True), draw(17, D, integers=True, seed=5)
    code = batch_topk(x, weights, 51, row_block=row_block)
    least = float(code.value.min())
    again = batch_topk(x, weights, 51, lower_bound=least, row_block=row_block)
    assert same_code(code, again)


def test_pairs_are_exactly_n_times_k_in_order() -> None:
    n, k = 40, 3
    code = batch_topk(draw(n, D), make_weights(), n * k, row_block=7)
    assert code.value.numel() == n * k and bool((code.value > 0).all())
    pairs, dense = code.pairs, code.to_dense()
    assert bool((torch.diff(pairs.row * FEATURES + pairs.column) > 0).all())
    assert torch.equal(pairs.counts(), (dense > 0).sum(0))
    assert torch.equal(torch.diff(pairs.row_start), (dense > 0).sum(1))
    order, rows, offsets = pairs.by_column
    assert torch.equal(pairs.column[order], pairs.column.sort().values)
    assert torch.equal(rows, pairs.row[order])
    assert torch.equal(torch.diff(offsets), pairs.counts())


@pytest.mark.parametrize("lower_bound", [0.0, 3.0, TOO_HIGH])
@pytest.mark.parametrize("row_block", [None, 16])
def test_dense_code_never_exists(
    row_block: int | None, lower_bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, width, k = 256, 4096, 4
    monkeypatch.setattr(largest_entries, "BLOCK_BYTES", 8 * 16 * width)
    sae = random_sae(d_in=8, d_sae=width)
    x = normal(n, 8)
    with LargestTensor() as dense:
        gradients(x, dense_topk(x, sae.weights, n * k) @ sae.W_dec, sae.W_enc, sae.weights)
    assert dense.entries >= n * width
    with LargestTensor() as ours:
        code = encode(x, sae.weights, n * k, lower_bound=lower_bound, row_block=row_block)
        gradients(x, decode(code, sae.weights), code.value, sae.weights)
    assert code.value.numel() == n * k
    assert ours.entries <= max(16 * width, sae.W_enc.numel())


class Elsewhere(Tensor):
    """A tensor that says it lies on a device without a sampled product."""

    device = SimpleNamespace(type="mps")  # type: ignore[assignment]


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunked_sampled_product_equals_the_csr_one(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_products, "SAMPLED_PAIRS", chunk)
    pairs = batch_topk(draw(17, D), make_weights(), 51).pairs
    a, b = draw(17, D, seed=8), draw(FEATURES, D, seed=9)
    expected = (a @ b.T)[pairs.row, pairs.column]
    chunked = pair_products.sampled_product((a.as_subclass(Elsewhere),), (b,), pairs)
    parts = [part.contiguous() for part in b.split(4, dim=1)]
    sliced = pair_products.sampled_product(
        [part.contiguous() for part in a.split(4, dim=1)], parts, pairs
    )
    one_sliced = pair_products.sampled_product((a,), parts, pairs)
    assert_same([chunked.as_subclass(Tensor), sliced, one_sliced], [expected] * 3)


@pytest.mark.parametrize("kind", ["batch_topk", "standard"])
@pytest.mark.parametrize("n_dead", [0, 1, 3, 9, 20])
def test_auxiliary_loss_equals_dense(n_dead: int, kind: str) -> None:
    """With `top_k_aux` 4: below it, above it, and every feature dead."""
    sae, x, x_hat = random_sae(kind), normal(90, D), normal(90, D, seed=2).requires_grad_()
    dead = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(3))[:n_dead].sort()[0]
    sae.num_batches_not_active[dead] = sae.spec.n_batches_to_dead + 1
    aux = sae.auxiliary_loss(x, x_hat)
    loss = aux.loss
    if n_dead == 0:
        assert loss.item() == 0 and not loss.requires_grad
        return
    residual = (x - x_hat).detach()
    b_dec = sae.b_dec.detach()
    some = Weights(sae.W_enc[:, dead], sae.b_enc[dead], sae.W_dec[dead], b_dec)
    prediction = dense_topk(x, some, len(x) * min(4, n_dead)) @ some.W_dec
    variance = (residual - residual.mean(0)).pow(2).sum()
    expected = (prediction - residual).pow(2).sum() / variance
    learned = [sae.W_enc, sae.b_enc, sae.W_dec]
    assert_same([loss.detach()], [expected.detach()])
    for parameter in learned:
        parameter.grad = torch.ones_like(parameter)  # what the rest of the loss may have left
    loss.backward()
    aux.add_gradient(sae.weights)
    ours = [parameter.grad - 1 for parameter in learned]
    assert_same(ours, list(torch.autograd.grad(expected, learned)))
    # The residual is a target, and the live part stays as it is.
    assert sae.b_dec.grad is None and x_hat.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auxiliary_loss_of_a_perfect_reconstruction_is_0(dtype: torch.dtype) -> None:
    sae, x = random_sae(dtype=dtype), normal(30, D, dtype=dtype)
    sae.num_batches_not_active.fill_(1000)
    aux = sae.auxiliary_loss(x, x.clone())
    assert aux.loss.item() == 0
    aux.loss.backward()
    sae.W_enc.grad, sae.b_enc.grad, sae.W_dec.grad = map(
        torch.zeros_like, (sae.W_enc, sae.b_enc, sae.W_dec)
    )
    aux.add_gradient(sae.weights)
    assert torch.isfinite(sae.W_enc.grad).all()


def test_pairs_below_a_threshold_are_in_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of a JumpReLU SAE's at the start, and only the threshold's gradient needs them:
    decoding and both gradients of matrices read the rows of the others."""
    sae = build(spec("jumprelu", d_in=64, d_sae=512, top_k=4))
    sae.initialise(generator(0, "weights"))
    x, read = torch.randn(500, 64, generator=generator(1)) / 8, []

    def bag(rows: Tensor, *given: Any) -> Tensor:
        read.append(len(rows))
        return pair_products.bag(rows, *given)

    monkeypatch.setattr(sparse_ops, "bag", bag)
    made = sae.reconstruct(x)
    (x - made.x_hat).pow(2).sum().backward()
    near = (sae.pre_activations(x) > sae.threshold - BANDWIDTH / 2).sum()
    assert read == 3 * [round(500 * made.l0)] and near > 1.5 * read[0]
    assert sae.threshold.grad is not None and (sae.threshold.grad != 0).all()
