"""The lock that a killed Snakemake leaves: removed if its holder is dead, asked about if nobody can
know, left alone if it lives."""

import json
import os
import pty
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from running import ROOT

from sae_core.utils import holders, run_lock
from sae_core.utils.errors import SAEError
from sae_core.utils.holders import Holder
from sae_core.workflow import workflow_lock

SCRIPT = ROOT / "scripts/unlock.py"


def dead_process() -> int:
    """The number of a process that has just ended."""
    process = subprocess.Popen(["true"])
    process.wait(60)
    return process.pid


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Lock a folder as Snakemake does, for a holder; the folder is the one at work in."""
    monkeypatch.chdir(tmp_path)

    def make(*records: Holder | str) -> Path:
        workflow_lock.LOCKS.mkdir(parents=True)
        (workflow_lock.LOCKS / "0.input.lock").write_text("chapter.md\n")
        for number, record in enumerate(records):
            text = record.text if isinstance(record, Holder) else record
            (workflow_lock.LOCKS / f"{number}.holder.json").write_text(text)
        return tmp_path

    return make


HERE = Holder.here()
DEAD = replace(HERE, pid=dead_process())
OTHER_MACHINE = replace(HERE, host="node7", machine="f" * 32, boot="other", pid=1)


@pytest.mark.parametrize(
    ("holder", "state"),
    [
        (HERE, "alive"),
        (replace(HERE, host="renamed"), "alive"),
        (DEAD, "dead"),
        (replace(HERE, started="1"), "dead"),  # its number is another process's now
        (replace(DEAD, boot="before"), "dead"),  # the machine was started anew
        (replace(HERE, boot="before"), "dead"),
        (replace(DEAD, namespace="pid:[1]"), "unknown"),  # another container
        (replace(DEAD, boot="before", namespace="pid:[1]"), "unknown"),
        (replace(DEAD, boot="other", host="node7"), "unknown"),
        (replace(DEAD, boot="other", machine="f" * 32), "unknown"),
        (replace(DEAD, boot="", machine=""), "unknown"),
        (OTHER_MACHINE, "unknown"),
    ],
)
def test_what_is_known_of_a_holder(holder: Holder, state: str) -> None:
    assert holder.state() == state
    assert Holder.parse(holder.text) == holder


def test_a_process_that_has_ended_and_is_still_listed_is_dead() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    started, _ = holders._process(process.pid)
    assert started and replace(HERE, pid=process.pid, started=started).state() == "dead"
    process.wait(60)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 1, "host": "a"}', json.dumps({"pid": "x"} | {})]
)
def test_a_record_that_says_less_is_none(text: str) -> None:
    assert Holder.parse(text) is None


def test_a_lock_of_the_dead_is_beyond_doubt(lock: Callable[..., Path]) -> None:
    lock(DEAD, replace(HERE, started="1"))
    assert workflow_lock.is_locked() and workflow_lock.doubts() is None


@pytest.mark.parametrize("records", [(), ("",), (DEAD, ""), (DEAD, OTHER_MACHINE)])
def test_a_lock_that_nobody_can_know_of_is_in_doubt(
    records: tuple[Holder | str, ...], lock: Callable[..., Path]
) -> None:
    lock(*records)
    assert workflow_lock.doubts()


def test_a_lock_of_the_living_is_refused(lock: Callable[..., Path]) -> None:
    lock(DEAD, HERE)
    with pytest.raises(SAEError, match=f"running here, in the processes {os.getpid()};"):
        workflow_lock.doubts()


def test_the_record_is_made_beside_a_lock_only(lock: Callable[..., Path]) -> None:
    workflow_lock.record_holder()
    folder = lock()
    assert workflow_lock.doubts()
    workflow_lock.record_holder()
    [record] = (folder / workflow_lock.LOCKS).glob(workflow_lock.RECORDS)
    found = Holder.parse(record.read_text())
    assert found and replace(found, since=HERE.since) == HERE


@pytest.fixture
def unlock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the script in this process, and return its status."""

    def run(*options: str, stdin: str = os.devnull) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        with open(stdin) as stream, pytest.raises(SystemExit) as end:
            monkeypatch.setattr(sys, "stdin", stream)
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return int(end.value.code or 0)

    return run


