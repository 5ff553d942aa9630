"""Runs of the unmodified W&B client: offline, and online against a server on this machine that
has outages."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from miniwandb import KEY, LONG_KEY, MiniWandb, StoredRun
from preloaded import forking_tools
from running import ROOT, run_python
from tracked_training import EPOCHS, metrics

from sae_core.model_training import wandb_session

SCRIPT = ROOT / "tests/tools/tracked_training.py"
IMPORTS = ("sae_core.training", "sae_core.utils.cli")
"""Of the script, besides W&B's client, which reads its settings as it is imported."""

SINGLE = "sae_core/model_training/single_sae_training.py"
IMPATIENT = ("--start-seconds", "0.5", "--finish-seconds", "0.5")
"""An outage is one after this time, too."""

TOKEN = "hf_planted_for_this_test"


@pytest.fixture
def server() -> Iterator[MiniWandb]:
    with MiniWandb() as server:
        yield server


class Training:
    """A process that trains, tracked, in a folder of its own."""

    def __init__(self, folder: Path, server: MiniWandb) -> None:
        self.folder, self.points = folder, folder / "points"
        self.points.mkdir()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("WANDB_")},
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": KEY,
            "HF_TOKEN": TOKEN,
        }

    def start(self, *options: str, script: str | Path = SCRIPT) -> subprocess.Popen[str]:
        command: list[object] = [sys.executable, script]
        if script == SCRIPT:
            command = [forking_tools(IMPORTS), script, self.points]
        return subprocess.Popen(
            [*map(str, command), "--wandb", *options],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *options: str, ok: bool = True) -> str:
        process = self.start(*options)
        printed = process.communicate(timeout=90)[0]
        assert (process.returncode == 0) == ok, printed
        return printed

    def paused(self, *options: str) -> subprocess.Popen[str]:
        """A training that waits after its first epoch."""
        (self.points / "pause").touch()
        process = self.start(*options)
        self.await_epoch(process, 1)
        return process

    def go_on(self, process: subprocess.Popen[str], epoch: int) -> None:
        """Let the training do its next epoch."""
        (self.points / "go").touch()
        self.await_epoch(process, epoch)

    def finish(self, process: subprocess.Popen[str]) -> str:
        (self.points / "pause").unlink()
        printed = process.communicate(timeout=90)[0]
        assert process.returncode == 0, printed
        return printed

    @staticmethod
    def await_epoch(process: subprocess.Popen[str], epoch: int) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line == f"epoch {epoch}\n":
                return
        raise AssertionError("the training ended too early")

    def sync(self, printed: str) -> None:
        """Do what was printed about sending a run later."""
        for command in re.findall(r"`python (-m wandb sync .+?)`", printed):
            subprocess.run(
                [sys.executable, *command.split()],
                cwd=self.folder, env=self.environment, check=True, capture_output=True, timeout=90,
            )  # fmt: skip

    def note(self) -> dict[str, object]:
        return json.loads((self.points / "wandb.json").read_text())


@pytest.fixture
def training(tmp_path: Path, server: MiniWandb) -> Training:
    return Training(tmp_path, server)


def row(epoch: int) -> dict[str, float]:
    """What W&B is to have of an epoch."""
    made = metrics(epoch)
    axes = {"epoch": epoch, "tokens": 10 * epoch}
    train = {"train/loss": made["loss"], "train/dead_features": made["dead_features"]}
    return axes | train | {"val/loss": made["val_loss"]}


def check_history(run: StoredRun) -> None:
    """Every epoch is there once, with both axes."""
    assert sorted(run.history) == list(range(1, EPOCHS + 1))
    for epoch, found in run.history.items():
        assert {name: found[name] for name in row(epoch)} == pytest.approx(row(epoch))


def check_summary(run: StoredRun, training: Training) -> None:
    expected = {
        "status": "completed",
        "final/loss": metrics(2)["loss"],
        "final/val_loss": metrics(2)["val_loss"],
        "final/dead_features": 2,
        "model_path": "final",
        "checkpoint_path": "points",
        "eval/fvu": 0.25,
    }
    assert expected.items() <= run.summary.items()
    assert "eval/run_name" not in run.summary


