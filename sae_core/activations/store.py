"""Where the trainer's batches come from: one pass of the model into shards, or the model itself.

Both sources read the same windows in the same order through the same shuffle, so with equal
settings they give the same batches. One epoch is one pass over the windows in a random order;
about `SHUFFLE_TOKENS` activations at a time are gathered from them and shuffled. Activations of
excluded tokens are gathered like all others, stored ones too, and left out when they are shuffled.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_core.activations.loader import Chunk, Form, one_ahead, shuffled_chunks
from sae_core.activations.shards import Manifest, WindowFile, cover, windows_sha256
from sae_core.activations.token_windows import TokenWindows, seen_tokens
from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.train_config import BatchSize
from sae_core.utils.errors import SAEError
from sae_core.utils.seeding import generator
from sae_core.utils.transfer import to_device

CPU = torch.device("cpu")

CALIBRATION_TOKENS = 2**16
"""Held-out activations that an inference threshold is calibrated on, about."""

SHUFFLE_TOKENS = 2**18
"""Minimum number of activations that are shuffled together (or all, if there are fewer)."""

READERS = min(8, os.cpu_count() or 1)
"""Threads that read and check windows."""

StepSize = int | Callable[[int], int]
"""Activations in a training batch, or what gives them from those in an epoch."""


class ActivationSource(ABC):
    """Batches of activations at one hook, in an order that depends only on seed and epoch.

    For a transcoder, a row is the activation at the hook followed by the one at its target: D is
    then the width of both together.

    Args:
        n_train, n_validation: windows.
        positions: activations a window gives.
        tokens_per_step: activations in a training batch; an epoch is never less than one.
        seed: of the order.
        windows: with the tokens of the windows, if some are excluded.

    Raises:
        SAEError: too many tokens are excluded.
    """

    def __init__(
        self,
        n_train: int,
        n_validation: int,
        positions: int,
        tokens_per_step: StepSize,
        seed: int,
        windows: TokenWindows | None = None,
    ) -> None:
        self.n_train, self.n_validation, self.positions = n_train, n_validation, positions
        self._excluding = windows if windows and windows.excluded else None
        if self._excluding and self.n_rows < 1:
            raise SAEError(
                f"--excluded-tokens: {self._excluding.n_excluded} tokens of the training texts, of "
                f"{n_train * positions} in whole windows, are excluded; exclude fewer, or give "
                "more text"
            )
        size = tokens_per_step if isinstance(tokens_per_step, int) else tokens_per_step(self.n_rows)
        self.tokens_per_step, self.seed = min(size, self.n_rows), seed
        self._drawn: tuple[int, Tensor] | None = None
        """The last order, and its epoch: each step that takes whole windows looks at it."""
        self._counted: tuple[int, Tensor] | None = None
        """The last `_ends`, and their epoch."""

    @abstractmethod
    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        """(W, positions, D) activations of the windows `indices` (W,) of a part."""

    def identity(self) -> dict[str, Any]:
        """What the batches depend on, besides the activations themselves, as JSON values."""
        names = ("n_train", "n_validation", "positions", "tokens_per_step", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def n_rows(self) -> int:
        """Activations in an epoch, at least: where tokens are excluded, each pass cuts them off, or
        has them on position 0, in other places."""
        excluded = self._excluding.n_excluded if self._excluding else 0
        return self.n_train * self.positions - excluded

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; what is left over differs from epoch to epoch."""
        return self.n_rows // self.tokens_per_step

    @property
    def shuffle_windows(self) -> int:
        """Windows whose activations are shuffled together."""
        return min(self.n_train, -(-SHUFFLE_TOKENS // self.positions))

    def pass_of(self, epoch: int) -> int:
        """The pass over the texts that an epoch reads; each pass cuts them differently."""
        return epoch

    def train_batches(
        self, epoch: int, n_steps: int | None = None, skip: int = 0
    ) -> Iterator[Tensor]:
        """(tokens_per_step, D) batches of one epoch, in the model's number format.

        If `n_steps` is given, only the first `n_steps` batches, and only the windows that they need
        are read. The first `skip` of these are left out, and windows that only they need are not
        read.
        """
        order = self._order(epoch)
        if n_steps is None:
            n_steps = self.steps_per_epoch
        if n_steps < self.steps_per_epoch:
            order = order[: self._n_windows(epoch, n_steps * self.tokens_per_step)]
        yield from islice(self._batches(epoch, order, skip), max(0, n_steps - skip))

    def windows_of(self, epoch: int, step: int) -> Tensor:
        """(W,) the training windows of step `step` (from 0) of an epoch, when it takes whole ones:
        `tokens_per_step / positions` on average, and at least one.

        They follow the windows that `train_batches` reads for the steps before.
        """
        tokens = max(self.tokens_per_step, self.positions)
        first, last = (self._n_windows(epoch, number * tokens) for number in (step, step + 1))
        return self._order(epoch)[torch.arange(first, last) % self.n_train]

    def _order(self, epoch: int) -> Tensor:
        if self._drawn is None or self._drawn[0] != epoch:
            draw = generator(self.seed, "order", epoch)
            self._drawn = epoch, torch.randperm(self.n_train, generator=draw)
        return self._drawn[1]

    def _kept(self, part: str, epoch: int, indices: Tensor) -> Tensor | None:
        """(W * positions,) bool: which activations of the windows `indices` (W,) take part; None if
        all do."""
        windows, train = self._excluding, part == "train"
        if windows is None:
            return None
        tokens = (
            windows.train(self.pass_of(epoch), indices) if train else windows.validation(indices)
        )
        return seen_tokens(tokens, windows.excluded)[:, 1:].flatten()

    def _ends(self, epoch: int) -> Tensor:
        """(n_train,) how many activations take part in the first windows of an epoch's order, for
        every number of them from 1 on."""
        if self._counted is None or self._counted[0] != epoch:
            kept = (
                self._kept("train", epoch, windows)
                for windows in self._order(epoch).split(self.shuffle_windows)
            )
            counts = [some.view(-1, self.positions).sum(1) for some in kept if some is not None]
            self._counted = epoch, torch.cat(counts).cumsum(0)
        return self._counted[1]

    def _n_windows(self, epoch: int, n_rows: int) -> int:
        """How many windows of an epoch's order it takes for so many activations; after the last
        comes the first again."""
        if self._excluding is None:
            return -(-n_rows // self.positions)
        ends = self._ends(epoch)
        rounds, rest = divmod(n_rows, int(ends[-1]))
        return rounds * self.n_train + (int(torch.searchsorted(ends, rest)) + 1 if rest else 0)

    def _place(self, epoch: int, row: int) -> tuple[int, int]:
        """The chunk that has an epoch's activation number `row`, and its place there."""
        if self._excluding is None:
            return divmod(row, self.shuffle_windows * self.positions)
        ends = self._ends(epoch)[self.shuffle_windows - 1 :: self.shuffle_windows].contiguous()
        chunk = int(torch.searchsorted(ends, row, right=True))
        return chunk, row - (int(ends[chunk - 1]) if chunk else 0)

    def _batches(self, epoch: int, order: Tensor, skip: int) -> Iterator[Tensor]:
        first, row = self._place(epoch, skip * self.tokens_per_step)
        left_over: list[Tensor] = []
        for rows in self.shuffled(epoch, order, first):
            # The chunk itself is not copied: it may be large.
            begun = row + self.tokens_per_step - sum(map(len, left_over))
            start = torch.cat([*left_over, rows[row:begun]])
            batches = [start]
            if begun < len(rows):
                batches += rows[begun:].split(self.tokens_per_step)
            *batches, last = batches
            yield from batches
            left_over, row = [last], 0
        if len(last) == self.tokens_per_step:
            yield last

    def shuffled(self, epoch: int, order: Tensor, first: int = 0) -> Iterator[Tensor]:
        """(about `SHUFFLE_TOKENS`, D) chunks of activations of the windows `order`, with the tokens
        in random order; the first `first` chunks are left out."""
        for windows, drawn in self.chunks(epoch, order, first):
            yield self.read("train", epoch, windows).flatten(0, 1)[drawn]

    def chunks(self, epoch: int, order: Tensor, first: int = 0) -> Iterator[Chunk]:
        """What is shuffled together."""
        parts = enumerate(order.split(self.shuffle_windows))
        for number, windows in islice(parts, first, None):
            draw = generator(self.seed, "shuffle", epoch, number)
            drawn = torch.randperm(len(windows) * self.positions, generator=draw)
            kept = self._kept("train", epoch, windows)
            yield Chunk(windows, drawn if kept is None else drawn[kept[drawn]])

    def validation_windows(self, stride: int = 1) -> Iterator[Tensor]:
        """(W,) the windows of each validation batch, taking one validation window in `stride`."""
        per_batch = max(1, self.tokens_per_step // self.positions)
        if self.n_validation:
            yield from torch.arange(0, self.n_validation, stride).split(per_batch)

    def validation_batches(self, stride: int = 1) -> Iterator[Tensor]:
        """(at most tokens_per_step, D) batches of the validation windows."""
        for indices in self.validation_windows(stride):
            yield from self._validating(indices, self.read("validation", 0, indices).flatten(0, 1))

    def _validating(self, indices: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Of the activations (W * positions, D) of validation windows (W,) those that take part, if
        there are any."""
        kept = self._kept("validation", 0, indices)
        rows = rows if kept is None else rows[kept.to(rows.device)]
        if len(rows):
            yield rows

    def calibration_batches(self) -> Iterator[Tensor]:
        """About `CALIBRATION_TOKENS` of them, in windows from the whole of the held-out texts."""
        stride = -(-self.n_validation * self.positions // CALIBRATION_TOKENS)
        return self.validation_batches(max(1, stride))


class StreamingSource(ActivationSource):
    """Straight from the model: nothing on disk, new crops every epoch.

    Args:
        batch_size: windows per forward pass.
        target: of a transcoder.
        group: the processes that share the training, and so the passes.
    """

    def __init__(
        self,
        model: LanguageModel,
        windows: TokenWindows,
        hook: Hook,
        *,
        batch_size: BatchSize,
        tokens_per_step: StepSize,
        seed: int,
        target: Hook | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__(
            windows.n_train, windows.n_validation, windows.positions, tokens_per_step, seed, windows
        )
        self.model, self.windows, self.hooks = model, windows, _hooks(hook, target)
        self.microbatch = model.forward_microbatch(windows.length, batch_size)
        self.group = group

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        if part == "train":
            tokens = self.windows.train(self.pass_of(epoch), indices)
        else:
            tokens = self.windows.validation(indices)

        tokens = tokens[self.group.shard(len(tokens))]

        def activations(part: slice) -> Tensor:
            found = self.model.activations(tokens[part], self.hooks)
            return torch.cat([found[hook][:, 1:] for hook in self.hooks], dim=-1)

        own = torch.cat(list(self.microbatch.parts(len(tokens), activations)))
        return torch.cat(self.group.all_gather(own))


def _hooks(hook: Hook, target: Hook | None) -> list[Hook]:
    return [hook, target] if target else [hook]


class CachedSource(ActivationSource):
    """From the shards of a harvest. Epoch e reads pass e modulo `passes`.

    Args:
        target: of a transcoder.
        device: that the batches are to be on.
        windows: that the activations are of, as `is_of` can tell; only needed to exclude tokens.

    Raises:
        SAEError: the shards are incomplete, damaged or do not hold the hooks, or too many tokens
            are excluded.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        hook: Hook,
        *,
        tokens_per_step: StepSize,
        seed: int,
        target: Hook | None = None,
        device: torch.device = CPU,
        windows: TokenWindows | None = None,
    ) -> None:
        manifests = [Manifest.load(folder) for folder in folders]
        first = manifests[0]
        for folder, manifest in zip(folders, manifests, strict=True):
            if not manifest.same_harvest(first):
                raise SAEError(
                    f"{folder}: belongs to another harvest than {folders[0]}; give the shards of "
                    "one harvest"
                )
        self.d_in, self.dtype = first.d_in, first.dtype
        self.passes, self.bos = first.passes, first.bos
        self._windows_sha256 = first.windows_sha256
        self._files: dict[str, list[tuple[int, list[WindowFile]]]] = {}
        for part, total in first.total.items():
            if not cover(manifests, part, total):
                raise SAEError(
                    f"{folders[0]}: {len(folders)} shards do not add up to its {total} {part} "
                    "windows; give every shard of the harvest once"
                )
            self._files[part] = [
                (
                    manifest.first[part],
                    [WindowFile(folder, at.spec, part, manifest) for at in _hooks(hook, target)],
                )
                for folder, manifest in zip(folders, manifests, strict=True)
            ]
        dtype: torch.dtype = getattr(torch, first.dtype)
        self.form = Form(len(_hooks(hook, target)), first.positions, first.d_in, dtype)
        self.device, self._readers = device, ThreadPoolExecutor(READERS)
        super().__init__(
            first.total["train"] // first.passes,
            first.total["validation"],
            first.positions,
            tokens_per_step,
            seed,
            windows,
        )

    def shuffled(self, epoch: int, order: Tensor, first: int = 0) -> Iterator[Tensor]:
        def read(rows: Tensor, windows: Tensor) -> None:
            self._fill(rows, "train", epoch, windows)

        chunks = self.chunks(epoch, order, first)
        return shuffled_chunks(chunks, read, self.form, self.shuffle_windows, self.device)

    def validation_batches(self, stride: int = 1) -> Iterator[Tensor]:
        for batch in one_ahead(super().validation_batches(stride)):
            yield to_device(batch, self.device)

    def is_of(self, windows: TokenWindows) -> bool:
        """Whether the activations are of these windows, and not of as many others."""
        return windows_sha256(windows) == self._windows_sha256

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"passes": self.passes, "dtype": self.dtype}

    def pass_of(self, epoch: int) -> int:
        return epoch % self.passes

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        rows = torch.empty(self.form.of(len(indices)), dtype=self.form.dtype)
        self._fill(rows, part, epoch, indices)
        return torch.cat(list(rows), dim=-1) if len(rows) > 1 else rows[0]

    def _fill(self, rows: Tensor, part: str, epoch: int, indices: Tensor) -> None:
        """Read windows (W,) of a part into (S, W, positions, D), some in each thread."""
        if part == "train":
            indices = indices + self.pass_of(epoch) * self.n_train
        jobs = []
        for first, files in self._files[part]:
            here = (indices >= first) & (indices < first + len(files[0]))
            places = here.nonzero().flatten()
            if len(places) == 0:
                continue
            for some in places.chunk(2 * READERS):
                own = (indices[some] - first).tolist()
                for file, site in zip(files, rows, strict=True):
                    jobs.append(self._readers.submit(file.read, site, some.tolist(), own))
        wait(jobs)
        for job in jobs:
            job.result()