Unlock = Callable[..., int]


@pytest.mark.parametrize(
    ("holder", "options", "status"),
    [
        (DEAD, ["--help"], 0),
        (DEAD, ["--unknown"], 2),
        (OTHER_MACHINE, [], 1),
        (HERE, ["--force"], 1),
    ],
    ids=["help", "unknown option", "unknown holder", "living holder"],
)
def test_the_lock_stays(
    holder: Holder,
    options: list[str],
    status: int,
    lock: Callable[..., Path],
    unlock: Unlock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock(holder)
    assert unlock(*options) == status
    assert workflow_lock.is_locked()
    if not options:
        printed = capsys.readouterr().err
        assert "process 1 on node7" in printed and "--force" in printed


@pytest.mark.parametrize(("holder", "options"), [(DEAD, []), (OTHER_MACHINE, ["--force"])])
def test_the_lock_goes(
    holder: Holder, options: list[str], lock: Callable[..., Path], unlock: Unlock
) -> None:
    lock(holder)
    assert unlock(*options) == 0
    assert not workflow_lock.is_locked()


@pytest.mark.parametrize(("answer", "stays"), [("y\n", False), ("\n", True), ("no\n", True)])
def test_somebody_at_a_terminal_is_asked(
    answer: str,
    stays: bool,
    lock: Callable[..., Path],
    unlock: Unlock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock(OTHER_MACHINE)
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer.encode())
        assert unlock(stdin=os.ttyname(theirs)) == int(stays)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "process 1 on node7" in capsys.readouterr().out
    assert workflow_lock.is_locked() == stays


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of util-linux")
def test_a_holder_outside_the_container_is_not_taken_for_dead(lock: Callable[..., Path]) -> None:
    """The container sees none of the processes outside, nor their numbers."""
    container = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*container, "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("no container can be made here")
    lock(HERE)
    command = [*container, sys.executable, str(SCRIPT)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1 and f"process {os.getpid()} on" in done.stderr
    assert workflow_lock.is_locked()


# The lock of a training


LOCAL = "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
OTHERS = {
    "nfs": "30 22 0:9 / {} rw - nfs4 server:/a rw,vers=4.2,local_lock=none\n",
    "nfs with own locks": "30 22 0:9 / {} rw - nfs server:/a rw,vers=3,local_lock=all\n",
    "lustre": "30 22 0:9 / {} rw - lustre server:/a rw,flock\n",
    "lustre with own locks": "30 22 0:9 / {} rw - lustre server:/a rw,localflock\n",
    "sshfs": "30 22 0:9 / {} rw shared:1 - fuse.sshfs host:/a rw,user_id=0\n",
}


@pytest.mark.parametrize("system", [None, *OTHERS])
@pytest.mark.parametrize("holder", [DEAD, HERE, replace(HERE, namespace="pid:[1]"), OTHER_MACHINE])
def test_a_training_is_not_taken_over_where_locks_do_not_reach_its_machine(
    holder: Holder, system: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with späce"
    folder.mkdir()
    mounts = tmp_path / "mountinfo"
    escaped = str(folder).replace(" ", r"\040")
    mounts.write_text(LOCAL + (OTHERS[system].format(escaped) if system else ""))
    monkeypatch.setattr(run_lock, "MOUNTS", mounts)
    path = folder / "training.lock"
    path.write_text(holder.text)
    if holder == OTHER_MACHINE and system and (system == "sshfs" or "own" in system):
        with pytest.raises(SAEError, match="process 1 on node7.*delete the file"):
            with run_lock.lock(path, "trains"):
                pass
        assert Holder.parse(path.read_text()) == holder
        path.unlink()
    with run_lock.lock(path, "trains"):
        found = Holder.parse(path.read_text())
        assert found and replace(found, since=HERE.since) == HERE
    assert not path.exists()
