"""The number formats of the encoder product, and their choice for a device."""

from typing import NamedTuple

import torch

from sae_core.utils.devices import is_fast_at_bfloat16


class Precision(NamedTuple):
    """The number formats of the encoder product. Weights and gradients are in float32, and so is
    every sum over pairs; products with a code that is dense have the format of its values, and so
    have the rows that the pairs of a static step read."""

    matmul_dtype: torch.dtype
    """Number format in which the product is computed."""
    value_dtype: torch.dtype
    """Number format of the code's values. If it is another, the product only finds candidates."""

    def with_values(self, dtype: torch.dtype) -> "Precision":
        """The same product with values in another format."""
        return self._replace(value_dtype=dtype)


def pick_precision(compute_dtype: str, device: torch.device) -> Precision:
    """The formats of the encoder product for `auto`, `float32` or `bfloat16`.

    `auto` is bfloat16 where the hardware is fast at it. float32 is exact, and uses a fast bfloat16
    product to find out which entries have to be computed.
    """
    product = torch.bfloat16 if is_fast_at_bfloat16(device) else torch.float32
    if compute_dtype == "auto":
        return Precision(product, product)
    values: torch.dtype = getattr(torch, compute_dtype)
    return Precision(product if values == torch.float32 else values, values)
