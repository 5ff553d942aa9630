"""Shards: folders of activations, written in one pass of the model.

A shard has `manifest.json`, and for each hook one file of raw activations (windows, positions, D)
for training and one for validation, read back memory-mapped. Next to each file is the list of its
windows' SHA-256, and the manifest has the SHA-256 of the list. A window is the unit that training
gathers, so it is checked when it is read, without a separate pass over the file.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sae_core.activations.token_windows import TokenWindows
from sae_core.activations.window_writer import (
    DIGEST_BYTES,
    WindowWriter,
    read_at,
    window_bytes,
    window_files,
)
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.train_config import BatchSize
from sae_core.utils.errors import SAEError
from sae_core.utils.files import check_space, file_sha256, new_folder, write_file, writing
from sae_core.utils.memory import Microbatch
from sae_core.utils.records import read_record

Found = dict[Hook, Tensor]
"""(B, L, D) activations at each hook."""

Parts = dict[str, int]
"""Windows in each part of a shard: `train` and `validation`."""

HASHED = 256
"""Windows of each part that `windows_sha256` reads."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a shard folder."""

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
    digests: dict[str, str]
    """SHA-256 of each list of digests, by its file's name."""

    windows_sha256: str = ""
    """`windows_sha256` of all windows, of which the shard has some."""

    checksum: str = ""
    """Hash of the other fields, to detect a manifest that somebody edited."""

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
            SAEError: it is missing or not a manifest.
        """
        path = folder / "manifest.json"
        manifest = read_record(cls, path, "shard", "harvest again")
        if manifest.checksum != manifest._checksum():
            raise SAEError(f"{path}: has changed since it was written; harvest again")
        return replace(manifest, checksum="")

    def same_harvest(self, other: "Manifest") -> bool:
        """Whether both belong to one harvest and differ only in their windows."""
        return self._of_any_shard() == other._of_any_shard()

    def _of_any_shard(self) -> "Manifest":
        return replace(self, windows={}, first={}, digests={})


def windows_sha256(windows: TokenWindows) -> str:
    """A hash of the tokens of some windows from all over the texts: windows of other texts, or cut
    or split otherwise, have another, even if they are as many."""
    digest = hashlib.sha256()
    for part, n in (("train", windows.n_train), ("validation", windows.n_validation)):
        if n:
            chosen = torch.linspace(0, n - 1, min(n, HASHED)).long()
            digest.update(_window_tokens(windows, part, chosen).numpy().tobytes())
    return digest.hexdigest()


def _files(folder: Path, hook_spec: str, part: str) -> tuple[Path, Path]:
    """The files of a part's windows at a hook and of their concatenated digests."""
    return folder / f"{hook_spec}.{part}.bin", folder / f"{hook_spec}.{part}.sha256"


