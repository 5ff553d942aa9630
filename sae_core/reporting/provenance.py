"""What a page says about how its results were made: settings, times, versions, and the commit."""

import csv
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from sae_core.utils.code_hash import ROOT

PACKAGES = ("torch", "transformers", "transformer-lens", "tokenizers", "numpy", "snakemake")
"""The packages whose versions may change a result."""


class Job(NamedTuple):
    """One job of the workflow, as Snakemake's benchmark file has it."""

    rule: str
    name: str
    """The rest of the file's name: an SAE, a model, or nothing."""
    seconds: float | None
    cpu_seconds: float | None
    megabytes: float | None
    """Most resident memory."""


class Environment(NamedTuple):
    """What the results were made with."""

    commit: str | None
    """The commit of this repository; with `+` if files differ from it."""
    python: str
    machine: str
    versions: dict[str, str]


def read_jobs(folder: Path, owners: Iterable[str]) -> list[Job]:
    """The benchmarks in `folder`, `<rule>.tsv` and `<rule>/<name>.tsv`, of these SAEs and models.

    Args:
        owners: run names and model ids; a job's name is one of them, or begins with one and a dot.
    """
    owners = tuple(owners)
    jobs = []
    for path in sorted(folder.glob("**/*.tsv")):
        rule, _, name = path.relative_to(folder).with_suffix("").as_posix().partition("/")
        if name and not any(f"{name}.".startswith(f"{owner}.") for owner in owners):
            continue
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        figures = rows[-1] if rows else {}
        keys = ("s", "cpu_time", "max_rss")
        jobs.append(Job(rule, name, *(_number(figures.get(key)) for key in keys)))
    return jobs


def environment() -> Environment:
    """This process's: the commit, Python, the machine and the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    machine = f"{platform.system()} {platform.machine()}"
    return Environment(commit(ROOT), platform.python_version(), machine, found)


def commit(folder: Path) -> str | None:
    """The commit that is checked out in `folder`, if it is a Git repository."""
    try:
        command = ["git", "-C", str(folder)]
        head = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
        )
    except OSError:  # no git
        return None
    if head.returncode or status.returncode:
        return None
    return head.stdout.strip() + ("+" if status.stdout else "")


def _number(text: str | None) -> float | None:
    """A cell of a benchmark file; Snakemake writes a dash or NA for what it could not measure."""
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
