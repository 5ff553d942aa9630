"""What a table of figures was measured on: the GPU where there is one."""

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sae_core.utils.devices import pick_device

DEVICE = pick_device("auto")


def describe(*packages: str) -> str:
    """One line: date, GPU, processor, cores, and the versions of torch and of `packages`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return ", ".join(
        [
            datetime.date.today().isoformat(),
            *([torch.cuda.get_device_name(DEVICE)] if DEVICE.type == "cuda" else []),
            names[0] if names else platform.machine(),
            f"{torch.get_num_threads()} cores",
            *(f"{name} {_version(name)}" for name in ("torch", *packages)),
        ]
    )


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _version(package: str) -> str:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return "not installed"
