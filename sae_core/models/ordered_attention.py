"""Attention whose gradient has the same bytes every time on a GPU.

The backward passes of PyTorch's fused attention add to the queries' gradients in whatever order
threads come. Here the forward pass is still the fused one, so that a model gives the same numbers
with gradients as without, and the backward pass computes plain attention anew, some texts at a
time, so that only the probabilities of these in one block are ever there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

SCORES = 2**26
"""Of queries and keys, that are in memory at once, unless one text has more: 1 GB with what is made
of them."""


class _Ordered(Function):
    """`scaled_dot_product_attention` of (B, H, L, D) queries, keys and values."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        *given, mask = ctx.saved_tensors
        n_texts = max(1, SCORES // (g.shape[1] * g.shape[2] * given[1].shape[2]))
        gradients = []
        for first in range(0, len(g), n_texts):
            at = slice(first, first + n_texts)
            query, key, value = own = [t[at].detach().requires_grad_() for t in given]
            own_mask = mask[at] if mask is not None and len(mask) == len(g) else mask
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(query, key, value, own_mask, **ctx.options)
                gradients.append(torch.autograd.grad(out, own, g[at]))
        return (*map(torch.cat, zip(*gradients, strict=True)), None, None)


def _ordered(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any,
    **options: Any,
) -> Tensor:  # fmt: skip
    """With the arguments of `scaled_dot_product_attention`."""
    options |= dict(zip(("dropout_p", "is_causal"), rest, strict=False))
    return _Ordered.apply(query, key, value, attn_mask, options)


class OrderedAttention(TorchFunctionMode):
    """While it is open, fused attention that records a gradient is that of this module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_attention = func is F.scaled_dot_product_attention
        called = _ordered if is_attention and torch.is_grad_enabled() else func
        return called(*args, **(kwargs or {}))
