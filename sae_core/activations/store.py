"""Where the trainer's batches come from: one pass of the model into shards, or the model itself.

Both sources read the same windows in the same order through the same shuffle, so that with equal
settings they give the same batches. One epoch is one pass over the windows in a random order;
about `SHUFFLE_TOKENS` activations at a time are gathered from them and shuffled.

A shard is a folder: `manifest.json`, and for each hook one file of raw activations
(windows, positions, D) for training and one for validation, read back memory-mapped.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sae_core.activations.language_model import Hook, LanguageModel
from sae_core.activations.token_windows import TokenWindows
from sae_core.errors import SAEError
from sae_core.files import check_space, new_folder, write_file, writing
from sae_core.memory import WorkingUnit
from sae_core.parallel import ALONE, Everyone
from sae_core.records import read_record
from sae_core.seeding import generator

SHUFFLE_TOKENS = 2**18
"""Activations that are shuffled together, at least (or all there are)."""

Item = TypeVar("Item")

Found = dict[Hook, Tensor]
"""(B, L, D) activations at each hook."""

Parts = dict[str, int]
"""Windows in each part of a shard: `train` and `validation`."""


class ActivationSource(ABC):
    """Batches of activations at one hook, in an order that depends on seed and epoch alone.

    For a transcoder, a row is the activation at the hook and, behind it, that at its target: where
    D stands here, it is the width of both together.

    Args:
        n_train, n_validation: windows.
        positions: activations a window gives.
        tokens_per_step: activations in a training batch.
        seed: of the order.
    """

    def __init__(
        self, n_train: int, n_validation: int, positions: int, tokens_per_step: int, seed: int
    ) -> None:
        self.n_train, self.n_validation, self.positions = n_train, n_validation, positions
        self.tokens_per_step, self.seed = min(tokens_per_step, n_train * positions), seed

    @abstractmethod
    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        """(W, positions, D) activations of the windows `indices` (W,) of a part."""

    def identity(self) -> dict[str, Any]:
        """What the batches depend on, besides the activations themselves, as JSON values."""
        names = ("n_train", "n_validation", "positions", "tokens_per_step", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; what is left over differs from epoch to epoch."""
        return self.n_train * self.positions // self.tokens_per_step

    @property
    def shuffle_windows(self) -> int:
        """Windows whose activations are shuffled together."""
        return min(self.n_train, -(-SHUFFLE_TOKENS // self.positions))

    def pass_of(self, epoch: int) -> int:
        """The pass over the texts, which cuts them in a way of its own, that an epoch reads."""
        return epoch

    def train_batches(
        self, epoch: int, n_steps: int | None = None, skip: int = 0
    ) -> Iterator[Tensor]:
        """(tokens_per_step, D) batches of one epoch, in the model's number format.

        Of the first `n_steps` alone, if given: only the windows that they need are read. The first
        `skip` of these are left out, and the windows that only they need are not read.
        """
        order = self._order(epoch)
        if n_steps is None:
            n_steps = self.steps_per_epoch
        if n_steps < self.steps_per_epoch:
            order = order[: -(-n_steps * self.tokens_per_step // self.positions)]
        yield from islice(self._batches(epoch, order, skip), max(0, n_steps - skip))

    def windows_of(self, epoch: int, step: int) -> Tensor:
        """(W,) the training windows of step `step` (from 0) of an epoch, when it takes whole ones:
        `tokens_per_step / positions` on average, and at least one.

        They follow those that `train_batches` reads for the steps before.
        """
        tokens = max(self.tokens_per_step, self.positions)
        first, last = (-(-number * tokens // self.positions) for number in (step, step + 1))
        return self._order(epoch)[torch.arange(first, last) % self.n_train]

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.n_train, generator=generator(self.seed, "order", epoch))

    def _batches(self, epoch: int, order: Tensor, skip: int) -> Iterator[Tensor]:
        rows_together = self.shuffle_windows * self.positions
        first, row = divmod(skip * self.tokens_per_step, rows_together)
        left_over: list[Tensor] = []
        for rows in self.shuffled(epoch, order, first):
            *batches, last = torch.cat([*left_over, rows[row:]]).split(self.tokens_per_step)
            yield from batches
            left_over, row = [last], 0
        if len(last) == self.tokens_per_step:
            yield last

    def shuffled(self, epoch: int, order: Tensor, first: int = 0) -> Iterator[Tensor]:
        """(about `SHUFFLE_TOKENS`, D) activations at a time of the windows `order`, tokens in
        random order; the first `first` times are left out."""
        parts = enumerate(order.split(self.shuffle_windows))
        for number, indices in islice(parts, first, None):
            rows = self.read("train", epoch, indices).flatten(0, 1)
            draw = generator(self.seed, "shuffle", epoch, number)
            yield rows[torch.randperm(len(rows), generator=draw)]

    def validation_windows(self) -> Iterator[Tensor]:
        """(W,) the validation windows of each validation batch, always the same."""
        per_batch = max(1, self.tokens_per_step // self.positions)
        if self.n_validation:
            yield from torch.arange(self.n_validation).split(per_batch)

    def validation_batches(self) -> Iterator[Tensor]:
        """(at most tokens_per_step, D) batches of the validation windows."""
        for indices in self.validation_windows():
            yield self.read("validation", 0, indices).flatten(0, 1)


class StreamingSource(ActivationSource):
    """Straight from the model: nothing on disk, new crops every epoch.

    Args:
        batch_size: windows in a forward pass.
        target: of a transcoder.
        everyone: the processes that share the training, and so the passes.
    """

    def __init__(
        self,
        model: LanguageModel,
        windows: TokenWindows,
        hook: Hook,
        *,
        batch_size: int,
        tokens_per_step: int,
        seed: int,
        target: Hook | None = None,
        everyone: Everyone = ALONE,
    ) -> None:
        super().__init__(
            windows.n_train, windows.n_validation, windows.positions, tokens_per_step, seed
        )
        self.model, self.windows, self.hooks = model, windows, _hooks(hook, target)
        self.unit = model.forward_unit(windows.length, batch_size)
        self.everyone = everyone

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        if part == "train":
            tokens = self.windows.train(self.pass_of(epoch), indices)
        else:
            tokens = self.windows.validation(indices)

        tokens = tokens[self.everyone.own(len(tokens))]

        def activations(part: slice) -> Tensor:
            found = self.model.activations(tokens[part], self.hooks)
            return torch.cat([found[hook][:, 1:] for hook in self.hooks], dim=-1)

        own = torch.cat(list(self.unit.parts(len(tokens), activations)))
        return torch.cat(self.everyone.gather(own))


def _hooks(hook: Hook, target: Hook | None) -> list[Hook]:
    return [hook, target] if target else [hook]


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds."""

    hooks: list[str]
    dtype: str
    d_in: int
    positions: int
    passes: int
    windows: Parts
    """Windows of this shard, by part; training windows are numbered pass after pass."""
    first: Parts
    """The number of its first window, by part."""
    total: Parts
    """Windows of the whole harvest, by part."""
    bos: int | None
    """The token that windows begin with, if any."""

    checksum: str = ""
    """Of the rest, so that a manifest that somebody edited is found out."""

    def save(self, path: Path) -> None:
        """Write the manifest as JSON."""
        checked = replace(self, checksum=self._checksum())
        write_file(path, json.dumps(asdict(checked), indent=2) + "\n")

    def _checksum(self) -> str:
        fields = json.dumps(asdict(replace(self, checksum="")), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a shard's manifest.

        Raises:
            SAEError: it is missing or not one of ours.
        """
        path = folder / "manifest.json"
        manifest = read_record(cls, path, "shard", "harvest again")
        if manifest.checksum != manifest._checksum():
            raise SAEError(f"{path}: not as it was written; harvest again")
        return replace(manifest, checksum="")

    def same_harvest(self, other: "Manifest") -> bool:
        """Whether both are of one harvest, and differ but in their windows."""
        return replace(self, windows={}, first={}) == replace(other, windows={}, first={})


def _file(folder: Path, hook_spec: str, part: str) -> Path:
    return folder / f"{hook_spec}.{part}.bin"


def harvest(
    model: LanguageModel,
    windows: TokenWindows,
    hooks: Sequence[Hook],
    folder: Path,
    *,
    batch_size: int,
    passes: int = 1,
    shard: int = 0,
    n_shards: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the activations of every window at every hook, in one pass of the model.

    Position 0 is left out: it never trains an SAE. With several shards, each takes a run of the
    windows, and together they hold what one would. A shard that was there before stays until the
    new one is whole.

    Args:
        progress: called with the windows done and the windows in all.

    Raises:
        SAEError: it does not fit on the disk, or cannot be written.
    """
    parts = {"train": windows.n_train * passes, "validation": windows.n_validation}
    runs = {part: (n * shard // n_shards, n * (shard + 1) // n_shards) for part, n in parts.items()}
    done, total = 0, sum(stop - start for start, stop in runs.values())
    manifest = Manifest(
        hooks=[hook.spec for hook in hooks],
        dtype=str(model.dtype).removeprefix("torch."),
        d_in=model.d_model,
        positions=windows.positions,
        passes=passes,
        windows={part: stop - start for part, (start, stop) in runs.items()},
        first={part: start for part, (start, _) in runs.items()},
        total=parts,
        bos=windows.bos,
    )
    n_bytes = total * windows.positions * model.d_model * model.dtype.itemsize * len(hooks)
    unit = model.forward_unit(windows.length, batch_size)
    with writing(folder, n_bytes), new_folder(folder) as staging:
        check_space(folder, n_bytes, "free some, or harvest fewer layers or --passes")
        for part, run in runs.items():
            for n_windows in _harvest_part(model, windows, hooks, staging, part, run, unit):
                done += n_windows
                progress(done, total)
        manifest.save(staging / "manifest.json")
    return manifest


def _harvest_part(
    model: LanguageModel,
    windows: TokenWindows,
    hooks: Sequence[Hook],
    folder: Path,
    part: str,
    run: tuple[int, int],
    unit: WorkingUnit,
) -> Iterator[int]:
    """Write the windows `run[0]` to `run[1]` of a part; gives how many each forward pass had."""
    indices = torch.arange(*run)

    def activations(at: slice) -> Found:
        return model.activations(_window_tokens(windows, part, indices[at]), hooks)

    with ExitStack() as stack:
        files = {
            hook: stack.enter_context(_file(folder, hook.spec, part).open("wb")) for hook in hooks
        }
        for found in unit.parts(len(indices), activations):
            for hook, values in found.items():
                rows = values[:, 1:].cpu().contiguous()
                files[hook].write(rows.view(torch.uint8).numpy().data)
            yield len(rows)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())


def _window_tokens(windows: TokenWindows, part: str, indices: Tensor) -> Tensor:
    if part == "validation":
        return windows.validation(indices)
    pass_index = indices // windows.n_train
    return torch.cat(
        [
            windows.train(int(p), indices[pass_index == p] - int(p) * windows.n_train)
            for p in pass_index.unique()
        ]
    )


class CachedSource(ActivationSource):
    """From the shards of a harvest, memory-mapped. Epoch e reads pass e modulo `passes`.

    Args:
        target: of a transcoder.

    Raises:
        SAEError: the shards are incomplete, damaged or do not hold the hooks.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        hook: Hook,
        *,
        tokens_per_step: int,
        seed: int,
        target: Hook | None = None,
    ) -> None:
        manifests = [Manifest.load(folder) for folder in folders]
        first = manifests[0]
        for folder, manifest in zip(folders, manifests, strict=True):
            if not manifest.same_harvest(first):
                raise SAEError(
                    f"{folder}: of another harvest than {folders[0]}; give the shards of one"
                )
        self.d_in, self.dtype = first.d_in, first.dtype
        self.passes, self.bos = first.passes, first.bos
        self._maps: dict[str, list[tuple[int, list[Tensor]]]] = {}
        for part, total in first.total.items():
            if not _cover(manifests, part, total):
                raise SAEError(
                    f"{folders[0]}: {len(folders)} shards do not make up its {total} {part} "
                    "windows; give every shard of the harvest once"
                )
            self._maps[part] = [
                (
                    manifest.first[part],
                    [_map(folder, at.spec, part, manifest) for at in _hooks(hook, target)],
                )
                for folder, manifest in zip(folders, manifests, strict=True)
            ]
        super().__init__(
            first.total["train"] // first.passes,
            first.total["validation"],
            first.positions,
            tokens_per_step,
            seed,
        )

    def shuffled(self, epoch: int, order: Tensor, first: int = 0) -> Iterator[Tensor]:
        return one_ahead(super().shuffled(epoch, order, first))  # read while the SAE trains

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"passes": self.passes, "dtype": self.dtype}

    def pass_of(self, epoch: int) -> int:
        return epoch % self.passes

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        if part == "train":
            indices = indices + self.pass_of(epoch) * self.n_train
        pieces = self._maps[part]
        like = pieces[0][1]
        width = len(like) * self.d_in
        out = torch.empty(len(indices), self.positions, width, dtype=like[0].dtype)
        for first, maps in pieces:
            here = (indices >= first) & (indices < first + len(maps[0]))
            for rows, columns in zip(maps, out.split(self.d_in, dim=-1), strict=True):
                columns[here] = rows[indices[here] - first]
        return out


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in a thread while the one before is in use."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


def _cover(manifests: list[Manifest], part: str, total: int) -> bool:
    """Whether the shards hold each of a part's windows once."""
    reached = 0
    for manifest in sorted(manifests, key=lambda m: (m.first[part], m.windows[part])):
        if manifest.windows[part] and manifest.first[part] != reached:
            return False
        reached += manifest.windows[part]
    return reached == total


def _map(folder: Path, hook_spec: str, part: str, manifest: Manifest) -> Tensor:
    """(windows, positions, D) of a shard's file, memory-mapped."""
    if hook_spec not in manifest.hooks:
        raise SAEError(f"{folder}: holds no activations of {hook_spec}; harvest again")
    path = _file(folder, hook_spec, part)
    shape = (manifest.windows[part], manifest.positions, manifest.d_in)
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    n_entries = shape[0] * shape[1] * shape[2]
    expected = n_entries * dtype.itemsize
    if not path.is_file() or path.stat().st_size != expected:
        found = path.stat().st_size if path.is_file() else 0
        raise SAEError(f"{path}: {found} bytes, expected {expected}; harvest again")
    if n_entries == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=n_entries, dtype=dtype).view(shape)
