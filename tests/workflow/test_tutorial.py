"""The tutorial notebook, run on the results of a workflow."""

import math
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from project import Project
from running import ROOT

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def run_cells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the notebook's cells in a folder; the names that they leave."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with torch.enable_grad():  # the notebook turns gradients off
        for number, cell in enumerate(nbformat.read(NOTEBOOK, as_version=4).cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
    return names


def test_the_notebook_is_one_and_holds_no_output() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [c for c in notebook.cells if c.cell_type == "code" and c.outputs]


@pytest.mark.slow
@pytest.mark.xdist_group("completed")
def test_the_notebook_runs(
    completed: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (completed.folder / "docs").mkdir(exist_ok=True)
    names = run_cells(completed.folder / "docs", monkeypatch)
    printed = capsys.readouterr().out
    assert all(row["run_name"] in printed for row in names["table"])
    k = names["sae"].spec.top_k
    assert k / 2 < names["active"].mean() < 2 * k, "the SAE was trained for this L0"
    assert 0 < names["fvu"] < 1.5 and math.isfinite(names["recovered"])
    spliced = names["spliced"](names["x"])
    torch.testing.assert_close(spliced, names["logits"], msg="what was there changes nothing")
    torch.testing.assert_close(
        names["again"], names["spliced"](names["x_hat"]), atol=1e-3, rtol=1e-3
    )
    assert len(names["steered"]) == 3
    assert names["change"][names["where"]].mean() > 0
    (completed.folder / "docs").rmdir()
