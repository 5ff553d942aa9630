"""Jobs on a machine with several GPUs: each takes its own, also after one was killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sae_core.utils import gpu_lease
from sae_core.utils.devices import pick_device
from sae_core.utils.errors import SAEError

GPUS = ["0", "1", "2", "3"]

HOLDER = """
import sys
from sae_core.utils.gpu_lease import lease
print(*lease(sys.argv[2:], int(sys.argv[1])), flush=True)
sys.stdin.read()
"""

Job = subprocess.Popen


@pytest.fixture
def job(tmp_path: Path, root: Path) -> Iterator[Callable[..., tuple[Job, list[str]]]]:
    """Starts a process that takes GPUs and keeps them; the process, and which it has."""
    running: list[Job] = []

    def start(n: int = 1, gpus: list[str] = GPUS) -> tuple[Job, list[str]]:
        command = [sys.executable, "-c", HOLDER, str(n), *gpus]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(root)}
        process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]
        running.append(process)
        return process, process.stdout.readline().split()

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_each_job_has_its_own_gpu_and_then_all_share_alike(job: Callable) -> None:
    taken = [job()[1] for _ in range(6)]
    assert sorted(gpu for [gpu] in taken[:4]) == GPUS
    assert taken[4] != taken[5], "the fifth and the sixth join two others"
    assert len(job(n=3)[1]) == 3, "a job never has one GPU twice"


def test_a_gpu_is_free_again_however_its_job_ends(job: Callable) -> None:
    jobs = [job() for _ in range(4)]
    for victim, by in ((2, signal.SIGKILL), (0, signal.SIGTERM)):
        process, gpus = jobs[victim]
        process.send_signal(by)
        process.wait(60)
        assert job()[1] == gpus
    process, gpus = jobs[3]
    process.communicate(timeout=60)
    assert job()[1] == gpus


def test_several_gpus_of_one_job(job: Callable) -> None:
    (_, first), (_, second) = job(n=2), job(n=2)
    assert sorted(first + second) == GPUS and first == sorted(first)
    assert job(n=9)[1] == GPUS, "all, though fewer than it wants"
    names = ["GPU-7ca0/..", "MIG-1"]
    assert sorted(job(gpus=names)[1] + job(gpus=names)[1]) == names


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """This process is a job on a machine with four GPUs, beside three others."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_lease, "_held", [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.device_count",
        lambda: len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "x")  # put back at the end
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("SAE_CORE_GPUS", "1")
    monkeypatch.setenv("SAE_CORE_GPU_POOL", "4")
    yield monkeypatch
    for held in gpu_lease._held:
        held.release()


def test_a_job_sees_the_gpus_that_it_took(machine: pytest.MonkeyPatch, job: Callable) -> None:
    machine.setenv("CUDA_VISIBLE_DEVICES", "2, 3,1")
    _, [other] = job(gpus=["2", "3", "1"])
    products = torch.backends.cuda.matmul
    machine.setattr(products, "allow_bf16_reduced_precision_reduction", True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert products.allow_bf16_reduced_precision_reduction is False, "sums are in float32"
    assert other == "2" and os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_choice_that_cuda_does_not_heed(machine: pytest.MonkeyPatch) -> None:
    """All jobs would compute on the first GPU."""
    machine.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(SAEError, match="cannot be chosen without the driver's library NVML"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("granted", "pool", "visible", "device"),
    [
        ("1", "4", "5", "cuda"),  # as a scheduler gives it
        ("2", "4", "0,1", "cuda"),
        ("1", "1", None, "cuda"),  # a model may need several
        ("1", "", None, "cuda"),
        ("", "4", None, "cuda"),  # started by hand
        ("0", "4", None, "cuda"),
        ("1", "4", None, "cpu"),
    ],
)
def test_a_job_that_keeps_what_it_sees(
    granted: str, pool: str, visible: str | None, device: str, machine: pytest.MonkeyPatch
) -> None:
    for name, value in (("SAE_CORE_GPUS", granted), ("SAE_CORE_GPU_POOL", pool)):
        machine.setenv(name, value) if value else machine.delenv(name)
    if visible:
        machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pick_device(device).type == device
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_processes_of_one_training_share_its_gpus(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("SAE_CORE_GPUS", "2")
    gpu_lease.lease_gpus()  # by the process that starts them
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    machine.setattr(gpu_lease, "_held", [])  # another process
    for rank in (0, 1):
        for name, value in (("WORLD_SIZE", 2), ("LOCAL_RANK", rank), ("RANK", rank)):
            machine.setenv(name, str(value))
        assert pick_device("cuda") == torch.device("cuda", rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_folder_that_is_not_the_users(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"sae_core-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SAEError, match="is not a folder of this user; delete it"):
        pick_device("cuda")
