"""Snakemake's console: a line per job with what it makes and how far the workflow is; what failed,
with its log and its error."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_core.workflow import job_lines
from sae_core.workflow.job_lines import JobLines, made

LOGGER = logging.getLogger("test_job_lines")


class Console:
    """What Snakemake's logger shows, fed with records like Snakemake's."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.done = 0
        own = logging.StreamHandler(self.stream)
        own.name = "DefaultStreamHandler"
        own.setFormatter(logging.Formatter("own: %(message)s"))
        LOGGER.addHandler(own)
        LOGGER.setLevel(logging.INFO)
        lines = JobLines.take_over(LOGGER, lambda: (self.done, 12))
        assert lines
        self.lines = lines

    def say(self, message: str, level: int = logging.INFO, **facts: Any) -> None:
        LOGGER.log(level, message, extra=facts)

    def job(self, event: str, number: int, output: list[str], log: list[str] | None = None) -> None:
        level = logging.ERROR if event == "job_error" else logging.INFO
        facts = {"jobid": number, "rule_name": "train", "output": output, "log": log or []}
        self.say("a record", level, event=event, **facts)

    @property
    def shown(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture
def console() -> Iterator[Console]:
    console = Console()
    yield console
    LOGGER.handlers.clear()


def test_a_job_is_one_line(console: Console) -> None:
    console.done = 3
    console.say("Select jobs to execute...")
    console.say("Execute 1 jobs...", event="job_started")
    console.job("job_info", 1, ["results/saes/r/weights.pt", "results/saes/r/config.json"])
    console.say("python train.py", event="shellcmd")
    console.say("Finished", event="job_finished", job_id=1)
    console.say("", event="progress")
    [line] = console.shown
    assert line.endswith(" 3 of 12 done   train      results/saes/r/*")


def test_what_makes_nothing_has_no_line(console: Console) -> None:
    console.job("job_info", 0, [])
    assert not console.shown


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (b"step 1\nerror: --x 1: wrong\nerror: --y 2: wrong\ntail\n\n", "error: --y 2: wrong"),
        (b"12%\r24%\nKilled \xff\n", "the log ends with: Killed \ufffd"),
        (b"", "the log ends with: nothing; if the disk is full, the reason is above"),
        (b"x" * 2**20 + b"\nerror: late\n", "error: late"),
        (None, "the log ends with: nothing; if the disk is full, the reason is above"),
    ],
)
def test_a_failure_has_its_log_and_its_error_and_is_repeated_at_the_end(
    log: bytes | None, reason: str, console: Console, tmp_path: Path
) -> None:
    path = tmp_path / "a.log"
    if log is not None:
        path.write_bytes(log)
    console.job("job_info", 1, ["a"], [str(path)])
    console.say("RuleException:\nCalledProcessError in file x", logging.ERROR, event="error")
    console.job("job_error", 1, ["a"], [str(path)])
    assert console.shown[1].endswith("Error in rule train: a")
    assert console.shown[2:] == [f"  log: {path}", f"  {reason}"]
    console.job("job_info", 2, ["b"])
    console.say("Exiting because a job execution failed. Look above", logging.ERROR)
    console.lines.end([])
    console.say("WorkflowError:\nAt least one job did not complete successfully.", logging.ERROR)
    assert console.shown[-4:] == ["1 failed:", "train a", f"  log: {path}", f"  {reason}"]


def test_a_job_that_succeeds_at_another_attempt_has_not_failed(console: Console) -> None:
    console.job("job_info", 1, ["a"])
    console.job("job_error", 1, ["a"])
    console.say("Trying to restart job 1.")
    assert console.shown[-1] == "  it is tried again"
    console.job("job_info", 1, ["a"])
    console.say("Finished", event="job_finished", job_id=1)
    console.done = 12
    console.lines.end(["snakemake.log"])
    assert "12 of 12 jobs done in 0 min" in console.shown[-1]


def test_what_the_user_has_to_mend_is_said_once_and_by_the_configurations_names(
    console: Console, tmp_path: Path
) -> None:
    path = tmp_path / "a.log"
    path.write_text("error: --folders a: no such folder; --output x stays\n")
    (tmp_path / "a.log.error").touch()
    for attempt in range(3):
        console.job("job_info", 1, ["a"], [str(path)])
        console.job("job_error", 1, ["a"], [str(path)])
        if attempt < 2:
            console.say("Trying to restart job 1.")
    reason = "  error: chapters.folders a: no such folder; --output x stays"
    assert console.shown[2:] == [f"  log: {path}", reason]
    console.lines.end(["snakemake.log"])
    assert console.shown[-4:] == ["1 failed:", "train a", f"  log: {path}", reason]


def test_what_else_is_said_stays(console: Console) -> None:
    console.say("Waiting at most 5 seconds for missing files.", logging.WARNING)
    console.say("Terminating processes on user request, this might take some time.")
    console.say("WorkflowError:\nAt least one job did not complete successfully.", logging.ERROR)
    assert [line.partition(" ")[0] for line in console.shown] == ["own:", "own:", "own:", "At"]


def test_the_last_lines_of_running_logs_are_shown_when_they_are_new(
    console: Console, tmp_path: Path
) -> None:
    logs = [tmp_path / f"{number}.log" for number in range(job_lines.MOST_SHOWN + 1)]
    for number, log in enumerate(logs):
        log.write_text(f"old\n{number} of 9 steps\n")
        console.job("job_info", number, [f"out{number}"], [str(log)])
    before = len(console.shown)
    console.lines.show_progress()
    console.lines.show_progress()
    shown = console.shown[before:]
    assert [line.partition("train: ")[2] for line in shown] == [
        f"{number} of 9 steps" for number in range(job_lines.MOST_SHOWN)
    ]
    logs[0].write_text("1 of 9 steps\n")
    console.say("Finished", event="job_finished", job_id=1)
    console.lines.show_progress()
    assert [line.partition("train: ")[2] for line in console.shown[before + 3 :]] == [
        "1 of 9 steps", "3 of 9 steps",
    ]  # fmt: skip


def test_the_place_of_a_plugin_is_not_taken() -> None:
    logger = logging.getLogger("test_job_lines.plugin")
    logger.addHandler(logging.StreamHandler(io.StringIO()))
    assert JobLines.take_over(logger, lambda: (0, 0)) is None and len(logger.handlers) == 1


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        ([], ""),
        (["results/a.json"], "results/a.json"),
        (["results/saes/r/w.pt", "results/saes/r/c.json"], "results/saes/r/*"),
        (["results/plots/r.a.svg", "results/plots/r.b.svg"], "results/plots/r.*"),
        (["results/s.csv", "results/plots/p.svg", "results/r.html"], "results/s.csv and 2 more"),
    ],
)
def test_outputs_in_short(paths: list[str], short: str) -> None:
    assert made(paths) == short
