"""Random streams: each is a pure function of the seed and of its purpose."""

import hashlib

import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose, such as `generator(420, "crop", pass_index)`.

    Streams for different purposes are independent, so drawing from one never shifts another.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
