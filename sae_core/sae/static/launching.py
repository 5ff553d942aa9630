"""The one place where kernels are launched, so a test can count them or leave them out."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a Triton kernel on a grid of programs."""
    kernel[grid](*args, **constants)
