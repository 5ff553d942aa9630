"""The kernels of the static step, in Triton's interpreter, and their twins in PyTorch: against
dense matrices in float64."""

import json

import pytest
import torch
import torch.nn.functional as F
import triton
from running import run_python
from synthetic import normal
from torch import Tensor

from sae_core.distributed.process_group import SINGLE_PROCESS
from sae_core.sae.normalisation import Normalisation
from sae_core.sae.static import backend, select_kernels
from sae_core.sae.static.backend import TWIN, Backend
from sae_core.sae.static.facts import FIGURES, Facts, Figures, Weighting
from sae_core.sae.static.nested import ByFeature, ByValue
from sae_core.sae.static.pairs import Codes, Slots, entries, refine
from sae_core.sae.static.per_token import largest_of_each

N, D, FEATURES, K = 8, 12, 40, 2

OPERATIONS = {"kernels": backend.kernels(), "twin": TWIN}


@pytest.fixture(params=OPERATIONS.values(), ids=OPERATIONS)
def ops(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a row even here."""
    monkeypatch.setattr(select_kernels, "TILE", 32)


def skewed(n: int = N, n_features: int = FEATURES) -> Tensor:
    """(N, F) bfloat16 pre-activations; a feature's chance to be active falls with its rank (Zipf),
    and the first is active on half of the tokens."""
    rank = torch.arange(1, n_features + 1)
    pre = normal(n, n_features).float() + torch.special.ndtri(0.5 / rank**0.7)
    return (pre * (n_features / rank) ** 0.5).bfloat16()


def expected(pre: Tensor, rows: Tensor, columns: Tensor, total: int) -> Tensor:
    """(N, F) bool: what a stable sort of the entries that count keeps."""
    counted = torch.where(rows[:, None] & columns, pre.double(), 0.0).clamp(min=0.0).flatten()
    first = torch.sort(counted, descending=True, stable=True).indices[:total]
    kept = torch.zeros_like(counted, dtype=torch.bool)
    kept[first] = counted[first] > 0
    return kept.view_as(pre)


def assert_selected(slots: Slots, kept: Tensor, pre: Tensor, n_slots: int) -> None:
    row, column = kept.nonzero(as_tuple=True)
    n = len(row)
    assert slots.n_pairs == n and len(slots.row) == len(slots.value) == n_slots
    assert torch.equal(slots.row[:n].long(), row) and torch.equal(slots.column[:n].long(), column)
    assert torch.equal(slots.value[:n], pre[kept].float())
    assert not slots.value[n:].any() and (slots.column[n:] == pre.shape[1]).all()
    assert torch.equal(slots.start.diff().long(), kept.sum(1))


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers[0] if len(numbers) == 1 else numbers, dtype=torch.int32)


PRE = {
    "reals": skewed(),
    "ties": (skewed() * 2).round() / 2,
    "few positive": skewed() - 2,
    "none positive": -skewed().abs(),
    "one value": torch.ones(N, FEATURES).bfloat16(),
}


CASES = [("reals", 0, False), ("reals", 16250, True), ("reals", 2**15 - 1, True)]
CASES += [("ties", 0, True), ("ties", 16250, False), ("ties", 2**15 - 1, False)]
CASES += [(name, 16250, False) for name in ("few positive", "none positive", "one value")]


@pytest.mark.parametrize(("name", "floor", "masked"), CASES)
def test_selection_is_that_of_a_stable_sort(
    name: str, floor: int, masked: bool, ops: Backend
) -> None:
    """A fifth of the features is dead, and every third token left out, or nothing."""
    pre = PRE[name]
    rows, columns = torch.ones(N, dtype=torch.bool), torch.ones(FEATURES, dtype=torch.bool)
    if masked:
        rows[::3], columns[::5] = False, False
    for total in (0, N * K) if masked else (1, N * K):
        found = ops.select(pre, rows, columns, int32(total), N * K, int32(floor).clone())
        kept = expected(pre, rows, columns, total)
        assert_selected(found, kept, pre, N * K)
        least = float(pre[kept].min()) if 0 < total == int(kept.sum()) else 0.0
        assert total == 0 or float(found.least) == least


@pytest.mark.parametrize("name", PRE)
@pytest.mark.parametrize("k", [1, 3, FEATURES + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_largest_of_each_token(name: str, k: int, dtype: torch.dtype) -> None:
    """Ties are any of them."""
    pre, rows = PRE[name].to(dtype), torch.arange(N) % 3 > 0
    if dtype == torch.float32:
        pre = pre * (1 + 1e-3 * normal(N, FEATURES).float())  # what bfloat16 does not tell apart
    found = largest_of_each(pre, rows, k, N * k + 2)
    n = int(found.n_pairs)
    wanted = pre.float().sort(1, descending=True).values[:, :k].clamp(min=0) * rows[:, None]
    code = torch.zeros(N, FEATURES)
    code[found.row[:n].long(), found.column[:n].long()] = found.value[:n]
    assert torch.equal(code.sort(1, descending=True).values[:, :k], wanted)
    assert torch.equal(code[code > 0], pre[code > 0].float()) and n == int((wanted > 0).sum())
    kept = torch.zeros(N, FEATURES, dtype=torch.bool)
    kept[found.row[:n].long(), found.column[:n].long()] = True
    assert_selected(found, kept, pre, N * k + 2)


def test_the_next_floor_lies_below_the_threshold() -> None:
    floor = int32(0).clone()
    everything = torch.ones(N, dtype=torch.bool), torch.ones(FEATURES, dtype=torch.bool)
    found = OPERATIONS["kernels"].select(PRE["reals"], *everything, int32(N * K), N * K, floor)
    half = floor.to(torch.int16).view(torch.bfloat16).float()
    assert half == found.least / 2 > 0


def test_refined_candidates_are_the_largest_by_their_own_values() -> None:
    everything = torch.ones(N, dtype=torch.bool), torch.ones(FEATURES, dtype=torch.bool)
    found = TWIN.select(PRE["reals"], *everything, int32(2 * N * K), 2 * N * K, int32(0).clone())
    value = (found.value + 0.3 * normal(2 * N * K).float()) * (found.column < FEATURES)
    for total in (0, 7, N * K):
        value = value.clamp(min=0.2) * (value > 0)  # ties
        exact = torch.zeros(N, FEATURES + 1)
        exact[found.row.long(), found.column.long()] = value
        exact = exact[:, :-1]
        kept = expected(exact, *everything, total)
        assert_selected(refine(found, value, int32(total), N * K, FEATURES), kept, exact, N * K)


def test_the_entries_at_the_pairs() -> None:
    pre = skewed().float() * (1 + 1e-3 * normal(N, FEATURES).float())
    everything = torch.ones(N, dtype=torch.bool), torch.ones(FEATURES, dtype=torch.bool)
    found = TWIN.select(pre.bfloat16(), *everything, int32(7), N * K, int32(0).clone())
    value, there = entries(pre, found), found.column < FEATURES
    assert int(there.sum()) == 7 and not value[~there].any()
    assert torch.equal(value[there], pre[found.row.long()[there], found.column.long()[there]])
    assert not entries(-pre, found).any()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def weights(request: pytest.FixtureRequest) -> Tensor:
    return F.normalize(normal(FEATURES, D, seed=3), dim=1).to(request.param)


def two_slots() -> tuple[tuple[Slots, Slots], list[Tensor]]:
    """A code and that of the dead fifth of the features on a quarter of the tokens; both dense."""
    pre, rows = skewed(), torch.ones(N, dtype=torch.bool)
    dead, some = torch.arange(FEATURES) % 5 == 0, torch.arange(N) % 4 == 0
    main = TWIN.select(pre, rows, torch.ones_like(dead), int32(N * K), N * K, int32(0).clone())
    aux = TWIN.select(pre, some, dead, int32(2 * K), 4 * K, int32(0).clone())
    dense = [torch.where(expected(pre, rows, torch.ones_like(dead), N * K), pre.double(), 0.0)]
    dense.append(torch.where(expected(pre, some, dead, 2 * K), pre.double(), 0.0))
    return (main, aux), dense


def two_codes() -> tuple[Codes, list[Tensor]]:
    slots, dense = two_slots()
    return Codes.of(*slots), dense


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_decoding_is_a_dense_product(ops: Backend, weights: Tensor) -> None:
    codes, dense = two_codes()
    assert len(codes.row) == N * K + 4 * K and all(code.any() for code in dense)
    found = ops.decode(codes, weights)
    torch.testing.assert_close(found.double(), torch.cat(dense) @ weights.double(), **CLOSE)


def test_sampled_products_are_those_of_the_dense_product(ops: Backend, weights: Tensor) -> None:
    codes, dense = two_codes()
    A = normal(2 * N, D, seed=4).float()
    found, there = ops.sampled(codes, A, weights), codes.column < FEATURES
    product = A.double() @ weights.double().T
    wanted = product[codes.row[there].long(), codes.column[there].long()]
    torch.testing.assert_close(found[there].double(), wanted, **CLOSE)
    assert not found[~there].any()


@pytest.mark.parametrize("segment", [1, 2, 128])
def test_gradients_are_dense_products(segment: int, ops: Backend) -> None:
    """In segments of 2, the densest feature has two or more."""
    codes, dense = two_codes()
    assert int((dense[0] > 0).sum(0).max()) > 2
    G, X = normal(2 * N, D, seed=5).float(), normal(N, D, seed=6).float()
    d_value = ops.sampled(codes, G, normal(FEATURES, D, seed=7).float())
    sizes = {} if ops is TWIN else {"segment": segment}
    found = ops.gradients(codes, d_value, G, X, FEATURES, **sizes)
    dense_d = [torch.zeros(N, FEATURES + 1).double() for _ in dense]
    cut = codes.n_first
    for m, at in enumerate((slice(0, cut), slice(cut, None))):
        row, column = codes.row[at].long() - m * N, codes.column[at].long()
        dense_d[m][row.clamp(min=0), column] = d_value[at].double()
    dense_d = [d[:, :-1] for d in dense_d]
    torch.testing.assert_close(found.W_dec.double(), torch.cat(dense).T @ G.double(), **CLOSE)
    d_enc = (dense_d[0] + dense_d[1]).T @ X.double()
    torch.testing.assert_close(found.W_enc.double(), d_enc, **CLOSE)
    b_enc = torch.stack([d.sum(0) for d in dense_d])
    torch.testing.assert_close(found.b_enc.double(), b_enc, **CLOSE)


def test_a_nested_code_is_one_of_each_group(ops: Backend) -> None:
    """Three groups of features, of which the first has none, and the code of the dead ones."""
    slots, (main, aux) = two_slots()
    sizes, W = torch.tensor([0, 15, FEATURES]), normal(FEATURES, D, seed=7).float()
    group = ByFeature(sizes).groups(slots[0], int32(N * K), SINGLE_PROCESS)
    codes = Codes.nested(slots[0], group, 3, slots[1])
    bounds = [(0, 0), (0, 15), (15, FEATURES)]
    dense = [torch.zeros_like(main) for _ in bounds]
    for group, (first, end) in zip(dense, bounds, strict=True):
        group[:, first:end] = main[:, first:end]
    dense.append(aux)
    assert all(code.any() for code in dense[1:]) and codes.n_rows == 4 * N
    found = ops.decode(codes, W)
    torch.testing.assert_close(found.double(), torch.cat(dense) @ W.double(), **CLOSE)
    G, X = normal(4 * N, D, seed=5).float(), normal(N, D, seed=6).float()
    by = ops.gradients(codes, ops.sampled(codes, G, W), G, X, FEATURES)
    torch.testing.assert_close(by.W_dec.double(), torch.cat(dense).T @ G.double(), **CLOSE)
    d_code = (G.double() @ W.double().T).view(4, N, -1) * (torch.stack(dense) > 0)
    torch.testing.assert_close(by.W_enc.double(), d_code.sum(0).T @ X.double(), **CLOSE)
    b_enc = torch.stack([d_code[:3].sum((0, 1)), d_code[3].sum(0)])
    torch.testing.assert_close(by.b_enc.double(), b_enc, **CLOSE)


@pytest.mark.parametrize("name", PRE)
@pytest.mark.parametrize("wanted", [0, 7, N * K])
def test_groups_by_value_are_cuts_of_a_stable_sort(name: str, wanted: int) -> None:
    """The half is rounded as Python does; an unused slot is in no group."""
    pre, everything = PRE[name], (torch.ones(N, dtype=torch.bool), torch.ones(FEATURES) > 0)
    given = *everything, int32(2 * wanted), 2 * N * K, int32(0).clone()
    found = TWIN.select(pre, *given)
    group = ByValue(pre.device).groups(found, int32(wanted), SINGLE_PROCESS)
    cuts = [expected(pre, *everything, round(m * wanted)) for m in (0.5, 1, 2)]
    right = 3 - torch.stack(cuts).sum(0)
    n = int(found.n_pairs)
    assert torch.equal(group[:n].long(), right[found.row.long()[:n], found.column.long()[:n]])
    assert (group[n:] == 3).all() and n == int(cuts[-1].sum())


@pytest.mark.parametrize("nested", [False, True])
def test_dense_products_are_sums_over_pairs(nested: bool) -> None:
    """Up to the rounding of factors and products to bfloat16, also of a feature that both have."""
    codes, _ = two_codes()
    codes.column[-1], codes.value[-1] = codes.column[0], 0.5
    codes.start[1, -1] = codes.start[1, -1] + 1
    if nested:
        (main, aux), _ = two_slots()
        group = ByValue(main.value.device).groups(main, int32(N * K // 2), SINGLE_PROCESS)
        codes = Codes.nested(main, group, 3, aux)
    W, A = normal(FEATURES, D, seed=7).float(), normal(codes.n_rows, D, seed=4).float()
    X, d_value = normal(N, D, seed=6).float(), normal(len(codes.row), seed=8).float()
    d_value = d_value * (codes.column < FEATURES)
    pairs, dense = (
        (
            ops.decode(codes, W),
            ops.sampled(codes, A, W),
            *ops.gradients(codes, d_value, A, X, FEATURES),
        )
        for ops in (TWIN, TWIN.densely())
    )
    for found, right in zip(dense, pairs, strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - right).norm() < 2**-7 * right.norm()


@pytest.mark.parametrize("compiles", [True, False])
def test_without_a_c_compiler_there_are_no_kernels(
    compiles: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Driver:
        @staticmethod
        def get_current_target() -> str:
            if compiles:
                return "sm_90"
            raise RuntimeError("Failed to find C compiler. Please specify")

    monkeypatch.setattr(type(triton.runtime.driver), "active", Driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend._can_launch.cache_clear()
    for _ in range(2):
        assert backend.has_kernels(torch.device("cuda")) == compiles
    backend._can_launch.cache_clear()
    told = capsys.readouterr().out
    assert told.count("needs gcc") == (not compiles) and told.count("\n") == (not compiles)


def test_the_kernels_compile_for_a_gpu() -> None:
    """For the width of Qwen3-32B, without a GPU; the threshold's one program may use its stack.
    Matrices are read in large pieces, and nothing waits for what it adds to the counts."""
    found = json.loads(run_python("tests/tools/compile_kernels.py", "5120").stdout)
    assert len(found) == 23
    for name, used in found.items():
        assert used["registers"] < 255 and used["stack"] <= (128 if "threshold" in name else 0), (
            name
        )
        assert used["narrow loads"] == used["fences"] == 0, name


FACTS = {
    "taken": {},
    "halted": {"halted": True},
    "an activation that is not finite": {"finite": False},
    "a pair that may be missed": {"sure": False},
    "a loss that is not finite": {"loss": float("nan")},
    "no token": {"tokens": 0.0},
}


@pytest.mark.parametrize("case", FACTS.values(), ids=FACTS)
def test_whether_and_how_far_a_step_goes(case: dict[str, float], ops: Backend) -> None:
    """The third step, of gradients of length 4 that may have length 1."""
    given = {"halted": False, "finite": True, "sure": True, "loss": 0.5, "tokens": 7.0} | case
    figures = torch.arange(FIGURES).float()
    figures[0], figures[8] = given["loss"], given["tokens"]
    finite, sure, halted = (torch.tensor(given[k]) for k in ("finite", "sure", "halted"))
    counts, at, record = [torch.tensor(2.0) for _ in range(4)], torch.tensor(1), torch.ones(3, 12)
    lr = torch.tensor(0.01, dtype=torch.float64)
    scalars = ops.decide(
        figures, torch.tensor(16.0), Facts(finite, sure, lr, halted, counts, at, record, 1.0)
    )
    taken = not case
    assert scalars[3] == taken and halted == (not taken) and at == 2
    assert counts == [2.0 + taken] * 4
    step = 2 + taken
    right = 0.01 / (1 - 0.9**step), (1 - 0.999**step) ** 0.5, 0.25
    torch.testing.assert_close(scalars[:3], torch.tensor(right), **CLOSE)
    figures[-1] = float(taken)
    torch.testing.assert_close(record[1], figures, equal_nan=True)
    assert (record[[0, 2]] == 1).all()


@pytest.mark.parametrize("n_dead", [0, 3])
def test_the_figures_of_a_batch(n_dead: int, ops: Backend) -> None:
    pre, rows = skewed(), torch.ones(N, dtype=torch.bool)
    code = TWIN.select(pre, rows, rows.new_ones(FEATURES), int32(N * K), N * K, int32(0).clone())
    sums, weights = torch.tensor([6.0, 2.0, 3.0]), Weighting(2.0, 0.5, 0.25)
    of_code = code.value.sum(), code.n_pairs, code.least, code.least
    figures, scales = ops.terms(sums, *of_code, int32(n_dead), int32(N), weights)
    found, l1 = Figures(*figures), float(code.value.sum()) / N
    aux = 1.5 if n_dead else 0.0
    assert float(found.loss) == pytest.approx(12 / N + 0.5 * l1 + 0.25 * aux)
    assert [float(x) for x in found.terms().values()][1:] == pytest.approx(
        [6 / N, l1, 12 / N, 0.5 * l1, aux, 0.0]
    )
    assert (found.pairs, found.tokens, found.least) == (N * K, N, code.least)
    assert bool(found.aux_least.isnan()) == (not n_dead)
    assert scales.tolist() == pytest.approx([4 / N, 0.25 if n_dead else 0.0, 0.5 / N])


@pytest.mark.parametrize("n_sites", [1, 2], ids=["an SAE", "a transcoder"])
def test_a_batch_is_centred_scaled_and_masked(n_sites: int, ops: Backend) -> None:
    raw, bias = normal(N, n_sites * D, seed=20).bfloat16(), normal(D, seed=21).float()
    raw[1] *= 100
    raw[2, -1], raw[4, 0] = torch.nan, torch.inf
    means = normal(2, D, seed=22).float()
    sites = [Normalisation(means[0], 2.0, 10.0), Normalisation(means[1], 3.0, 8.0)][:n_sites]
    made = ops.prepare(raw, sites, bias)
    kept = torch.tensor([row not in (1, 2, 4) for row in range(N)])
    assert torch.equal(made.kept, kept)
    assert made.finite.tolist() == [row not in (2, 4) for row in range(N)]
    parts = raw.double().split(D, dim=1)
    scaled = [
        torch.where(kept[:, None], (part - site.mean) / site.scale, 0.0)
        for part, site in zip(parts, sites, strict=True)
    ]
    torch.testing.assert_close(made.x.double(), scaled[0] - bias, **CLOSE)
    torch.testing.assert_close(made.half.float(), made.x, rtol=2**-7, atol=0)
    torch.testing.assert_close(made.wanted.double(), scaled[-1], **CLOSE)


def test_errors_of_both_codes(ops: Backend) -> None:
    decoded, bias = normal(2 * N, D, seed=23).float(), normal(D, seed=24).float()
    wanted = normal(N, D, seed=25).float()
    kept, some = torch.arange(N) % 5 != 1, torch.arange(N) % 3 == 0
    both, residual, squares = ops.errors(decoded, bias, wanted, kept, some)
    error = (decoded[:N] + bias - wanted).double() * kept[:, None]
    left = -error * some[:, None]
    aux_error = decoded[N:].double() - left
    torch.testing.assert_close(both.double(), torch.cat([error, aux_error]), **CLOSE)
    torch.testing.assert_close(residual.double(), left, **CLOSE)
    mean = residual.sum(0) / 3
    ops.spread(residual, mean, some, squares)
    off = (left - mean) * some[:, None]
    expected = torch.stack([t.square().sum(1) for t in (error, off, aux_error)])
    torch.testing.assert_close(squares.double(), expected, **CLOSE)
