"""One training in several processes: the same result as in one, and an end in good order."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock
from typing import Any, TypeVar

import pytest
import torch
from preloaded import OF_OPTIMIZERS, forking_tools, run_preloaded
from running import ROOT
from shared_training import LEFT
from synthetic import KINDS, normal
from torch import Tensor

from sae_core.distributed.interrupts import Interrupts
from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.formats.checkpoint import load_sae
from sae_core.sae.precision import Precision
from sae_core.sae.sparse_code import SparseCode, Weights
from sae_core.sae.sparse_ops import batch_topk
from sae_core.sae.static import launching
from sae_core.sae.static.backend import TWIN, Backend, kernels
from sae_core.sae.static.pairs import Slots, refine
from sae_core.trainer import ahead
from sae_core.utils.errors import Interrupted, SAEError

Result = TypeVar("Result")

TOOL = "tests/tools/shared_training.py"
IMPORTS = (
    *("sae_core.sae_train", "sae_core.distributed.torchrun", "sae_core.utils.cli"),
    *("synthetic", "hashed_code", OF_OPTIMIZERS),
    *("transformers.models.qwen3.modeling_qwen3", "torch.distributed.launcher.api"),
)
OTHERS = ["not_finite", "transcoder", "end_to_end", "end_to_end_sample"]
NAMES = [*KINDS, *OTHERS]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tool. Its processes fork, each from one with the imports done."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    python = forking_tools(IMPORTS)
    return run_preloaded(IMPORTS, TOOL, *arguments, cwd=ROOT, env=env, executable=python)


@pytest.fixture(scope="module")
def options(
    tiny_model: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[object]:
    data = tmp_path_factory.mktemp("data") / "texts.json"
    data.write_text(json.dumps(texts))
    return ["--model", tiny_model, "--texts", data]


@pytest.fixture(scope="module")
def trained(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The SAEs that 1 and 3 processes train, by how many."""
    root = tmp_path_factory.mktemp("shared")
    return {n: finished(root / str(n), *options, "--gpus", n) for n in (1, 3)}


