"""The one place from which kernels are launched: a test can count them there, or leave them out."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a Triton kernel in `grid` programs."""
    kernel[grid](*args, **constants)
