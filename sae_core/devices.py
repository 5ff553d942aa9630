"""Where to compute, and in which number format."""

import torch

from sae_core.errors import SAEError


def pick_device(device: str) -> torch.device:
    """The device of that name; `auto` is CUDA, then MPS, then the CPU.

    Raises:
        SAEError: this machine does not have it.
    """
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
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number format of that name; `auto` is bfloat16 where the hardware multiplies it fast
    (AVX512-BF16 or AMX on a CPU, bf16 tensor cores on CUDA) and float32 elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16", False) or can.get("amx_bf16", False)
        return torch.bfloat16 if fast else torch.float32
    return torch.float32
