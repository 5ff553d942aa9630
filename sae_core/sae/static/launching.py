"""The one place where kernels are launched, so a test can count them or leave them out."""

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a Triton kernel on a grid of programs, on the GPU of its first argument. By itself Triton
    takes the current one, and a language model can be spread over several."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)
