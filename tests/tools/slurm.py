"""A SLURM cluster of several nodes on this machine: loopback only, all of it in one folder.

    python tests/tools/slurm.py FOLDER      # until interrupted; prints what to export

It needs the programs of the Debian packages in `PACKAGES`, but neither root nor systemd nor
cgroups. The nodes are slurmd processes with the resources that they are told; a GPU is a link to
/dev/null, enough for SLURM to queue for it and to set CUDA_VISIBLE_DEVICES. There is no
accounting, and a job over its memory is killed by polling.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
PATIENCE = 60
"""Seconds that the cluster may take to answer."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=2
GresTypes=gpu
KillWait=5
MinJobAge=7200
TaskProlog={folder}/bin/record
{nodes}
PartitionName=cpu Nodes=ALL Default=YES State=UP
PartitionName=gpu Nodes=ALL State=UP
"""


def missing() -> list[str]:
    """The programs that a cluster needs and that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job(NamedTuple):
    """A job as squeue shows it."""

    id: str
    state: str
    comment: str
    """`rule_<rule>_wildcards_<their values>`, by Snakemake's executor."""
    partition: str
    node: str
    memory: str
    reason: str
    """Why it waits."""
    start: str
    """When it began, or will; in ISO format, as is `end`."""
    end: str

    @property
    def rule(self) -> str:
        return self.comment.removeprefix("rule_").partition("_wildcards")[0]


class Task(NamedTuple):
    """A task that a node has started; a Snakemake job is two, a batch script and a step."""

    job: str
    node: str
    devices: str
    """CUDA_VISIBLE_DEVICES."""


@dataclass
class Cluster:
    """Nodes n1, n2, ...; a partition `cpu` (the default) and one `gpu`, both of all nodes."""

    folder: Path
    nodes: int = 2
    cpus: int = 8
    """Of each node, whatever the machine has."""
    memory: int = 16_000
    """MB of each node."""
    gpus: int = 1
    """Of each node, of the type `fake`."""
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in order to find the cluster."""
        return {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": f"{self.folder}/bin:{_path()}"}

    def start(self) -> None:
        """Write the configuration, start the daemons and wait for the nodes."""
        self._configure()
        munge = ["--force", "--foreground", f"--key-file={self.folder}/munge.key"]
        munge += [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
        self._daemon("munged", *munge, f"--socket={self.folder}/munge.socket")
        self.wait_for((self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D")
        for name in self.names:
            self._daemon("slurmd", "-D", "-N", name)
        self.wait_for(lambda: self.states() == ["idle"] * self.nodes)

    def stop(self) -> None:
        """End the jobs and the daemons."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        try:
            self.wait_for(lambda: not self.jobs())
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
            for daemon in self.daemons:
                try:
                    daemon.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    daemon.kill()

    @property
    def names(self) -> list[str]:
        """The nodes' names."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def run(self, *command: str, check: bool = True) -> str:
        """What a SLURM command prints."""
        return subprocess.run(
            command,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=check,
            timeout=PATIENCE,
        ).stdout

    def states(self) -> list[str]:
        """What the nodes do, in words of sinfo."""
        lines = self.run("sinfo", "-h", "-N", "-p", "cpu", "-o", "%T", check=False).splitlines()
        return [line.strip() for line in lines]

    def jobs(self, *states: str) -> list[Job]:
        """The jobs in these states; those that wait or run, if none are given."""
        chosen = ["--states", ",".join(states)] if states else []
        lines = self.run("squeue", "-h", *chosen, "-o", "%i|%T|%k|%P|%N|%m|%r|%S|%e").splitlines()
        return [Job(*line.split("|")) for line in lines]

    def tasks(self) -> list[Task]:
        """What has been run, in the order of the starts."""
        lines = (self.folder / "tasks").read_text().splitlines()
        return [Task(*line.split("|")) for line in lines]

    def wait_for(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        """Wait until `condition` holds.

        Raises:
            TimeoutError: it does not in time; with the ends of the daemons' logs.
        """
        end = time.monotonic() + patience
        while not condition():
            if time.monotonic() > end:
                logs = [path.read_text()[-1500:] for path in sorted(self.folder.glob("*.log"))]
                raise TimeoutError("\n".join(logs))
            time.sleep(0.2)

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        for number in range(self.gpus):
            (self.folder / f"nvidia{number}").symlink_to("/dev/null")
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} "
            f"CPUs={self.cpus} RealMemory={self.memory} Gres=gpu:fake:{self.gpus} State=UNKNOWN"
            for name in self.names
        ]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                port=_free_port(),
                user=getpass.getuser(),
                folder=self.folder,
                nodes="\n".join(nodes),
            )
        )
        (self.folder / "gres.conf").write_text(
            f"Name=gpu Type=fake File={self.folder}/nvidia[0-{self.gpus - 1}]\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "bin").mkdir()
        # The executor takes SLURM_* from its jobs, so that srun would look in /etc/slurm.
        srun = shutil.which("srun", path=_path())
        self._script("srun", f'SLURM_CONF={self.folder}/slurm.conf exec {srun} "$@"')
        seen = "$SLURM_JOB_ID|$SLURMD_NODENAME|$CUDA_VISIBLE_DEVICES"
        self._script("record", f'echo "{seen}" >> {self.folder}/tasks')

    def _script(self, name: str, line: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def _daemon(self, *command: str) -> None:
        program = shutil.which(command[0], path=_path())
        assert program, command[0]
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            self.daemons.append(
                subprocess.Popen(
                    [program, *command[1:]],
                    env={**os.environ, **self.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            )


def main() -> None:
    """Run a cluster until interrupted."""
    cluster = Cluster(Path(sys.argv[1]).resolve())
    cluster.start()
    try:
        for name, value in cluster.environment.items():
            print(f"export {name}={value}")
        print("# Ctrl-C stops the cluster.", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
