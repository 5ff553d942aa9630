"""Runs of Weights & Biases: logging in, starting or resuming one, finishing it. No torch here.

W&B never stops or slows the work. Only a key that is missing or wrong, or a run that W&B refuses,
is an error, and before anything is loaded. If W&B cannot be reached, the run is stored on disk,
and one line says how to send it later.

The run of a training is noted next to its checkpoints, so that it continues when the training is
restarted after an interruption, and so that evaluation and upload, which may be other
processes, can add to its summary.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sae_core.model_training.wandb_exit import bound_exit, end_client, killed_after
from sae_core.settings.services import TrackingConfig
from sae_core.utils.errors import SAEError, one_line
from sae_core.utils.files import write_file
from sae_core.utils.naming import WANDB_NOTE
from sae_core.utils.ranks import is_follower
from sae_core.utils.records import read_record

# W&B's client reports on itself to its server, and at exit tries that for long and loudly.
os.environ.setdefault("OTEL_SDK_DISABLED", "true")

LOGIN_TIMEOUT = 2
"""Seconds that W&B has to say whether the key is right, a whole number for the client; a
`WANDB_HTTP_TIMEOUT` in the environment takes precedence. After that the run is stored on disk."""

START_TIMEOUT = 2.6
"""Seconds that W&B has to log in and to start a run; then the run is stored on disk."""

CLIENT_SECONDS = 2.0
"""What the client takes above the time limit that it is given for a start, when that fails."""

FINISH_TIMEOUT = 2.4
"""Seconds that sending the rest may take at the end, whatever W&B does; five in total, together
with the seconds for a start."""

UNREACHABLE = ("did not respond in time", "invalid character")
"""In the client's message when a login gets no answer, or one that is not W&B's."""

HTTP_TIMEOUT = "WANDB_HTTP_TIMEOUT"

_login_seconds = 0.0
"""What this process has waited for its login."""

REFUSED = re.compile(r"denied|forbidden|not found|not logged in|unauthori[sz]ed|\b40[134]\b")
"""In the client's message when W&B does answer, and will not have the run."""


@dataclass(frozen=True)
class RunNote:
    """The W&B run of a training: `wandb.json` next to its checkpoints."""

    id: str
    project: str
    entity: str | None
    fingerprint: str
    """Hash of the settings that determine the result; a training with others is another run."""
    finished: bool

    def save(self, checkpoints: Path) -> None:
        """Write the note."""
        write_file(checkpoints / WANDB_NOTE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, checkpoints: Path) -> "RunNote | None":
        """Read the note, if there is one."""
        try:
            return read_record(cls, checkpoints / WANDB_NOTE, "note", "it is created again")
        except SAEError:
            return None


def is_outage(message: str) -> bool:
    """Whether a login failed because W&B gave no answer, or one that is not W&B's: for the client,
    all failures of a login are of one class."""
    return any(words in message for words in UNREACHABLE)


def is_refusal(message: str) -> bool:
    """Whether W&B did answer, and will not have the run."""
    return REFUSED.search(message.lower()) is not None


def is_on(settings: TrackingConfig) -> bool:
    """Whether the settings ask for a run."""
    return settings.wandb and settings.wandb_mode != "disabled"


def log_in(settings: TrackingConfig) -> TrackingConfig:
    """The settings as they can be followed: offline, if W&B does not answer in time; not at all
    where another process speaks for this one.

    Raises:
        SAEError: the key is missing or wrong.
    """
    if is_follower():
        return replace(settings, wandb=False)
    if not settings.wandb or settings.wandb_mode != "online":
        return settings

    import wandb

    global _login_seconds
    wandb.setup(wandb.Settings(silent=True))
    bound_exit()
    began = time.monotonic()
    try:
        with _http_timeout(LOGIN_TIMEOUT):
            logged_in = wandb.login(prompt=False, verify=True)
        _login_seconds = time.monotonic() - began
        if logged_in:
            return settings
        problem = "no API key"
    except wandb.errors.Error as error:
        problem = one_line(error)
        if is_outage(problem):
            print("W&B: cannot be reached; the run is stored locally instead", flush=True)
            return replace(settings, wandb_mode="offline")
    raise SAEError(
        f"--wandb: {problem}; run `python -m wandb login`, set WANDB_API_KEY, or use "
        "--wandb-mode offline"
    )


