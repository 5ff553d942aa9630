"""Trained SAEs by name: from a directory, from this project's output folders, or from the Hub."""

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple, overload

from sae_core.formats.checkpoint import History, load_history, load_sae
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import OutputConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import REPO_ID, SAE_FILES

ROOTS = (OutputConfig.output_root, Path("results/saes"))
"""Where a bare run name is looked for, from the folder one is in: by hand, by the workflow."""

RUN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
"""A folder in a repository."""


class Pretrained(NamedTuple):
    """An SAE and its training history."""

    sae: SparseAutoencoder
    history: History


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
        name: an SAE directory; the run name of one in `sae_core/pretrained_models` or
            `results/saes`; or `owner/repository/run_name` on the Hub, which is downloaded once.
        revision: branch, tag or commit on the Hub.
        threshold: the inference threshold of a BatchTopK SAE. SAEs of this trainer's predecessor
            were stored without one and cannot encode until it is given here, or found from
            activations by `sae.calibrate`.
        with_history: return the training history too, as `Pretrained(sae, history)`.

    Raises:
        SAEError: there is no such SAE, it cannot be had, or it is damaged.
    """
    folder = _folder(str(name), revision)
    sae = load_sae(folder)
    if threshold is not None:
        sae.set_threshold(threshold)
    return Pretrained(sae, load_history(folder)) if with_history else sae


def list_pretrained(repo_id: str, *, revision: str | None = None) -> list[str]:
    """The run names of the SAEs in a repository on the Hub.

    Raises:
        SAEError: it cannot be read.
    """
    from sae_core.publishing.hub import list_files

    files = set(list_files(repo_id, revision))
    folders = {path.rpartition("/")[0] for path in files} - {""}
    needed = SAE_FILES[:2]
    return sorted(f for f in folders if all(f"{f}/{name}" in files for name in needed))


def _folder(name: str, revision: str | None) -> Path:
    local = [Path(name), *(root / name for root in ROOTS)]
    for folder in local:
        if os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
            return folder
    owner, _, rest = name.partition("/")
    repository, _, run = rest.partition("/")
    if not REPO_ID.fullmatch(f"{owner}/{repository}") or not RUN.fullmatch(run):
        places = ", ".join(str(root) for root in ROOTS)
        raise SAEError(
            f"{name[:200]!r}: no such SAE directory, and no SAE of that name in {places}; for "
            "one on the Hub, give owner/repository/run_name"
        )
    from sae_core.publishing.hub import fetch_folder

    return fetch_folder(f"{owner}/{repository}", run, SAE_FILES, revision)
