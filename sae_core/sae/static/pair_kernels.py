"""Sums over pairs of a token and a feature, in Triton.

With (row, column, value) the pairs of a code and g = dL/dx_hat, as in `sparse_ops`:

    x_hat[row] += value * W_dec[column]                     `decode`, one program per token
    dL/dvalue  = g[row] . W_dec[column]                     `sampled`, one program per token
    dL/dW_dec[column] += value * g[row]
    dL/dW_enc[:, column] += dL/dvalue * x[row]              `gradients`, one program per segment

Both gradients need the pairs by feature, and a feature may be active on half of the tokens. So its
pairs are cut into segments of at most `SEGMENT`, each summed by its own program. Most features have
one segment, which is written where it belongs; the segments of the others are written aside and
added in a last pass. F + P / SEGMENT segments are always enough.

A program reads `WIDE` pairs at once, into as many sums, which are added at the end.

Shapes: D width of the activations, others as in `pairs`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_core.sae.static import launching
from sae_core.sae.static.pairs import Codes, Gradients

SEGMENT = 128
"""Most pairs of one feature that one program adds."""

WIDE = 4
"""Pairs that a program reads at once."""


@triton.jit
def _decode(column, value, start, W, out, N, D, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns of one row of `code @ W`."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(start + row + row // N), tl.load(start + row + row // N + 1)
    total = tl.zeros([WIDE, BLOCK], dtype=tl.float32)
    for first in range(begin, end, WIDE):
        pair = first + tl.arange(0, WIDE)
        feature = tl.load(column + pair, mask=pair < end, other=0).to(tl.int64)
        activation = tl.load(value + pair, mask=pair < end, other=0.0)
        inside = (pair < end)[:, None] & (d < D)[None, :]
        rows = tl.load(W + feature[:, None] * D + d[None, :], mask=inside, other=0.0)
        total += activation[:, None] * rows.to(tl.float32)
    tl.store(out + row * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit
def _sampled(column, start, A, W, out, N, D, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """`A[row] . W[column]` for the pairs of one row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    a = tl.load(A + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    begin, end = tl.load(start + row + row // N), tl.load(start + row + row // N + 1)
    for first in range(begin, end, WIDE):
        pair = first + tl.arange(0, WIDE)
        feature = tl.load(column + pair, mask=pair < end, other=0).to(tl.int64)
        inside = (pair < end)[:, None] & (d < D)[None, :]
        rows = tl.load(W + feature[:, None] * D + d[None, :], mask=inside, other=0.0)
        tl.store(out + pair, tl.sum(a[None, :] * rows.to(tl.float32), 1), mask=pair < end)


@triton.jit
def _segments(
    order, row, value, d_value, begin, first_segment, feature_of, aside_of, G, X,
    W_dec, W_enc, b_enc, aside_dec, aside_enc, aside_b, N, D, F, FIRST, ASIDE,
    SEGMENT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both gradients of one feature, from at most `SEGMENT` of its pairs.

    `FIRST` pairs are of the first code: they alone count in the first row of `b_enc`.
    """
    segment = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    feature = tl.load(feature_of + segment).to(tl.int64)
    if feature < F:
        part = segment - tl.load(first_segment + feature)
        all_begin, all_end = tl.load(begin + feature), tl.load(begin + feature + 1)
        own = all_begin + part * SEGMENT
        end = tl.minimum(own + SEGMENT, all_end)
        dec = tl.zeros([WIDE, BLOCK], dtype=tl.float32)
        enc = tl.zeros([WIDE, BLOCK], dtype=tl.float32)
        b_first = tl.zeros([WIDE], dtype=tl.float32)
        b_other = tl.zeros([WIDE], dtype=tl.float32)
        for at in range(own, end, WIDE):
            place = at + tl.arange(0, WIDE)
            there = place < end
            pair = tl.load(order + place, mask=there, other=0)
            token = tl.load(row + pair, mask=there, other=0).to(tl.int64)
            f = tl.load(value + pair, mask=there, other=0.0)
            df = tl.load(d_value + pair, mask=there, other=0.0)
            inside = there[:, None] & (d < D)[None, :]
            g = tl.load(G + token[:, None] * D + d[None, :], mask=inside, other=0.0)
            x = tl.load(X + (token % N)[:, None] * D + d[None, :], mask=inside, other=0.0)
            dec += f[:, None] * g.to(tl.float32)
            enc += df[:, None] * x.to(tl.float32)
            b_first += tl.where(pair < FIRST, df, 0.0)
            b_other += tl.where(pair < FIRST, 0.0, df)
        if all_end - all_begin <= SEGMENT:
            tl.store(W_dec + feature * D + d, tl.sum(dec, 0), mask=d < D)
            tl.store(W_enc + feature * D + d, tl.sum(enc, 0), mask=d < D)
            if tl.program_id(1) == 0:
                tl.store(b_enc + feature, tl.sum(b_first, 0))
                tl.store(b_enc + F + feature, tl.sum(b_other, 0))
        else:
            slot = tl.load(aside_of + feature).to(tl.int64) + part
            tl.store(aside_dec + slot * D + d, tl.sum(dec, 0), mask=d < D)
            tl.store(aside_enc + slot * D + d, tl.sum(enc, 0), mask=d < D)
            if tl.program_id(1) == 0:
                tl.store(aside_b + slot, tl.sum(b_first, 0))
                tl.store(aside_b + ASIDE + slot, tl.sum(b_other, 0))


@triton.jit
def _add_segments(
    begin, aside_of, W_dec, W_enc, b_enc, aside_dec, aside_enc, aside_b, D, F, ASIDE,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the segments of one feature, if it has several, in their order."""
    feature = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(begin + feature + 1) - tl.load(begin + feature)
    if number > SEGMENT:
        slot = tl.load(aside_of + feature).to(tl.int64)
        dec = tl.zeros([BLOCK], dtype=tl.float32)
        enc = tl.zeros([BLOCK], dtype=tl.float32)
        b_first, b_other = 0.0, 0.0
        for part in range(0, (number + SEGMENT - 1) // SEGMENT):
            dec += tl.load(aside_dec + (slot + part) * D + d, mask=d < D, other=0.0)
            enc += tl.load(aside_enc + (slot + part) * D + d, mask=d < D, other=0.0)
            b_first += tl.load(aside_b + slot + part)
            b_other += tl.load(aside_b + ASIDE + slot + part)
        tl.store(W_dec + feature * D + d, dec, mask=d < D)
        tl.store(W_enc + feature * D + d, enc, mask=d < D)
        if tl.program_id(1) == 0:
            tl.store(b_enc + feature, b_first)
            tl.store(b_enc + F + feature, b_other)


def decode(codes: Codes, W: Tensor) -> Tensor:
    """(M N, D) `code @ W`, with W (F, D)."""
    d = W.shape[1]
    block = min(1024, triton.next_power_of_2(d))
    out = torch.empty(codes.n_rows, d, device=W.device)
    grid = (codes.n_rows, triton.cdiv(d, block))
    given = codes.column, codes.value, codes.start, W, out, codes.n_tokens, d
    launching.launch(_decode, grid, *given, WIDE=WIDE, BLOCK=block)
    return out


def sampled(codes: Codes, A: Tensor, W: Tensor) -> Tensor:
    """(P,) products `A[row] . W[column]`, with A (M N, D) and W (F, D); 0 where no pair is."""
    d = W.shape[1]
    block = triton.next_power_of_2(d)
    out = torch.zeros(len(codes.row), device=W.device)
    given = codes.column, codes.start, A, W, out, codes.n_tokens, d
    shape = {"WIDE": max(1, min(WIDE, 4096 // block)), "BLOCK": block}
    launching.launch(_sampled, (codes.n_rows,), *given, **shape, num_warps=4 if d <= 2048 else 8)
    return out


def gradients(
    codes: Codes, d_value: Tensor, G: Tensor, X: Tensor, n_features: int, segment: int = SEGMENT
) -> Gradients:
    """What the pairs give the weights.

    Args:
        d_value: (P,) dL/dvalue.
        G: (M N, D) dL/dx_hat of every code.
        X: (N, D) centred activations, the same for all codes.
        segment: most pairs that one program adds.
    """
    n_pairs, d, device = len(codes.row), X.shape[1], X.device
    narrow = torch.int16 if n_features < 2**15 - 1 else torch.int32  # sorts faster
    feature, order = torch.sort(codes.column.to(narrow), stable=True)
    bounds = torch.arange(n_features + 1, dtype=narrow, device=device)
    begin = torch.searchsorted(feature, bounds, out_int32=True)
    number = begin.diff()
    n_segments = ((number + segment - 1) // segment).clamp(min=1)  # none: it writes zeros
    end = n_segments.cumsum(0, dtype=torch.int32)
    most = n_features + n_pairs // segment
    feature_of = torch.searchsorted(
        end, torch.arange(most, dtype=torch.int32, device=device), right=True, out_int32=True
    )
    aside = torch.where(number > segment, n_segments, 0)
    aside_of = aside.cumsum(0, dtype=torch.int32) - aside
    n_aside = 2 * (n_pairs // segment) + 1
    W_dec, W_enc = (torch.empty(n_features, d, device=device) for _ in range(2))
    aside_dec, aside_enc = (torch.empty(n_aside, d, device=device) for _ in range(2))
    b_enc = torch.empty(2, n_features, device=device)
    aside_b = torch.empty(2, n_aside, device=device)
    block = min(512, triton.next_power_of_2(d))
    blocks = triton.cdiv(d, block)
    out = W_dec, W_enc, b_enc, aside_dec, aside_enc, aside_b
    given = order, codes.row, codes.value, d_value, begin, end - n_segments, feature_of, aside_of
    launching.launch(
        _segments, (most, blocks), *given, G, X, *out, codes.n_tokens, d, n_features,
        codes.n_first, n_aside, SEGMENT=segment, WIDE=WIDE, BLOCK=block,
    )  # fmt: skip
    launching.launch(
        _add_segments, (n_features, blocks), begin, aside_of, *out, d, n_features, n_aside,
        SEGMENT=segment, BLOCK=block,
    )  # fmt: skip
    return Gradients(W_dec, W_enc, b_enc)
