"""Where to compute, and in which number format."""

import ctypes
import sys

import torch

from sae_core.utils.errors import SAEError
from sae_core.utils.gpu_lease import lease_gpus
from sae_core.utils.ranks import local_rank

GLIBC_LIMITS = {-8: 1, -3: 2**25, -1: 2**31 - 1}
"""From malloc.h: M_ARENA_MAX, M_MMAP_THRESHOLD (32 MB, its maximum) and M_TRIM_THRESHOLD."""


def pick_device(device: str) -> torch.device:
    """The device of that name; `auto` is CUDA, then MPS, then the CPU. A job of the workflow takes
    its own GPU, and if several processes share a training, each has one.

    Raises:
        SAEError: this machine does not have it.
    """
    if device in ("auto", "cuda"):
        lease_gpus()
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, has in available.items() if has)
        raise SAEError(f"--device {device}: not available here; this machine has {there}")
    if device == "cuda":
        # Sums in float32: the bound of what a product in bfloat16 can miss counts on them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    rank = local_rank() if device == "cuda" else None
    return torch.device(device) if rank is None else torch.device(device, rank)


def device_map(device: torch.device) -> torch.device | str:
    """Where transformers should put a model: on `device`, or on as many GPUs as it needs, filling
    one after the other."""
    several = device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1
    return "sequential" if several else device


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number format of that name; `auto` is bfloat16 where the hardware multiplies it fast
    (AVX512-BF16 or AMX on a CPU, bf16 tensor cores on CUDA) and float32 elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if is_fast_at_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def is_fast_at_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Make the C library keep freed memory.

    A training step allocates and frees the same tens of megabytes each time. If they are returned
    to the system, they are faulted in again page by page, which takes a tenth of the step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
        if mallopt is not None:
            for parameter, value in GLIBC_LIMITS.items():
                mallopt(parameter, value)
