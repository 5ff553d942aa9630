"""The KL of two models' logits and its gradient, in Triton, with one program per token.

With a, b (V,) the logits of the clean and the spliced model and p = softmax(a), q = softmax(b),

    KL = sum p (a - b) - logsumexp(a) + logsumexp(b)        d KL / db = q - p

A program reads both rows twice: first for the three sums, each with a running largest logit per
lane, so that nothing overflows and every sum has one order; then for the gradient, which takes the
place of the clean logits. With logits in bfloat16 the two of a word cost 16 bytes of memory
traffic: 4 are written by the two products, 8 read here, 2 written, and 2 read by the product that
takes the gradient back to the hidden states. Softmax and gradient by PyTorch's operations, in
float32, cost 80.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_core.sae.static import launching

BLOCK = 2048
WARPS = 8

NONE = tl.constexpr(-3e38)
"""In place of a logit beyond the vocabulary: less than where the largest logits begin."""


@triton.jit
def _kl(clean, spliced, kl, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Of one token; the gradient is written over the clean logits."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top_a = tl.full([BLOCK], -1e30, dtype=tl.float32)
    top_b = tl.full([BLOCK], -1e30, dtype=tl.float32)
    sum_a = tl.zeros([BLOCK], dtype=tl.float32)
    sum_b = tl.zeros([BLOCK], dtype=tl.float32)
    sum_ab = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        inside = first + lane < vocabulary
        at = row * vocabulary + first + lane
        a = tl.load(clean + at, mask=inside, other=NONE).to(tl.float32)
        b = tl.load(spliced + at, mask=inside, other=NONE).to(tl.float32)
        new_a, new_b = tl.maximum(top_a, a), tl.maximum(top_b, b)
        shrink, weight = tl.exp(top_a - new_a), tl.exp(a - new_a)
        sum_ab = sum_ab * shrink + tl.where(weight != 0, weight * (a - b), 0.0)
        sum_a = sum_a * shrink + weight
        sum_b = sum_b * tl.exp(top_b - new_b) + tl.exp(b - new_b)
        top_a, top_b = new_a, new_b
    most_a, most_b = tl.max(top_a, 0), tl.max(top_b, 0)
    scale = tl.exp(top_a - most_a)
    total_a = tl.sum(sum_a * scale, 0)
    total_b = tl.sum(sum_b * tl.exp(top_b - most_b), 0)
    log_a, log_b = most_a + tl.log(total_a), most_b + tl.log(total_b)
    tl.store(kl + row, tl.sum(sum_ab * scale, 0) / total_a - log_a + log_b)
    if GRADIENT:
        for first in range(0, vocabulary, BLOCK):
            inside = first + lane < vocabulary
            at = row * vocabulary + first + lane
            a = tl.load(clean + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(spliced + at, mask=inside, other=0.0).to(tl.float32)
            difference = tl.exp(b - log_b) - tl.exp(a - log_a)
            tl.store(clean + at, difference.to(clean.dtype.element_ty), mask=inside)


def kl_of_logits(
    clean: Tensor, spliced: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """See `losses.kl_of_logits`; the gradient takes the memory of `clean`."""
    n, vocabulary = clean.shape
    clean, spliced = clean.contiguous(), spliced.contiguous()
    kl = torch.empty(n, device=clean.device)
    constants = {"GRADIENT": with_gradient, "BLOCK": BLOCK, "num_warps": WARPS}
    launching.launch(_kl, (n,), clean, spliced, kl, vocabulary, **constants)
    return kl, clean if with_gradient else None