@contextmanager
def _http_timeout(seconds: int) -> Iterator[None]:
    """A limit to what the client waits for in the block; not to the requests of a run."""
    if HTTP_TIMEOUT in os.environ:
        yield
        return
    os.environ[HTTP_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        del os.environ[HTTP_TIMEOUT]


def add_to_summary(settings: TrackingConfig, checkpoints: Path, values: dict[str, Any]) -> None:
    """Add to the summary of the run that is noted next to `checkpoints`, if there is one.

    If it fails, the caller continues.
    """
    note = RunNote.load(checkpoints)
    if not is_on(settings) or note is None:
        return
    try:
        run = start(log_in(settings), note)
        run.summary.update(values)
        finish(run, 0)
    except Exception as error:  # whatever a client's background process may come up with
        print(f"W&B: not updated ({one_line(error)})", flush=True)


def evaluation_summary(figures: dict[str, Any]) -> dict[str, float]:
    """The figures of an evaluation as values of a run's summary."""
    numbers = (int, float)
    return {f"eval/{name}": value for name, value in figures.items() if type(value) in numbers}


def start(settings: TrackingConfig, note: RunNote, **about: Any) -> Any:
    """Start or resume the run; online if W&B can be reached, else on disk."""
    import wandb

    if settings.wandb_mode == "online":
        try:
            run = _init("online", note, **about)
            print(f"W&B: {run.url}", flush=True)
            return run
        except wandb.errors.Error as error:
            if is_refusal(str(error)):
                raise SAEError(
                    f"--wandb: W&B rejects the run ({one_line(error)}); check --wandb-entity and "
                    "--wandb-project, run `python -m wandb login`, or use --wandb-mode offline"
                ) from error
            print("W&B: cannot be reached; the run is stored locally instead", flush=True)
            end_client()  # else it holds the failed run's id
    run = _init("offline", note, **about)
    folder = run.settings.sync_dir
    print(f"W&B: offline; sync the run with `python -m wandb sync {folder}`", flush=True)
    return run


def init_timeout(login_seconds: float) -> float:
    """Seconds that are left to start a run after a login that took so long."""
    return max(0.5, START_TIMEOUT - login_seconds)


def _init(mode: Literal["online", "offline"], note: RunNote, **about: Any) -> Any:
    import wandb

    run = wandb.init(
        project=note.project,
        entity=note.entity,
        id=note.id,
        resume="allow",
        mode=mode,
        reinit="create_new",  # beside the runs of SAEs that are trained together
        settings=wandb.Settings(
            init_timeout=init_timeout(_login_seconds),
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            disable_git=True,
            # By default the client sends the command line and the paths of everything.
            x_disable_meta=True,
            program=Path(sys.argv[0]).name,
        ),
        **about,
    )
    bound_exit()
    # A resumed run forgets its axes unless they are defined again.
    run.define_metric("epoch")
    run.define_metric("tokens")
    for part in ("train/*", "val/*"):
        run.define_metric(part, step_metric="epoch")
    return run


def finish(run: Any, exit_code: int) -> None:
    """Send the rest of the run; what is not sent in time is on disk, and a line says how to send
    it."""
    try:
        with killed_after(FINISH_TIMEOUT):
            run.finish(exit_code=exit_code)
    except Exception as error:  # TimeoutError, or a background process that is gone
        command = f"python -m wandb sync --no-skip-online {run.settings.sync_dir}"
        print(
            f"W&B: not all of the run was sent ({one_line(error)}); sync the rest with `{command}`",
            flush=True,
        )
