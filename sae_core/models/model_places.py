"""Where a language model's files are: a directory, the Hub's cache on this machine, or the Hub.

What the cache holds whole is read from there, and nobody is asked. Otherwise the Hub is asked once,
with a time limit; if it does not answer, what the cache has must do.
"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.train_config import ModelConfig
from sae_core.utils.errors import SAEError, one_line

PATIENCE = 10.0
"""Seconds that the Hub may take to answer which commit a revision is."""

COMMIT = re.compile(r"[0-9a-f]{40}")

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
"""Files of which a tokenizer has at least one."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""A model's weights, or with `.index.json` the list of files that they are in."""


class Place(NamedTuple):
    """What transformers is to load."""

    source: str
    """A directory, or the id of a repository on the Hub."""
    commit: str | None
    """Of the Hub's repository; None for a model that is not from the Hub."""

    @property
    def is_here(self) -> bool:
        """Whether it needs no network."""
        return Path(self.source).is_dir()

    @property
    def revision(self) -> str:
        """As transformers wants it."""
        return self.commit or "main"


def model_place(config: ModelConfig) -> Place:
    """The place of a model.

    Raises:
        SAEError: there is no such directory, or neither the cache nor the Hub has the model.
    """
    name = config.model_name
    path = Path(name).expanduser()
    if path.is_dir():
        return Place(str(path), None)
    if path.is_absolute() or name.startswith((".", "~")):
        raise SAEError(f"--model-name {name}: no such directory")
    cached = cached_snapshot(name, config.revision)
    if cached is not None and is_whole(cached):
        return Place(str(cached), cached.name)
    try:
        commit = hub_commit(name, config.revision)
        if cached is not None:
            forget_damaged(cached)
    except Exception as error:  # the client's failures have no common base class
        if cached is None or is_refused(error):
            raise cannot_load(name, error) from error
        return Place(str(cached), cached.name)
    return Place(name, commit)


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a revision in the Hub's cache; some of its files may not be there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise cannot_load(name, error) from error
    return Path(found).parent if isinstance(found, str) else None


def hub_commit(name: str, revision: str | None) -> str:
    """The commit that a revision is on the Hub, which the cache then knows as well.

    One request, with a time limit, finds out whether the Hub answers: the client would try again
    and again.
    """
    from huggingface_hub import hf_hub_download

    from sae_core.utils.hub_client import connect

    # From here on transformers' downloads too are made by a client with a bound on every wait.
    connect().model_info(name, revision=revision or "main", timeout=PATIENCE)
    return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name


def is_refused(error: Exception) -> bool:
    """Whether the Hub has answered that there is no such model, or that one may not have it."""
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
    return 400 <= status < 500 and status not in (408, 429)


def is_whole(folder: Path) -> bool:
    """Whether a directory has all that a model is loaded from, and no file of it is cut off."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        needed = [folder / "tokenizer_config.json", *_weight_files(folder)]
        needed += [folder / name for name in _code_files(config)]
    except (OSError, ValueError, AttributeError, KeyError):
        return False
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
    has_weights = len(needed) > 1
    here = all(path.is_file() for path in needed)
    return has_tokenizer and has_weights and here and not damaged_files(folder)


def damaged_files(folder: Path) -> list[Path]:
    """The files of a model's directory that are empty or cut off."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [path for path in files if not _is_whole_file(path)]


def forget_damaged(snapshot: Path) -> None:
    """Delete such files of a folder in the Hub's cache: the client takes every file that is there
    for whole, and would never fetch them again."""
    for path in damaged_files(snapshot):
        path.resolve().unlink()
        path.unlink(missing_ok=True)


def _code_files(config: dict[str, Any]) -> Iterator[str]:
    """The Python files of the repository that a configuration names."""
    for reference in config.get("auto_map", {}).values():
        if "--" not in str(reference):  # which is another repository's
            yield f"{str(reference).split('.')[0]}.py"


def _weight_files(folder: Path) -> Iterator[Path]:
    """Of the kind of weights that transformers takes."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            yield folder / name
            return
        if index.is_file():
            shards = json.loads(index.read_bytes())["weight_map"].values()
            yield from (folder / shard for shard in sorted(set(shards)))
            return


def _is_whole_file(path: Path) -> bool:
    """Whether a file is as long as it says at its beginning, or at least not empty."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return size > 0
    try:
        with path.open("rb") as file:
            (n_header,) = struct.unpack("<Q", file.read(8))
            if n_header > size:
                return False
            header = json.loads(file.read(n_header))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        return size == 8 + n_header + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return False


def cannot_load(name: str, error: Exception | str) -> SAEError:
    """A model that cannot be had, in one line."""
    reason = one_line(error) if isinstance(error, Exception) else error
    return SAEError(
        f"--model-name {name}: cannot be loaded; give a Hub id or a model's directory ({reason})"
    )
