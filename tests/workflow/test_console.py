"""What `make run` and Snakemake show, and the report of the last run."""

import importlib.util
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from project import Project
from running import ROOT


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with the Makefile, in whose environment programs are stand-ins: `python` waits for
    a file `go`, `snakemake` leaves the table."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name, script in (
        ("python", "until test -e go; do sleep 0.05; done"),
        ("snakemake", "mkdir -p results/logs && echo the table > results/logs/summarise.log"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    for name in ("requirements.txt", "requirements-dev.txt", ".venv/.installed"):
        (tmp_path / name).touch()
    return tmp_path


def test_make_run_speaks_before_python_starts_and_ends_with_the_table(made: Path) -> None:
    # Not as a part of the `make` that runs the tests.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    process = subprocess.Popen(
        ["make", "run"],
        cwd=made,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), True)
        assert "config/demo.yaml" in process.stdout.readline()
        (made / "go").touch()
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "the table\n" in rest


@pytest.mark.xdist_group("completed")
def test_each_job_of_a_run_was_one_line(completed: Project) -> None:
    lines = completed.printed[0].splitlines()
    jobs = [m for line in lines if (m := re.match(r"\S+ +(\d+) of \d+ done   (\w+) +\S+", line))]
    assert [int(m[1]) for m in jobs] == sorted(int(m[1]) for m in jobs)
    rules = [m[2] for m in jobs]
    assert rules.count("train") == rules.count("evaluate") == 4
    assert "evaluate" not in rules[rules.index("summarise") :]
    assert len(lines) < len(jobs) + 40
    assert re.search(r"(\d+) of \1 jobs done in", lines[-1])


@pytest.mark.xdist_group("completed")
def test_the_report_in_the_readme_is_of_the_last_run(completed: Project) -> None:
    """Which is not what config/config.yaml says."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^snakemake (.*--report \S+)", readme, re.MULTILINE)
    assert command
    *options, _, file = command[1].split()
    plain = Project(completed.folder, options[options.index("--configfile") + 1])
    plain.snakemake("--report", file)
    with zipfile.ZipFile(completed.folder / file) as archive:
        names = " ".join(archive.namelist())
        text = archive.read(next(n for n in archive.namelist() if n.endswith("/report.html")))
    (completed.folder / file).unlink()
    assert b"tiny.blocks.2.hook_resid_post.btop4sae" in text + names.encode()


@pytest.mark.skipif(
    importlib.util.find_spec("snakemake_logger_plugin_rich") is None,
    reason="needs snakemake-logger-plugin-rich",
)
def test_the_rich_console_lists_the_jobs(project: Project) -> None:
    project.environment["NO_COLOR"] = "1"
    printed = project.snakemake("--dry-run", "--logger", "rich")
    assert "process" in printed and "fetch" in printed and "Job stats" in printed
    assert "\x1b[" not in printed
