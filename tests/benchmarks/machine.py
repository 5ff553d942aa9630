"""What a table of figures was measured on."""

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe(*packages: str) -> str:
    """One line: date, processor, cores, and the versions of torch and of `packages`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return ", ".join(
        [
            datetime.date.today().isoformat(),
            names[0] if names else platform.machine(),
            f"{torch.get_num_threads()} cores",
            *(f"{name} {_version(name)}" for name in ("torch", *packages)),
        ]
    )


def _version(package: str) -> str:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return "not installed"
