"""Trained SAEs by name: from a directory, from this project's output folders, or from the Hub."""

from pathlib import Path
from typing import Literal, NamedTuple, overload

from sae_core.formats.checkpoint import History, load_history, load_sae
from sae_core.formats.foreign import import_sae
from sae_core.formats.sae_places import content_hashes, form_of, sae_folder
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import SAE_FILES, without_paths


class Pretrained(NamedTuple):
    """An SAE and its training history."""

    sae: SparseAutoencoder
    history: History


class Origin(NamedTuple):
    """An SAE that a training begins with."""

    sae: SparseAutoencoder
    """It takes raw activations."""
    name: str
    """As it was given, a path without what leads to the folder."""
    sha256: dict[str, str]
    """Of the files that it was read from."""

    def as_metadata(self) -> dict[str, object]:
        """What `config.json` says of it."""
        return {"name": self.name, "sae_type": self.sae.spec.sae_type, "sha256": self.sha256}


@overload
def load_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    threshold: float | None = None,
    with_history: Literal[False] = False,
) -> SparseAutoencoder: ...
@overload
def load_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    threshold: float | None = None,
    with_history: Literal[True],
) -> Pretrained: ...
def load_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    threshold: float | None = None,
    with_history: bool = False,
) -> SparseAutoencoder | Pretrained:
    """Load an SAE of the kind in its `config.json` onto the CPU; nothing but tensors is
    unpickled.

    Args:
        name: an SAE directory, also one of SAELens or dictionary_learning; the run name of one in
            `sae_core/pretrained_models` or `results/saes`; or `owner/repository/run_name` on the
            Hub, which is downloaded once.
        revision: branch, tag or commit on the Hub.
        threshold: the inference threshold of a BatchTopK SAE. SAEs of this trainer's predecessor
            were stored without one and cannot encode until it is given here, or found from
            activations by `sae.calibrate`.
        with_history: return the training history too, as `Pretrained(sae, history)`; empty for
            another tool's SAE.

    Raises:
        SAEError: there is no such SAE, it cannot be had, or it is damaged.
    """
    folder = sae_folder(str(name), revision)
    sae = _read(folder)
    if threshold is not None:
        sae.set_threshold(threshold)
    if not with_history:
        return sae
    is_ours = form_of(folder) in (SAE_FILES[0], None)
    return Pretrained(sae, load_history(folder) if is_ours else {})


def load_origin(name: str, output: Path) -> Origin:
    """An SAE to begin a training with; `name` is as `load_pretrained` takes it.

    Args:
        output: the SAE directory that the training writes; a run name is first looked for beside
            it.

    Raises:
        SAEError: there is no such SAE, it cannot be had, is damaged, or would be written over.
    """
    folder = sae_folder(name, beside=output.parent)
    if folder.resolve() == output.resolve():
        raise SAEError(
            f"--init-from {name}: the trained SAE would be written over it, in {output}; move it, "
            "or give another --run-name or --output-root"
        )
    return Origin(_read(folder), without_paths(name), content_hashes(folder))


def _read(folder: Path) -> SparseAutoencoder:
    """The SAE in a directory, whichever tool wrote it."""
    is_foreign = form_of(folder) not in (SAE_FILES[0], None)
    return import_sae(folder) if is_foreign else load_sae(folder)


def list_pretrained(repo_id: str, *, revision: str | None = None) -> list[str]:
    """The run names of the SAEs in a repository on the Hub.

    Raises:
        SAEError: it cannot be read.
    """
    from sae_core.utils.hub_files import list_files

    files = set(list_files(repo_id, revision))
    folders = {path.rpartition("/")[0] for path in files} - {""}
    needed = SAE_FILES[:2]
    return sorted(f for f in folders if all(f"{f}/{name}" in files for name in needed))
