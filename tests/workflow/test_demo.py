"""The embedded default, as `make run` runs it: a real language model, two SAEs, and what they
must reach."""

import csv
import json
from pathlib import Path

import pytest
from project import copy_project

pytestmark = pytest.mark.slow

L0_TOLERANCE = 0.1
LOSS_RECOVERED = 0.95


def test_the_demo_trains_good_saes(tmp_path: Path, root: Path) -> None:
    demo = copy_project(tmp_path / "demo", root, config="config/demo.yaml")
    demo.options = ("--cores", "1", "--retries", "0")  # the other core has other tests
    demo.snakemake()
    with (demo.folder / "results/summary.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["hook_spec"])
    assert [row["hook_spec"] for row in rows] == [
        "blocks.5.hook_resid_post",
        "blocks.9.hook_resid_post",
    ]
    for row in rows:
        assert abs(float(row["l0"]) - 32) <= L0_TOLERANCE * 32
        assert float(row["ce_clean"]) < float(row["ce_sae"]) < float(row["ce_mean_ablation"])
        run = row["run_name"]
        figures = json.loads((demo.folder / f"results/evaluations/{run}.json").read_text())
        assert figures["n_windows"] >= 10
    assert float(rows[0]["loss_recovered"]) > LOSS_RECOVERED
    assert "Nothing to be done" in demo.snakemake()
    demo.snakemake("--report", "report.html")
    report = (demo.folder / "report.html").read_text(encoding="utf-8")
    for word in (
        "loss curves", "feature density", "L0 against loss recovered",
        "L0 against FVU", "Training",
    ):  # fmt: skip
        assert word in report