@pytest.mark.parametrize("key", [KEY, LONG_KEY], ids=["40 characters", "more"])
def test_a_run_online(key: str, training: Training, server: MiniWandb) -> None:
    training.environment["WANDB_API_KEY"] = key
    printed = training.run(
        *"--wandb-project p --wandb-entity team --wandb-group g --wandb-tags a b".split(),
        "--wandb-notes", "a note",
    )  # fmt: skip
    check_history(server.only)
    check_summary(server.only, training)
    about = {"project": "p", "entity": "team", "groupName": "g", "jobType": "train"}
    assert about | {"notes": "a note", "displayName": "a.run"} == server.only.about
    assert server.only.tags == ["a", "b", "standard", "layer 1", "x" * 64]
    assert server.only.config["data"] == {"seed": 0}
    assert "/runs/" in printed and training.note()["finished"] is True


def test_saes_that_are_trained_together_have_a_run_each(
    training: Training, server: MiniWandb
) -> None:
    training.run("--beside")
    assert sorted(run.about["displayName"] for run in server.runs.values()) == ["a.run", "b.run"]
    for run in server.runs.values():
        check_history(run)
        assert run.summary["status"] == "completed"


@pytest.mark.slow
def test_the_axes_are_epochs_and_tokens(training: Training, server: MiniWandb) -> None:
    training.run()
    metrics_by_name = {m["1"]: m for m in server.only.config["_wandb"]["m"] if "1" in m}
    assert {"epoch", "tokens"} <= set(metrics_by_name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "words"),
    [(None, "no API key"), ("x" * 40, "user is not logged in"), ("short", "40+ characters")],
)
def test_a_missing_or_wrong_key_is_one_line_before_anything_is_read(
    key: str | None, words: str, training: Training, server: MiniWandb
) -> None:
    training.environment.pop("WANDB_API_KEY")
    if key is not None:
        training.environment["WANDB_API_KEY"] = key
    process = training.start("--data-path", "nowhere.json", script=ROOT / SINGLE)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert words in line and "python -m wandb login" in line
    assert "nowhere.json" not in printed and not server.runs
    assert key is None or key not in printed


@pytest.mark.slow
def test_an_outage_at_the_start_stores_the_run(training: Training, server: MiniWandb) -> None:
    server.down = True
    printed = training.run(*IMPATIENT)
    assert "W&B: cannot be reached; the run is stored locally instead" in printed
    assert printed.count("`python -m wandb sync ") == 2, "the training, and its evaluation"
    assert not server.runs
    server.down = False
    training.sync(printed)
    check_history(server.only)
    check_summary(server.only, training)


@pytest.mark.slow
def test_an_outage_after_the_login_stores_the_run(training: Training, server: MiniWandb) -> None:
    """The key is found good, and then the server is gone."""
    server.down_after_login = True
    printed = training.run(*IMPATIENT)
    assert "W&B: cannot be reached" in printed
    server.down = server.down_after_login = False
    training.sync(printed)
    check_history(server.only)


@pytest.mark.slow
def test_a_silent_server_stores_the_run(training: Training, server: MiniWandb) -> None:
    server.silent = "."
    printed = training.run(*IMPATIENT)
    assert "W&B: cannot be reached" in printed and not server.runs


@pytest.mark.slow
def test_an_outage_in_the_middle_is_made_up_for(training: Training, server: MiniWandb) -> None:
    process = training.paused()
    server.down = True
    training.go_on(process, 2)
    server.down = False
    training.finish(process)
    check_history(server.only)
    check_summary(server.only, training)


@pytest.mark.slow
def test_an_outage_at_the_end_says_how_to_send_the_rest(
    training: Training, server: MiniWandb
) -> None:
    process = training.paused("--finish-seconds", "0.5")
    server.down = True
    printed = training.finish(process)
    assert "W&B: not all of the run was sent" in printed
    server.down = False
    training.sync(printed)
    check_history(server.only)
    check_summary(server.only, training)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["/file_stream$", "/graphql$"])
def test_a_server_that_answers_in_part_is_not_waited_for(
    part: str, training: Training, server: MiniWandb
) -> None:
    process = training.paused()
    server.silent = part
    printed = training.finish(process)
    seconds = [float(found) for found in re.findall(r"took ([\d.]+) s", printed)]
    assert len(seconds) == 2 and max(seconds) < 5 + 1, "and a second for a busy machine"
    server.silent = None
    training.sync(printed)
    check_history(server.only)
    check_summary(server.only, training)


def runs_in(folder: Path, process: psutil.Process) -> bool:
    try:
        return process.name() == "wandb-core" and process.cwd() == str(folder)
    except psutil.Error:  # it has ended, or is another user's
        return False


