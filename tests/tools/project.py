"""A copy of the project with a tiny model and short chapters, and what Snakemake would do in it."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from preloaded import forking_python, run_preloaded

PARTS = ("sae_core", "scripts", "workflow", "envs", "config")
MADE = ("__pycache__", "processed_data", "pretrained_models", "checkpoints")
"""What runs leave in these folders."""

SUBJECTS = ("physics", "chemistry", "biology")
WORDS_A_CHAPTER = 350
TIMEOUT = 1800
"""Seconds that a run of the workflow may take."""

PLANS_ONLY = {"--dry-run", "--containerize"}
"""Options with which Snakemake runs no job."""

OF_PLANNING = (
    *("snakemake.cli", "snakemake.report.html_reporter", "docutils.parsers.rst.directives.images"),
    *("jsonschema", "rich.live", "rich.markdown", "rich.progress", "smart_open", "tyro"),
)
"""What Snakemake imports to plan the jobs of the workflow, apart from the project itself."""

JOB = re.compile(r"^(?:local)?(?:rule|checkpoint) (\w+):$")


@dataclass
class Jobs:
    """What a dry run would do."""

    rules: Counter[str]
    runs: dict[str, set[str]]
    """By rule, the SAEs it would run for, shortened to `<layer>.k<topk>`."""


@dataclass
class Project:
    """A copy of the project in a folder of its own."""

    folder: Path
    config_file: str = "config/tiny.yaml"
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of its runs."""
    printed: list[str] = field(default_factory=list)
    """What each run printed."""
    options: tuple[str, ...] = ("--cores", "2", "--retries", "0")
    """What each of its runs is given; a failing job is not tried again."""
    python: str | None = None
    """The folder of a `python` for its jobs, see preloaded.py; None for the usual one."""

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / self.config_file).read_text())

    def configure(self, config: dict[str, Any]) -> None:
        (self.folder / self.config_file).write_text(yaml.safe_dump(config, sort_keys=False))

    def snakemake(self, *arguments: str, ok: bool | None = True) -> str:
        """Run Snakemake here and return all that it printed."""
        if PLANS_ONLY & set(arguments):
            done = run_preloaded(
                OF_PLANNING, *self.command(*arguments)[1:], cwd=self.folder,
                env=self.variables(),
            )  # fmt: skip
            status, printed = done.returncode, done.stderr + done.stdout
        else:
            process = self.start(*arguments)
            try:
                printed, _ = process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
            status = process.returncode
        self.printed.append(printed)
        assert ok is None or (status == 0) == ok, printed
        return printed

    def start(
        self, *arguments: str, stdout: int | IO[str] = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Start Snakemake here."""
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.variables(),
        )

    def command(self, *arguments: str) -> list[str]:
        """Snakemake's command line."""
        command = [sys.executable, "-m", "snakemake", "--configfile", self.config_file]
        return [*command, *self.options, *arguments]

    def variables(self) -> dict[str, str]:
        """The environment of its runs."""
        found = {**os.environ, **self.environment}
        folders = [self.python, str(Path(sys.executable).parent), found["PATH"]]
        return {**found, "PATH": ":".join(filter(None, folders))}

    def planned(self, *arguments: str) -> Jobs:
        """The jobs of a dry run."""
        jobs = Jobs(Counter(), {})
        rule = ""
        for line in self.snakemake("--dry-run", *arguments).splitlines():
            if found := JOB.match(line):
                rule = found[1]
                jobs.rules[rule] += 1
            elif rule and (found := re.match(r"    wildcards: .*run=(\S+?)(,|$)", line)):
                layer, k = re.search(r"blocks\.(\d+)\..*top(\d+)sae", found[1]).groups()
                jobs.runs.setdefault(rule, set()).add(f"{layer}.k{k}")
        return jobs


def copy_project(folder: Path, root: Path, config: str) -> Project:
    """A copy of the project as it is."""
    for part in PARTS:
        shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns(*MADE))
    return Project(folder, config)


def make_project(folder: Path, root: Path, tiny_model: Path) -> Project:
    """A copy of the project with short chapters and a configuration for the tiny model. Its jobs
    fork from a process with the imports done."""
    project = copy_project(folder, root, "config/tiny.yaml")
    project.python = forking_python()
    for subject in SUBJECTS:
        chapters = folder / f"sae_core/data/raw_data/{subject}_chapters"
        for chapter in chapters.glob("*.md"):
            words = chapter.read_text(encoding="utf-8").split(" ")
            chapter.write_text(" ".join(words[:WORDS_A_CHAPTER]))
    project.configure(
        {
            "chapters": {"folders": {s: f"sae_core/data/raw_data/{s}_chapters" for s in SUBJECTS}},
            "windows": {"max_text_length": 32, "val_fraction": 0.2},
            "sae": {"sae_expansion": 2},
            "training": {"num_epochs": 2, "tokens_per_step": 256},
            "runtime": {"device": "cpu"},
            "models": [
                {
                    "name": "tiny",
                    "source": {"path": str(tiny_model)},
                    "layers": [2, "middle"],
                    "saes": [{"topk": 4}, {"topk": 8}],
                }
            ],
        }
    )
    return project


def make_copy(project: Project, folder: Path) -> Project:
    """A copy of a project with all that its runs have made: nothing is to be done in it either."""
    shutil.copytree(project.folder, folder, symlinks=True)
    return Project(folder, project.config_file, python=project.python)
