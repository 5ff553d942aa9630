"""Whether an SAE may be measured on these texts and this model: nothing that it was trained on may
count as held out, and its figures on another model mean nothing."""

import sys
from pathlib import Path
from typing import NamedTuple

from sae_core.models.model_places import model_place
from sae_core.models.model_sources import ModelRecord, model_sha256
from sae_core.sae.config import SAESpec
from sae_core.train_config import ModelConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import same_name


class ModelIdentity(NamedTuple):
    """What distinguishes a language model from another one of the same shape."""

    name: str
    commit: str | None
    """Commit of the Hub's repository."""
    sha256: str | None
    """`model_sha256` of its files, where it has no commit; None if it was not recorded."""

    @classmethod
    def of(cls, record: ModelRecord) -> "ModelIdentity":
        """A fetched model."""
        return cls(record.name, record.commit, record.model_sha256)

    @classmethod
    def given(cls, config: ModelConfig) -> "ModelIdentity":
        """A model that is asked for by its name.

        Raises:
            SAEError: it is not there.
        """
        place = model_place(config)
        sha256 = None if place.commit else model_sha256(Path(place.source))
        return cls(config.name, place.commit, sha256)

    @classmethod
    def recorded(cls, spec: SAESpec) -> "ModelIdentity | None":
        """The model that an SAE was trained on; None if that is not known."""
        known = spec.metadata
        if not known.get("model_name"):
            return None
        return cls(known["model_name"], known.get("model_commit"), known.get("model_sha256"))

    def __str__(self) -> str:
        marks = {"commit": self.commit, "files": self.sha256}
        known = [f"{what} {mark[:12]}" for what, mark in marks.items() if mark]
        return f"{self.name} ({', '.join(known) or 'no commit and no hash of it known'})"


def records_texts(spec: SAESpec) -> bool:
    """Whether an SAE's configuration says which texts trained it."""
    return bool(spec.metadata.get("data_sha256"))


def check_texts(name: str, spec: SAESpec, given: str, sha256: str) -> None:
    """Refuse texts other than the ones that the SAE `name` was trained on, because then it is
    unknown which of them the SAE has seen.

    Args:
        given: the option that names the texts, with its value.
        sha256: of the texts.

    Raises:
        SAEError: it is another one.
    """
    if not records_texts(spec):
        print(
            f"{name}: its config.json does not say which texts trained it; some of the evaluated "
            "ones may have",
            file=sys.stderr,
            flush=True,
        )
        return
    recorded = spec.metadata["data_sha256"]
    if sha256 != recorded:
        file = spec.metadata.get("data_file", "a file")
        raise SAEError(
            f"{given}: its SHA-256 is {sha256[:12]}…, and {name} was trained on {file} with "
            f"{recorded[:12]}…, so which of these texts it has seen is unknown; give that file"
        )


def check_model(name: str, spec: SAESpec, given: ModelIdentity, option: str) -> None:
    """Refuse a model that is not the one that the SAE `name` was trained on.

    Raises:
        SAEError: it is another one.
    """
    recorded, same = ModelIdentity.recorded(spec), None
    if recorded and recorded.sha256 and given.sha256:
        same = recorded.sha256 == given.sha256
    elif recorded and recorded.commit and given.commit:
        same = (same_name(recorded.name), recorded.commit) == (same_name(given.name), given.commit)
    if same is None:
        known = f"it was trained on {recorded}" if recorded else "it does not record its model"
        unknown = f"whether {given} is the same model cannot be known"
        print(f"{name}: {known}; {unknown}", file=sys.stderr, flush=True)
    elif not same:
        raise SAEError(
            f"{option} {given}: not the language model that {name} was trained on, {recorded}; "
            "give that one"
        )
