"""The benchmarks run; what they find is not tested."""

from pathlib import Path

import pytest
from running import Run

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


@pytest.mark.parametrize(("part", "n_rows"), [("bytes", 6), ("steps", 8)])
def test_gpu(part: str, n_rows: int, run: Run, root: Path) -> None:
    """Small shapes on a CPU, so that it does not fail where it is run for the first time."""
    printed = run(
        *("tests/benchmarks/gpu.py", "--tiny", "--only", part), env={"PYTHONPATH": str(root)}
    ).stdout
    tables = [text for text in printed.split("\n\n") if text.startswith("| ")]
    assert sum(len(text.splitlines()) - 2 for text in tables) == n_rows
    assert "failed" not in printed