def harvest(
    model: LanguageModel,
    windows: TokenWindows,
    hooks: Sequence[Hook],
    folder: Path,
    *,
    batch_size: BatchSize,
    passes: int = 1,
    shard: int = 0,
    n_shards: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the activations of every window at every hook, in one pass of the model.

    Position 0 is left out: it never trains an SAE. With several shards, each takes a run of
    consecutive windows, and together they have the windows that a single shard would have. An
    earlier shard stays until the new one is complete.

    Args:
        progress: called with the windows done and the windows in all.

    Raises:
        SAEError: it does not fit on the disk, or cannot be written.
    """
    manifest = _planned(model, windows, hooks, passes, shard, n_shards)
    done, total = 0, sum(manifest.windows.values())
    n_window_bytes = windows.positions * model.d_model * model.dtype.itemsize
    n_bytes = total * len(hooks) * (n_window_bytes + DIGEST_BYTES)
    microbatch = model.forward_microbatch(windows.length, batch_size)
    with writing(folder, n_bytes), new_folder(folder) as staging:
        check_space(folder, n_bytes, "free some, or harvest fewer layers or --passes")
        most_bytes = max(1, min(microbatch.size, total)) * n_window_bytes
        with WindowWriter(model.device, len(hooks), most_bytes) as writer:
            for part, first in manifest.first.items():
                indices = torch.arange(first, first + manifest.windows[part])
                found = _activations(model, windows, hooks, part, indices, microbatch)
                for n_windows in _write_part(writer, found, staging, hooks, part):
                    done += n_windows
                    progress(done, total)
        digests = {path.name: file_sha256(path) for path in sorted(staging.glob("*.sha256"))}
        manifest = replace(manifest, digests=digests)
        manifest.save(staging / "manifest.json")
    return manifest


def _planned(
    model: LanguageModel,
    windows: TokenWindows,
    hooks: Sequence[Hook],
    passes: int,
    shard: int,
    n_shards: int,
) -> Manifest:
    """A shard's manifest, as yet without digests."""
    parts = {"train": windows.n_train * passes, "validation": windows.n_validation}
    runs = {part: (n * shard // n_shards, n * (shard + 1) // n_shards) for part, n in parts.items()}
    return Manifest(
        hooks=[hook.spec for hook in hooks],
        dtype=str(model.dtype).removeprefix("torch."),
        d_in=model.d_model,
        positions=windows.positions,
        passes=passes,
        windows={part: stop - start for part, (start, stop) in runs.items()},
        first={part: start for part, (start, _) in runs.items()},
        total=parts,
        bos=windows.bos,
        digests={},
        windows_sha256=windows_sha256(windows),
    )


def _activations(
    model: LanguageModel,
    windows: TokenWindows,
    hooks: Sequence[Hook],
    part: str,
    indices: Tensor,
    microbatch: Microbatch,
) -> Iterator[Found]:
    """What each forward pass over the windows `indices` (W,) of a part gives."""

    def activations(at: slice) -> Found:
        return model.activations(_window_tokens(windows, part, indices[at]), hooks)

    return microbatch.parts(len(indices), activations)


def _write_part(
    writer: WindowWriter, found: Iterator[Found], folder: Path, hooks: Sequence[Hook], part: str
) -> Iterator[int]:
    """Write the windows of a part; yields how many each forward pass had."""
    with ExitStack() as stack:
        files = {
            hook: stack.enter_context(window_files(*_files(folder, hook.spec, part)))
            for hook in hooks
        }
        stack.callback(writer.stop)  # before they are closed, also after an error
        first = 0
        for of_pass in found:
            for hook, values in of_pass.items():
                writer.write(files[hook], first, values[:, 1:])
            first += len(values)
            yield len(values)
        writer.finish()


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


class WindowFile:
    """The windows of a part at a hook in one shard.

    Raises:
        SAEError: the shard does not hold the hook, or the file has changed.
    """

    def __init__(self, folder: Path, hook_spec: str, part: str, manifest: Manifest) -> None:
        if hook_spec not in manifest.hooks:
            raise SAEError(f"{folder}: has no activations of {hook_spec}; harvest again")
        self.path, digests = _files(folder, hook_spec, part)
        self.n_windows = manifest.windows[part]
        dtype: torch.dtype = getattr(torch, manifest.dtype)
        self.n_bytes = manifest.positions * manifest.d_in * dtype.itemsize
        _check_length(self.path, self.n_windows * self.n_bytes)
        _check_length(digests, self.n_windows * DIGEST_BYTES)
        if file_sha256(digests) != manifest.digests[digests.name]:
            raise SAEError(f"{digests}: has changed since it was written; harvest again")
        self.digests, self.checked = digests.read_bytes(), bytearray(self.n_windows)

    def __len__(self) -> int:
        return self.n_windows

    def read(self, windows: Tensor, places: Sequence[int], indices: Sequence[int]) -> None:
        """Fill `windows` (W, positions, D) at each of some places with the window of an index; each
        window is checked the first time. Several threads may do this at once.

        Raises:
            SAEError: a window has changed.
        """
        content = window_bytes(windows)
        with self.path.open("rb", buffering=0) as file:
            for place, index in zip(places, indices, strict=True):
                is_whole = read_at(file.fileno(), content[place], index * self.n_bytes)
                if not (is_whole and (self.checked[index] or self._fits(index, content[place]))):
                    raise SAEError(
                        f"{self.path}: window {index} has changed since it was written; harvest "
                        "again"
                    )
                self.checked[index] = True

    def _fits(self, index: int, window: memoryview) -> bool:
        digest = self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        return hashlib.sha256(window).digest() == digest


def _check_length(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else 0
    if not path.is_file() or found != expected:
        raise SAEError(f"{path}: {found} bytes, expected {expected}; harvest again")


def cover(manifests: list[Manifest], part: str, total: int) -> bool:
    """Whether the shards have each of a part's windows exactly once."""
    reached = 0
    for manifest in sorted(manifests, key=lambda m: (m.first[part], m.windows[part])):
        if manifest.windows[part] and manifest.first[part] != reached:
            return False
        reached += manifest.windows[part]
    return reached == total
