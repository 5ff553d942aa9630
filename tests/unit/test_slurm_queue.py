"""Which jobs of an earlier Snakemake are waited for."""

from pathlib import Path

import pytest

from sae_core.utils.errors import SAEError
from sae_core.workflow.slurm import wait_for_jobs

SQUEUE = """#!/bin/sh
echo asked >> {asked}
[ $(wc -l < {asked}) -gt 2 ] || cat << 'END'
7|rule_train_wildcards_a.blocks.1|{folder}
8|rule_train_wildcards_a.blocks.1|/elsewhere
9|rule_evaluate_wildcards_a.blocks.1|{folder}
10|(null)|{folder}
END
exit {status}
"""


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> Path:
    """A squeue that shows jobs twice; the file that it notes its calls in."""
    asked = folder / "asked"
    (folder / "squeue").write_text(SQUEUE.format(asked=asked, folder=folder, status=status))
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return asked


def test_jobs_of_the_same_rules_in_the_same_folder_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = squeue(tmp_path, monkeypatch)
    wait_for_jobs(tmp_path, ["train", "plot"], seconds=0.01)
    assert len(asked.read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("Waiting for the SLURM jobs 7, which an earlier") == 1


def test_a_squeue_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue(tmp_path, monkeypatch, status=1)
    with pytest.raises(SAEError, match="squeue: cannot tell which jobs"):
        wait_for_jobs(tmp_path, ["train"])


def test_without_slurm_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    wait_for_jobs(tmp_path, ["train"])
