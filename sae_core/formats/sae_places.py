"""Where an SAE lies: in a folder, under its run name, or on the Hub. No torch here."""

import os
import re
from pathlib import Path

from sae_core.settings.texts import OutputConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.files import file_sha256
from sae_core.utils.naming import REPO_ID, SAE_FILES

ROOTS = (OutputConfig.output_root, Path("results/saes"))
"""Where a bare run name is looked for, from the folder one is in: by hand, by the workflow."""

RUN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
"""A folder in a repository."""

FORMS = {
    "weights.pt": "config.json",
    "sae_weights.safetensors": "cfg.json",
    "ae.pt": "config.json",
}
"""The files of weights and settings that make an SAE directory: ours, SAELens's,
dictionary_learning's."""


def local_folder(name: str, beside: Path | None = None) -> Path | None:
    """The directory that `name` is the path or the run name of; None if there is none here.

    Args:
        beside: a folder of SAEs where a run name is looked for first.
    """
    for root in (Path(), *filter(None, [beside]), *ROOTS):
        folder = root / os.path.expanduser(name)
        if name and os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
            return folder
    return None


def sae_folder(name: str, revision: str | None = None, beside: Path | None = None) -> Path:
    """The same, or of `owner/repository/run_name` on the Hub, which is downloaded once;
    `owner/repository/run_name@revision` names a branch, tag or commit.

    Raises:
        SAEError: there is no such SAE, or it cannot be had.
    """
    if folder := local_folder(name, beside):
        return folder
    repo_id, run, at = hub_place(name)

    from sae_core.utils.hub_files import fetch_folder

    folder = fetch_folder(repo_id, run, (*SAE_FILES, "cfg.json", "ae.pt"), at or revision)
    if form_of(folder) is None:  # SAELens's weights, which our directories have a second time
        names = ("cfg.json", "sae_weights.safetensors")
        folder = fetch_folder(repo_id, run, names, at or revision)
    return folder


def hub_place(name: str) -> tuple[str, str, str]:
    """Repository, folder and revision ('' for none) of an SAE on the Hub.

    Raises:
        SAEError: `name` does not have that form.
    """
    place, _, revision = name.partition("@")
    owner, _, rest = place.partition("/")
    repository, _, run = rest.partition("/")
    repo_id = f"{owner}/{repository}"
    if not REPO_ID.fullmatch(repo_id) or not RUN.fullmatch(run):
        places = ", ".join(str(root) for root in ROOTS)
        raise SAEError(
            f"{name[:200]!r}: no such SAE directory, and no SAE of that name in {places}; for "
            "one on the Hub, give owner/repository/run_name"
        )
    return repo_id, run, revision


def form_of(folder: Path) -> str | None:
    """The file of weights that a directory is read by; None if it has none."""
    return next((name for name in FORMS if (folder / name).is_file()), None)


def content_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the two files that an SAE directory is read from, by their names.

    Raises:
        SAEError: one is missing.
    """
    weights = form_of(folder)
    if weights is None:
        raise SAEError(f"{folder}: has no {', '.join(FORMS)}; it is no SAE directory")
    try:
        return {name: file_sha256(folder / name) for name in (weights, FORMS[weights])}
    except OSError as error:
        raise SAEError(f"{error.filename}: cannot be read ({error.strerror})") from error