@pytest.mark.slow
def test_a_background_process_that_hangs_does_not_hold_up_the_training(training: Training) -> None:
    process = training.paused(*IMPATIENT, "--exit-seconds", "1")
    [client] = [p for p in psutil.process_iter() if runs_in(training.folder, p)]
    client.suspend()
    printed = training.finish(process)
    assert "W&B: not all of the run was sent" in printed
    assert not client.is_running()


STOPPED_AT_EXIT = """
import signal, wandb
from sae_core.model_training import wandb_exit
wandb_exit.EXIT_TIMEOUT = 0.5
wandb.setup(wandb.Settings(silent=True))
wandb_exit.bound_exit()
wandb.setup().ensure_service()._proc._process.send_signal(signal.SIGSTOP)
print("done")
"""


@pytest.mark.slow
def test_a_background_process_that_hangs_as_it_ends_is_killed(tmp_path: Path) -> None:
    given = {"HOME": str(tmp_path), "WANDB_API_KEY": KEY, "WANDB_SERVICE": ""}  # one of its own
    done = run_python("-c", STOPPED_AT_EXIT, cwd=tmp_path, env=given)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_an_outage_takes_five_seconds_at_most() -> None:
    """All that is waited for when nothing gets through: at the start; at the end of a run that did
    start; or at an end and again by the evaluation that follows."""
    session = wandb_session
    for login in (0.0, 1.0, session.LOGIN_TIMEOUT):
        start = login + session.init_timeout(login)
        assert start + session.CLIENT_SECONDS <= 5 and start + session.FINISH_TIMEOUT <= 5
    assert session.FINISH_TIMEOUT + session.LOGIN_TIMEOUT <= 5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_paths_of_this_machine_stay_here(mode: str, tmp_path: Path, server: MiniWandb) -> None:
    """Whatever W&B's own client would tell besides, online as in the file of an offline run."""
    folder = tmp_path / "home_of_somebody"
    folder.mkdir()
    Training(folder, server).run("--wandb-mode", mode)
    told = server.received or [path.read_bytes() for path in folder.rglob("*.wandb")]
    assert b"a.run" in b"".join(told) and b"model_path" in b"".join(told)
    for content in told:
        assert b"home_of_somebody" not in content and str(ROOT).encode() not in content


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_with_its_run(
    training: Training, server: MiniWandb
) -> None:
    process = training.paused()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    server.only.history[1] = row(1) | {"_step": 1}  # as if the client had sent it before it died
    (training.points / "pause").unlink()
    first = training.note()["id"]
    training.run()
    assert list(server.runs) == [first]
    check_history(server.only)
    check_summary(server.only, training)


@pytest.mark.slow
def test_a_finished_training_and_other_settings_make_new_runs(
    training: Training, server: MiniWandb
) -> None:
    training.run()
    training.run()
    training.run("--fails", ok=False)
    training.run("--seed", "1")
    assert len(server.runs) == 4
    states = [(run.summary["status"], run.exit_code) for run in server.runs.values()]
    assert states == [("completed", 0), ("completed", 0), ("failed", 1), ("completed", 0)]


def test_offline_nothing_is_sent_until_sync(training: Training, server: MiniWandb) -> None:
    training.environment.pop("WANDB_API_KEY")
    printed = training.run("--wandb-mode", "offline")
    assert not server.runs
    training.environment["WANDB_API_KEY"] = KEY
    training.sync(printed)
    check_history(server.only)
    check_summary(server.only, training)


def test_disabled_leaves_nothing(training: Training, server: MiniWandb) -> None:
    training.run("--wandb-mode", "disabled")
    assert not server.runs and not list(training.folder.rglob("*wandb*"))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, False])
def test_the_final_sae_is_an_artifact_only_if_asked_for(asked: bool, training: Training) -> None:
    training.environment["WANDB_DATA_DIR"] = str(training.folder / "data")
    (training.points / "best_model.pt").write_text("a checkpoint")
    options = ["--wandb-log-final-artifact"] if asked else []
    training.run("--wandb-mode", "offline", *options)
    staged = [p.read_text() for p in (training.folder / "data").rglob("*") if p.is_file()]
    assert staged == ["the SAE"] * asked


def test_no_secret_is_written(training: Training, server: MiniWandb) -> None:
    printed = training.run()
    files = [path for path in training.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (KEY, TOKEN):
        assert secret not in printed
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert TOKEN not in json.dumps([vars(run) for run in server.runs.values()])
