"""Which of a machine's GPUs a job takes: those with the fewest other jobs.

A lease is the kernel's lock on a file, which ends with its process, however that ends. Each GPU has
a row of such files, and a job locks the first free file of a row, on the GPU where it comes
earliest. So each job gets its own GPU while there are enough; otherwise they share them evenly, and
none waits. All workflows of one user on one machine share the folder of these files.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from sae_core.utils.errors import SAEError
from sae_core.utils.ranks import local_rank

WANTED = "SAE_CORE_GPUS"
"""Environment variable with the number of GPUs that Snakemake grants a job."""

POOL = "SAE_CORE_GPU_POOL"
"""Environment variable with the number of GPUs that it has for all jobs together."""

VISIBLE = "CUDA_VISIBLE_DEVICES"

_held: list[BaseFileLock] = []
"""This process's leases."""


def share_gpus(pool: int) -> None:
    """Let the jobs that this process starts take turns at `pool` GPUs."""
    os.environ[POOL] = str(pool)


def lease_gpus() -> None:
    """Let this process, and those that it starts, see only as many GPUs as the workflow grants it.

    A job keeps all GPUs that it sees if it is granted the whole pool, or if it sees no more than it
    is granted, as under a cluster's scheduler. Call this before CUDA is used.

    Raises:
        SAEError: CUDA would use the others all the same.
    """
    wanted = int(os.environ.get(WANTED, 0))
    is_alone = int(os.environ.get(POOL, 0)) <= wanted
    if not wanted or is_alone or _held or local_rank() is not None:
        return
    there = _visible()
    if len(there) <= wanted:
        return
    own = lease(there, wanted)
    os.environ[VISIBLE] = ",".join(own)
    _check_heeded(len(own))
    print(f"GPU: {', '.join(own)} of {', '.join(there)}", flush=True)


def _visible() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    n = torch.cuda.device_count()  # does not start CUDA, which would read the variable for good
    given = os.environ.get(VISIBLE)
    return list(map(str, range(n))) if given is None else given.replace(" ", "").split(",")[:n]


def _check_heeded(n: int) -> None:
    """Check that CUDA now sees `n` GPUs: without the driver's library NVML it had to be started for
    `_visible`, and has read the variable for good."""
    import torch

    if torch.cuda.device_count() != n:
        raise SAEError(
            "GPU: cannot be chosen without the driver's library NVML (libnvidia-ml); add it (in a "
            "container: NVIDIA_DRIVER_CAPABILITIES=compute,utility), or use --resources gpu=1"
        )


def lease(gpus: Sequence[str], n: int) -> list[str]:
    """Take `n` of these GPUs until this process ends, in their order.

    Raises:
        SAEError: the folder of the leases cannot be used.
    """
    folder = _folder()
    own: set[str] = set()
    for place in count():
        for gpu in gpus:
            if gpu not in own and len(own) < n and _lock(folder, gpu, place):
                own.add(gpu)
        if len(own) == min(n, len(gpus)):
            return [gpu for gpu in gpus if gpu in own]
    raise AssertionError("unreachable")


def _lock(folder: Path, gpu: str, place: int) -> bool:
    """Lock a place in a GPU's row, if nobody has it."""
    name = re.sub(r"[^0-9A-Za-z-]", "_", gpu)
    held = FileLock(folder / f"{name}.{place}", fallback_to_soft=False)
    try:
        held.acquire(blocking=False)
    except Timeout:
        return False
    _held.append(held)
    return True


def _folder() -> Path:
    """Where this user's leases on this machine are.

    Raises:
        SAEError: it cannot be made, or is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"sae_core-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise SAEError(f"{folder}: cannot be made ({error.strerror}); set TMPDIR") from error
    if found.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        raise SAEError(f"{folder}: is not a folder of this user; delete it, or set TMPDIR")
    return folder
