"""The benchmarks run; what they find is not tested."""

from pathlib import Path

import pytest
import torch
from running import Run
from tiny_model import VOCABULARY, configuration
from transformers import AutoModelForCausalLM

from sae_core.activations.shards import harvest
from sae_core.activations.token_windows import TokenWindows
from sae_core.models.language_model import Hook, LanguageModel

pytestmark = pytest.mark.slow


def test_end_to_end(run: Run, root: Path, tiny_model: Path) -> None:
    printed = run(
        *("tests/benchmarks/end_to_end.py", "--model", tiny_model, "--layer", 1),
        *("--chapters", root / "sae_core/data/raw_data", "--tokens", 2000),
        *("--tokens-per-step", 256, "--length", 32, "--topk", 4, "--expansion", 2),
        *("--max-windows", 4),
        env={"PYTHONPATH": str(root)},
    ).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == [
        "| end-to-end", "| none", "| last 0.1", "| every step"
    ]  # fmt: skip
    tokens = [int(row.split(" | ")[1].replace(",", "")) for row in rows[1:]]
    assert max(tokens) < 1.03 * min(tokens), "equal but for whole windows and outliers"


def test_streams(run: Run, root: Path, tiny_model: Path) -> None:
    printed = run(
        *("tests/benchmarks/streams.py", "--model", tiny_model, "--layers", 1, 2),
        *("--options", " --sae-expansion 2 --max-text-length 32 --device cpu"),
        env={"PYTHONPATH": str(root)},
    ).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[:2] for row in rows] == [["| 1", "2"], ["| 3", "2"], ["| 6", "1, 2"]]


@pytest.mark.parametrize(("part", "n_rows"), [("bytes", 5), ("steps", 6)])
def test_gpu(part: str, n_rows: int, run: Run, root: Path) -> None:
    """Small shapes on a CPU, so that it does not fail where it is run for the first time."""
    printed = run(
        *("tests/benchmarks/gpu_steps.py", "--tiny", "--only", part), env={"PYTHONPATH": str(root)}
    ).stdout
    tables = [text for text in printed.split("\n\n") if text.startswith("| ")]
    assert sum(len(text.splitlines()) - 2 for text in tables) == n_rows
    assert "failed" not in printed


def test_corpus(run: Run, root: Path, tiny_model: Path) -> None:
    printed = run(
        *("tests/benchmarks/corpus.py", "--model", tiny_model, "--tokens", 2e4, 4e4),
        env={"PYTHONPATH": str(root)},
    ).stdout
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    n_tokens = [int(row[0].strip("| ").replace(",", "")) for row in rows]
    assert len(rows) == 2 and 1.5 < n_tokens[1] / n_tokens[0] < 2.5
    assert all(len(row) == 11 and float(row[8]) > 10 for row in rows), "megabytes"


def test_fine_tuning(run: Run, root: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (6000,), generator=draw)
    model = LanguageModel(AutoModelForCausalLM.from_config(configuration("qwen3")), tokenizer=None)
    harvest(
        model, TokenWindows(tokens[:5000], tokens[5000:], 24, seed=0),
        [Hook(1, "hook_resid_post")], tmp_path / "shard", batch_size=8,
    )  # fmt: skip
    printed = run(
        *("tests/benchmarks/fine_tuning.py", tmp_path / "shard", "--topk", 4, "--expansion", 2),
        *("--hook", "blocks.1.hook_resid_post", "--tokens", 1000, "--rates", 1e-5, 0.5),
        env={"PYTHONPATH": str(root)},
    ).stdout
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 2 and all(float(row[-1].strip("| ")) < 1.01 for row in rows)
