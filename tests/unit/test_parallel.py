"""One training in several processes: the same result as in one, and an end in good order."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from preloaded import OF_OPTIMIZERS, forking_tools, run_preloaded
from running import ROOT
from shared_training import LEFT
from synthetic import KINDS, normal
from torch import Tensor

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.formats.checkpoint import load_sae
from sae_core.sae.precision import Precision
from sae_core.sae.sparse_code import SparseCode, Weights
from sae_core.sae.sparse_ops import batch_topk
from sae_core.utils.errors import SAEError

TOOL = "tests/tools/shared_training.py"
IMPORTS = (
    *("sae_core.sae_train", "sae_core.distributed.torchrun", "synthetic", OF_OPTIMIZERS),
    *("transformers.models.qwen3.modeling_qwen3", "torch.distributed.launcher.api"),
)
NAMES = [*KINDS, "transcoder", "end_to_end"]


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
    folders = {n: root / str(n) for n in (1, 3)}
    for n, folder in folders.items():
        done = run(folder, *options, "--gpus", n)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done") == 1 and LEFT not in done.stderr
    return folders


@pytest.mark.xdist_group("parallel")
@pytest.mark.parametrize("name", NAMES)
def test_several_processes_train_what_one_does(name: str, trained: dict[int, Path]) -> None:
    one, several = (load_sae(folder / name) for folder in trained.values())
    for tensor, expected in one.tensors().items():
        torch.testing.assert_close(
            several.tensors()[tensor], expected, rtol=1e-3, atol=2e-4, msg=f"{name}: {tensor}"
        )
    histories = [
        json.loads((folder / name / "history.json").read_text()) for folder in trained.values()
    ]
    assert histories[0].keys() == histories[1].keys()
    for column, values in histories[0].items():
        there = [(a, b) for a, b in zip(values, histories[1][column], strict=True) if a is not None]
        expected, found = zip(*there, strict=True)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), column
    assert max(histories[0]["dead_features"]) > 0 or name in ("standard", "gated", "jumprelu")


@pytest.mark.xdist_group("parallel")
def test_interrupted_together_they_go_on_to_the_same_bytes(
    options: list[object], trained: dict[int, Path], tmp_path: Path
) -> None:
    command = (tmp_path, *options, "--gpus", 3, "--first-only")
    stopped = run(*command, "--stop-at", 5)
    assert stopped.returncode == os.EX_TEMPFAIL
    assert stopped.stderr.count(" steps; run it again") == 1, "the first process alone says it"
    assert "Traceback" not in stopped.stderr and LEFT not in stopped.stderr
    [state] = (tmp_path / f"{KINDS[0]}.points" / "resume").glob("*/state.json")
    assert json.loads(state.read_text())["values"]["progress"]["n_done"] >= 5
    done = run(*command)
    assert done.returncode == 0, done.stderr
    for name in ("weights.pt", "history.json"):
        found, expected = (root / KINDS[0] / name for root in (tmp_path, trained[3]))
        assert found.read_bytes() == expected.read_bytes()


@pytest.mark.xdist_group("parallel")
def test_one_that_fails_ends_all(options: list[object], tmp_path: Path) -> None:
    done = run(tmp_path, *options, "--gpus", 2, "--fail")
    assert done.returncode == 1
    assert "error: the second process has failed" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 10


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
    common: dict[str, Any] = {"given": [None] * 3, "barrier": Barrier(3), "sizes": set()}

    def of(rank: int) -> SparseCode:
        rows = slice(*((0, 7), (7, 8), (8, 13))[rank])
        group = InThreads(rank, 3, common)
        given = {"lower_bound": bound, "precision": precision, "group": group}
        return batch_topk(x[rows], weights, 65, **given)  # type: ignore[arg-type]

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(of, range(3)))
    dense, [least] = torch.cat([code.to_dense() for code in found]), {code.least for code in found}
    assert torch.equal(dense > 0, right.to_dense() > 0) and least == pytest.approx(right.least)
    torch.testing.assert_close(dense, right.to_dense())
    assert len(right.value) == 65 or case == "few"
    assert common["sizes"] <= {2**15, 2**16, 3}