@pytest.fixture(scope="module")
def trained_as_on_gpus(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SAEs with a top-k that 2 processes train, in steps of fixed sizes."""
    folder = tmp_path_factory.mktemp("shared") / "static"
    return finished(folder, *options, "--gpus", 2, "--static")


def finished(folder: Path, *arguments: object) -> Path:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 1 and LEFT not in done.stderr
    return folder


@pytest.mark.xdist_group("parallel")
@pytest.mark.parametrize("name", NAMES)
def test_several_processes_train_what_one_does(name: str, trained: dict[int, Path]) -> None:
    assert_alike(name, trained[1], trained[3])


@pytest.mark.xdist_group("parallel")
@pytest.mark.parametrize("name", [*ahead.KINDS, *OTHERS])
def test_in_steps_of_fixed_sizes_they_do_too(
    name: str, trained: dict[int, Path], trained_as_on_gpus: Path
) -> None:
    assert_alike(name, trained[1], trained_as_on_gpus)


def assert_alike(name: str, *folders: Path) -> None:
    one, several = (load_sae(folder / name) for folder in folders)
    for tensor, expected in one.tensors().items():
        torch.testing.assert_close(
            several.tensors()[tensor], expected, rtol=1e-3, atol=2e-4, msg=f"{name}: {tensor}"
        )
    histories = [json.loads((folder / name / "history.json").read_text()) for folder in folders]
    assert histories[0].keys() == histories[1].keys()
    for column, values in histories[0].items():
        there = [(a, b) for a, b in zip(values, histories[1][column], strict=True) if a is not None]
        expected, found = zip(*there, strict=True)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), column
    assert max(histories[0]["dead_features"]) > 0 or name in ("standard", "gated", "jumprelu")


@pytest.mark.xdist_group("parallel")
@pytest.mark.parametrize("static", [False, True], ids=["ordinary", "of fixed sizes"])
def test_interrupted_together_they_go_on_to_the_same_bytes(
    static: bool,
    options: list[object],
    trained: dict[int, Path],
    trained_as_on_gpus: Path,
    tmp_path: Path,
) -> None:
    how = ("--gpus", 2, "--static") if static else ("--gpus", 3)
    whole = trained_as_on_gpus if static else trained[3]
    command = (tmp_path, *options, *how, "--first-only")
    stopped = run(*command, "--stop-at", 5)
    assert stopped.returncode == os.EX_TEMPFAIL
    assert stopped.stderr.count(" steps; run it again") == 1, "the first process alone says it"
    assert "Traceback" not in stopped.stderr and LEFT not in stopped.stderr
    [state] = (tmp_path / f"{KINDS[0]}.points" / "resume").glob("*/state.json")
    assert json.loads(state.read_text())["values"]["progress"]["n_done"] >= 5
    done = run(*command)
    assert done.returncode == 0, done.stderr
    for name in ("weights.pt", "history.json"):
        found, expected = (root / KINDS[0] / name for root in (tmp_path, whole))
        assert found.read_bytes() == expected.read_bytes()


@pytest.mark.xdist_group("parallel")
def test_one_that_fails_ends_all(options: list[object], tmp_path: Path) -> None:
    done = run(tmp_path, *options, "--gpus", 2, "--fail")
    assert done.returncode == 1
    assert "error: the second process has failed" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 10


def test_they_ask_each_other_for_signals_where_all_may_end() -> None:
    class Asked(ProcessGroup):
        times = 0

        def max(self, n: int) -> int:
            self.times += 1
            return n

    group = Asked(0, 2)
    with pytest.raises(Interrupted, match="SIGTERM"), Interrupts(group) as it:
        with it.deferred(lambda: False):
            os.kill(os.getpid(), signal.SIGTERM)
        assert group.times == 0
        with it.deferred(lambda: True):
            pass
    assert group.times == 1


def test_more_processes_than_tokens_is_an_error() -> None:
    with pytest.raises(SAEError, match="--gpus"):
        ProcessGroup(1, 4).shard(3)


def test_alone_a_process_has_everything() -> None:
    x = torch.arange(5.0)
    assert SINGLE_PROCESS.shard(5) == slice(0, 5) and SINGLE_PROCESS.total(3) == 3
    assert SINGLE_PROCESS.all_reduce(x) is x and SINGLE_PROCESS.all_gather(x) == [x]


class InThreads(ProcessGroup):
    """As many processes, in threads, and how many numbers each of their messages has."""

    def __init__(self, rank: int, size: int, common: dict[str, Any]) -> None:
        super().__init__(rank, size)
        self.common = common

    def all_reduce(self, x: Tensor) -> Tensor:
        self.common["given"][self.rank] = x
        self.common["barrier"].wait(timeout=60)
        total = torch.stack(self.common["given"]).sum(0, dtype=x.dtype)
        self.common["sizes"].add(x.numel())
        self.common["barrier"].wait(timeout=60)
        return total

    def all_gather(self, x: Tensor) -> list[Tensor]:
        raise AssertionError("the numbers themselves are exchanged")


SHARES = slice(0, 7), slice(7, 8), slice(8, 13)
"""The tokens of three processes."""


def in_threads(work: Callable[[slice, ProcessGroup], Result]) -> tuple[list[Result], set[int]]:
    """What each of three processes makes of its tokens, and the sizes of their messages."""
    common: dict[str, Any] = {"given": [None] * 3, "barrier": Barrier(3), "sizes": set()}
    with ThreadPoolExecutor(3) as threads:
        groups = [InThreads(rank, 3, common) for rank in range(3)]
        return list(threads.map(work, SHARES, groups)), common["sizes"]


@pytest.mark.parametrize("precision", [None, Precision(torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("case", "bound"), [("reals", 0.5), ("ties", 0.5), ("few", 0.0)])
def test_a_top_k_of_all_processes_exchanges_counts(
    case: str, bound: float, precision: Precision | None
) -> None:
    """Three processes with 7, 1 and 5 tokens find what one finds, ties to the earlier."""
    x, W = normal(13, 6).float(), normal(40, 6, seed=2).float()
    if case == "ties":
        x, W = x.round(), W.round()
    b_enc = torch.full((40,), -6.0 if case == "few" else 0.0)
    weights = Weights(W.T, b_enc, W, torch.zeros(6))
    right = batch_topk(x, weights, 65, lower_bound=bound, precision=precision)

    def of(rows: slice, group: ProcessGroup) -> SparseCode:
        given = {"lower_bound": bound, "precision": precision, "group": group}
        return batch_topk(x[rows], weights, 65, **given)  # type: ignore[arg-type]

    found, sizes = in_threads(of)
    dense, [least] = torch.cat([code.to_dense() for code in found]), {code.least for code in found}
    assert torch.equal(dense > 0, right.to_dense() > 0) and least == pytest.approx(right.least)
    torch.testing.assert_close(dense, right.to_dense())
    assert len(right.value) == 65 or case == "few"
    assert sizes <= {2**15, 2**16, 3}


@pytest.mark.parametrize("ops", [kernels(), TWIN], ids=["kernels", "twin"])
@pytest.mark.parametrize("exact", [False, True], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("case", ["reals", "ties", "few", "none wanted"])
def test_a_top_k_of_fixed_sizes_does_so_too(
    case: str, exact: bool, ops: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes keep what one keeps, ties to the earlier, some tokens and features left out."""
    launch, one_at_a_time = launching.launch, Lock()  # as Triton's interpreter needs it

    def launch_alone(*args: Any, **constants: Any) -> None:
        with one_at_a_time:
            launch(*args, **constants)

    monkeypatch.setattr(launching, "launch", launch_alone)
    pre = (normal(13, 40) - (1.5 if case == "few" else 0)).bfloat16()
    if case == "ties":
        pre = pre.float().round().bfloat16()
    rows, columns = torch.arange(13) % 5 > 0, torch.arange(40) % 7 > 0
    total = torch.tensor(0 if case == "none wanted" else 65, dtype=torch.int32)
    values = pre.float() + 0.01 * (normal(13, 40, seed=3).float().round() if exact else 0)

    def of(part: slice, group: ProcessGroup) -> Slots:
        floor = torch.tensor(16000, dtype=torch.int32)
        many = (2 * total, 2 * 65) if exact else (total, 65)
        found = ops.select(pre[part], rows[part], columns, *many, floor, group)
        if not exact:
            return found
        own = values[part][found.row.long(), found.column.clamp(max=39).long()]
        own = torch.where(found.column < 40, own.clamp(min=0), 0)
        return refine(found, own, total, 65, 40, group)

    right = of(slice(0, 13), SINGLE_PROCESS)
    found, sizes = in_threads(of)
    n = [int(each.n_pairs) for each in found]
    assert sum(n) == right.n_pairs and (sum(n) == int(total) or case == "few")
    for at, offset in ((0, (0, 7, 8)), (1, (0, 0, 0)), (2, (0, 0, 0))):
        parts = [each[at][:m] + o for each, m, o in zip(found, n, offset, strict=True)]
        assert torch.equal(torch.cat(parts), right[at][: sum(n)])
    assert total == 0 or {float(each.least) for each in found} == {float(right.least)}
    assert sizes <= {1, 3, 2**15, 2**16}
