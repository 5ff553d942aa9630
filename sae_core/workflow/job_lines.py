"""Snakemake's console as lines that people read: one per job, with what it makes and how far the
workflow is; from time to time the last line of a running job's log; and what failed, with its log
and its error, where it fails and again at the end.

Snakemake's records arrive as they do at its logger plugins. A plugin would have to be installed
together with Snakemake; this module ships with the workflow.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from sae_core.utils.attempts import is_final
from sae_core.workflow.config_words import in_config_words

BEAT_SECONDS = 60.0
"""Between two looks at the logs of the jobs that run."""

MOST_SHOWN = 3
"""Running jobs whose logs are looked at."""

TAIL = 2**14
"""Bytes at the end of a log that are looked at."""

SILENT = ("job_finished", "job_started", "progress", "resources_info", "run_info", "shellcmd")
"""Events that add nothing to the lines of the jobs."""

CHATTER = (
    "Select jobs to execute",
    "DAG of jobs will be updated",
    "Updating checkpoint dependencies",
    "Removing output files of failed job",
    "Complete log",
    "Elapsed time",
)
"""Beginnings of messages that are none either."""

FINAL = ("Exiting because a job execution failed", "At least one job did not complete")
"""What Snakemake says about failed jobs, each of which already has its own line."""

RETRY = "Trying to restart job"


class Job(NamedTuple):
    """A job that runs or has failed."""

    rule: str
    made: str
    logs: tuple[str, ...]

    def line(self) -> str:
        return f"{self.rule:10} {self.made}"


class JobLines(logging.Handler):
    """Writes the lines.

    Args:
        stream: where they go.
        counts: how many jobs are done, and how many there are.
        others: how a record that is not about a job is written.
    """

    def __init__(
        self, stream: TextIO, counts: Callable[[], tuple[int, int]], others: logging.Formatter
    ) -> None:
        super().__init__()
        self.stream, self.counts = stream, counts
        self.final: set[int] = set()
        """The failed jobs whose further attempts end at once."""
        self.setFormatter(others)
        self.running: dict[int, Job] = {}
        self.failed: dict[int, Job] = {}
        self.seen: dict[int, str] = {}
        """The last line of a running job's log that was shown."""
        self._start = time.monotonic()
        self._over = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = str(getattr(record, "event", None) or "")
            if event == "job_info":
                self._begin(record)
            elif event == "job_error":
                self._fail(record)
            elif event == "job_finished":
                self._forget(record.__dict__["job_id"])
            elif event not in SILENT:
                self._other(record)
        except Exception:
            self.handleError(record)

    @classmethod
    def take_over(
        cls, logger: logging.Logger, counts: Callable[[], tuple[int, int]]
    ) -> "JobLines | None":
        """Replace Snakemake's own console; None if a plugin has already replaced it."""
        own = next((h for h in logger.handlers if h.name == "DefaultStreamHandler"), None)
        if not isinstance(own, logging.StreamHandler) or own.formatter is None:
            return None
        lines = cls(own.stream, counts, own.formatter)
        for wanted in own.filters:  # --quiet
            lines.addFilter(wanted)
        logger.removeHandler(own)
        logger.addHandler(lines)
        threading.Thread(target=lines._beat, daemon=True).start()
        return lines

    def _begin(self, record: logging.LogRecord) -> None:
        job = _job(record)
        if not job.made or record.__dict__["jobid"] in self.final:  # `all` makes nothing
            return
        self._forget(record.__dict__["jobid"])
        self.running[record.__dict__["jobid"]] = job
        done, total = self.counts()
        self._say(f"{done:{len(str(total))}} of {total} done   {job.line()}")

    def _fail(self, record: logging.LogRecord) -> None:
        job = _job(record)
        if record.__dict__["jobid"] in self.final:
            return
        if is_final(job.logs):
            self.final.add(record.__dict__["jobid"])
        self._forget(record.__dict__["jobid"])
        self.failed[record.__dict__["jobid"]] = job
        self._say(f"Error in rule {job.rule}: {job.made}")
        self._write(_reason(job.logs))

    def _forget(self, number: int) -> None:
        for jobs in (self.running, self.failed, self.seen):
            jobs.pop(number, None)

    def _other(self, record: logging.LogRecord) -> None:
        message = str(record.msg or "")
        silent = CHATTER + (FINAL if self.failed else ())
        if message.startswith(RETRY):
            if int(message.removeprefix(RETRY).strip(" .")) not in self.final:
                self._write("  it is tried again")
        elif "CalledProcessError in file" not in message and not any(
            line.startswith(silent) for line in message.split("\n")
        ):
            if text := self.format(record):
                self._write(text)

    def _beat(self) -> None:
        """Show from time to time, in the background, how far the jobs are."""
        while not self._over.wait(BEAT_SECONDS):
            assert self.lock is not None
            with self.lock:
                self.show_progress()

    def show_progress(self) -> None:
        """The last log lines of the jobs that have run longest, if these lines are new."""
        for number, job in list(self.running.items())[:MOST_SHOWN]:
            line = _last_line(job.logs)
            if line and line != self.seen.get(number):
                self.seen[number] = line
                self._say(f"  {job.rule}: {line}")

    def end(self, snakemake_logs: Sequence[str]) -> None:
        """The last lines: how long it took, and what failed.

        Args:
            snakemake_logs: where Snakemake's own records are.
        """
        self._over.set()
        done, total = self.counts()
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        self._say(f"{done} of {total} jobs done in {minutes} min {seconds:02} s")
        if self.failed:
            self._write(f"Snakemake's own log: {', '.join(map(os.path.relpath, snakemake_logs))}")
            self._write(f"{len(self.failed)} failed:")
        for job in self.failed.values():
            self._write(f"{job.rule} {job.made}\n{_reason(job.logs)}")

    def _say(self, line: str) -> None:
        self._write(f"{time.strftime('%H:%M:%S')}  {line}")

    def _write(self, text: str) -> None:
        self.stream.write(f"{text}\n")
        self.stream.flush()


def _job(record: logging.LogRecord) -> Job:
    found = record.__dict__
    return Job(found["rule_name"], made(found["output"]), tuple(found["log"]))


def made(paths: Sequence[str]) -> str:
    """What a job makes, in short: its output, what its outputs have in common if that is more than
    a folder of everything, or the first of them and how many more."""
    if len(paths) < 2:
        return "".join(paths)
    common = os.path.commonprefix(list(paths))
    common = common[: max(common.rfind("/"), common.rfind(".")) + 1]
    if common.count("/") > 1:
        return f"{common}*"
    return f"{paths[0]} and {len(paths) - 1} more"


def _reason(logs: Sequence[str]) -> str:
    """Where a failed job's log is, and its error, or else how the log ends."""
    lines = _lines(logs)
    error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if error is None:
        last = next(iter(lines[-1:]), "nothing; if the disk is full, the reason is above")
        error = f"the log ends with: {last}"
    return f"  log: {', '.join(logs) or 'none'}\n  {in_config_words(error)}"


def _last_line(logs: Sequence[str]) -> str:
    return next(iter(_lines(logs)[-1:]), "")


def _lines(logs: Sequence[str]) -> list[str]:
    """The last lines of a job's logs that are not empty."""
    found: list[str] = []
    for log in logs:
        try:
            with Path(log).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
                text = file.read(TAIL).decode(errors="replace")
        except OSError:
            continue
        found += [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return found
