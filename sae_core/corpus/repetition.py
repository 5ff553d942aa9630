"""Text that occurs twice in a corpus: what a text repeats of the one before it, and how much of the
held-out texts also occurs in the training texts."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

LEAST = 20
"""Characters from which on two neighbouring texts count as overlapping: fewer happen by chance."""

SAMPLE = 2000
"""Neighbours that are looked at to see whether texts overlap: one in fifty, and they do."""

STRETCH = 40
"""Characters of a stretch of text that is looked for on the other side of the split."""

MOST_STRETCHES = 200_000
"""Held-out stretches that are looked for, about; of more, a sample that their hashes choose."""

BLOCK = 2**16
"""Characters that are hashed at once: few enough for a processor's cache."""


def overlap(before: str, after: str) -> int:
    """Characters at the end of a text that the next one begins with; 0 if they are few."""
    first = before.find(after[:LEAST]) if len(after) >= LEAST else -1
    # Most texts that only begin alike, as those with one licence do, end here, at little cost.
    if first < 0 or before[-LEAST:] not in after:
        return 0
    tail = before[max(first, len(before) - len(after)) :]
    prefix, back, matched = after[: len(tail)], [0] * len(tail), 0
    for at in range(1, len(prefix)):  # Knuth, Morris and Pratt: each character is read once
        while matched and prefix[at] != prefix[matched]:
            matched = back[matched - 1]
        matched += prefix[at] == prefix[matched]
        back[at] = matched
    matched = 0
    for character in tail:
        while matched and (matched == len(prefix) or character != prefix[matched]):
            matched = back[matched - 1]
        matched += character == prefix[matched]
    return matched if matched >= LEAST else 0


def _is_overlapping(texts: Sequence[str]) -> bool:
    """Whether the texts were cut to overlap; a repetition by chance is what the author wrote."""
    n_pairs = len(texts) - 1
    pairs = range(0, n_pairs, math.ceil(n_pairs / SAMPLE) or 1)
    return sum(overlap(texts[at], texts[at + 1]) > 0 for at in pairs) > len(pairs) / 50


def cuts(texts: Sequence[str], held_out: Tensor) -> Iterator[tuple[int, str]]:
    """The index of every text that repeats what the other side has, and what is left of it.

    Where texts repeat the end of the one before, as chunks do, each character belongs to the text
    that has it first; a text of the other side is given without it.

    Args:
        held_out: (texts,) bool, the side of each text.
    """
    if not _is_overlapping(texts):
        return
    before, own = "", 0  # characters at the end of `before` that no text of the other side has
    sides = held_out.tolist()
    for index, text in enumerate(texts):
        same = index > 0 and sides[index] == sides[index - 1]
        cut = 0
        if not (same and own == len(before)):
            shared = overlap(before, text)
            cut = shared - min(shared, own) if same else shared
        if cut:
            yield index, text[cut:].lstrip()
        before, own = text, len(text) - cut


def repeated_share(train: Iterable[str], held_out: Iterable[str]) -> float:
    """The share of the held-out texts' stretches of `STRETCH` characters that also occur in the
    training texts. Takes time in proportion to the texts, which are read twice, and bounded
    memory."""
    n_stretches = sum(max(0, len(text) - STRETCH + 1) for text in held_out)
    every = max(1, math.ceil(n_stretches / MOST_STRETCHES))
    wanted = torch.cat([torch.empty(0, dtype=torch.long), *_hashes(held_out, every)])
    if wanted.numel() == 0:
        return 0.0
    wanted, counts = wanted.unique(return_counts=True)
    found = torch.zeros(len(wanted), dtype=torch.bool)
    for hashes in _hashes(train, every):
        at = torch.searchsorted(wanted, hashes).clamp(max=len(wanted) - 1)
        found[at[wanted[at] == hashes]] = True
    return int(counts[found].sum()) / int(counts.sum())


def _hashes(texts: Iterable[str], every: int) -> Iterator[Tensor]:
    """For blocks of texts, the hashes of their stretches: all, or the lowest one in `every`."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK:
            yield _hashes_of_block(block, every)
            block, size = [], 0
    yield _hashes_of_block(block, every)


def _hashes_of_block(texts: list[str], every: int) -> Tensor:
    joined = "".join(f"{text}\0" for text in texts if len(text) >= STRETCH)
    if not joined:
        return torch.empty(0, dtype=torch.long)
    encoded = bytearray(joined.encode("utf-32-le"))
    characters = torch.frombuffer(encoded, dtype=torch.int32).long()
    hashes, length, power = characters, 1, 0x5851F42D4C957F2D
    eight = hashes, power
    while length < 32:  # sums of characters times powers, modulo 2^64, of twice the length
        hashes = hashes[:-length] * power + hashes[length:]
        length, power = 2 * length, _wrapped(power * power)
        if length == STRETCH - 32:
            eight = hashes, power
    hashes = hashes[: -(STRETCH - 32)] * eight[1] + eight[0][32:]
    chosen = torch.ones_like(hashes, dtype=torch.bool)
    if every > 1:
        chosen = hashes < 2**64 // every - 2**63
    ends = (characters == 0).nonzero()
    across = ends - torch.arange(STRETCH)  # stretches that are not within one text
    chosen[across.clamp(max=len(chosen) - 1)] = False
    return hashes[chosen]


def _wrapped(number: int) -> int:
    """The number as a signed integer of 64 bits holds it."""
    return (number + 2**63) % 2**64 - 2**63
