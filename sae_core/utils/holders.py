"""Who holds a lock: which process of which machine, and whether it is known to be dead.

A number says little of a process: another machine and another container have the same numbers, and
so has this one after a restart. So a holder is also its machine, the machine's start, the set of
processes (PID namespace) that the number counts in, and the process's own start. `filelock`
compares the same for its own soft locks, but offers no function for those of others.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_type_hints

State = Literal["alive", "dead", "unknown"]

ENDED = ("Z", "X")
"""States of a process that has ended but is still listed."""


@dataclass(frozen=True)
class Holder:
    """Everything that identifies a process. What the system does not reveal is empty."""

    pid: int
    host: str
    machine: str
    """The machine's own id."""
    boot: str
    """Changes with each start of the machine."""
    namespace: str
    """The namespace of the machine's processes, or of a container's."""
    started: str
    """Clock ticks of the machine when the process began."""
    since: str
    """When it took the lock, for people."""

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        started, _ = _process(os.getpid())
        return cls(os.getpid(), socket.gethostname(), *_place(), started, now)

    @classmethod
    def parse(cls, text: str) -> "Holder | None":
        """The holder that `text` describes; None if it describes none, or is incomplete."""
        try:
            found = json.loads(text)
            return cls(**{name: of(found[name]) for name, of in get_type_hints(cls).items()})
        except (ValueError, KeyError, TypeError):
            return None

    @property
    def text(self) -> str:
        """The contents of a lock file."""
        return json.dumps(asdict(self))

    def state(self) -> State:
        """Whether the process still lives, as far as that can be known from here."""
        machine, boot, namespace = _place()
        if boot and (self.boot, self.namespace) == (boot, namespace):
            started, state = _process(self.pid)
            return "alive" if started == self.started and state not in ENDED else "dead"
        here = (socket.gethostname(), machine, namespace)
        if machine and boot and (self.host, self.machine, self.namespace) == here:
            return "dead"  # the machine has been restarted since
        return "unknown"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _place() -> tuple[str, str, str]:
    """The machine, its start, and the namespace that processes are counted in."""
    boot = _read(Path("/proc/sys/kernel/random/boot_id"))
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return _read(Path("/etc/machine-id")), boot, namespace


def _process(pid: int) -> tuple[str, str]:
    """When a process began, and its state; both empty if there is none."""
    words = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (words[19], words[0]) if words else ("", "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
