"""Which code computes a static step: Triton's kernels on an NVIDIA GPU, PyTorch elsewhere."""

import importlib.util
import subprocess
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.sae.static import dense, twin
from sae_core.sae.static.pairs import Gradients, Prepared, Slots
from sae_core.utils.errors import one_line


class Backend(NamedTuple):
    """The operations that read or write most, see the modules of the kernels."""

    prepare: Callable[..., Prepared]
    errors: Callable[..., tuple[Tensor, Tensor, Tensor]]
    spread: Callable[..., None]
    select: Callable[..., Slots]
    decode: Callable[..., Tensor]
    sampled: Callable[..., Tensor]
    gradients: Callable[..., Gradients]
    terms: Callable[..., tuple[Tensor, Tensor]]
    decide: Callable[..., Tensor]
    squares: Callable[..., tuple[Tensor, Tensor]]
    move_decoder: Callable[..., None]
    move_encoder: Callable[..., None]
    move_vector: Callable[..., None]

    def densely(self) -> "Backend":
        """The same with dense products in place of sums over pairs."""
        return self._replace(decode=dense.decode, sampled=dense.sampled, gradients=dense.gradients)


TWIN = Backend(*(getattr(twin, name) for name in Backend._fields))


def kernels() -> Backend:
    """Those in Triton, which comes with PyTorch for CUDA."""
    from sae_core.sae.static import (
        pair_kernels,
        row_kernels,
        scalar_kernels,
        select_kernels,
        update_kernels,
    )

    return Backend(
        row_kernels.prepare,
        row_kernels.errors,
        row_kernels.spread,
        select_kernels.select,
        pair_kernels.decode,
        pair_kernels.sampled,
        pair_kernels.gradients,
        scalar_kernels.terms,
        scalar_kernels.decide,
        update_kernels.squares,
        update_kernels.move_decoder,
        update_kernels.move_encoder,
        update_kernels.move_vector,
    )


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels can run there: Triton needs an Ampere GPU for bfloat16, and a C compiler
    for what launches them."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device)[0] >= 8
        and _can_launch()
    )


@cache
def _can_launch() -> bool:
    """Whether Triton can build what launches kernels; says so if not. It builds it once."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (RuntimeError, OSError, AssertionError, subprocess.CalledProcessError) as error:
        print(
            f"GPU: Triton cannot launch kernels ({one_line(error)}), so steps take slower code; it "
            "needs gcc, Python's headers (Debian: gcc libc6-dev python3-dev) and a folder that it "
            "may write to (TRITON_CACHE_DIR)",
            flush=True,
        )
        return False
    return True


def backend_for(device: torch.device) -> Backend:
    """The kernels where they can run, and their twins elsewhere."""
    return kernels() if has_kernels(device) else TWIN
