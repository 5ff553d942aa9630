"""Data sets of the Hugging Face Hub, read by the `datasets` library."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_core.corpus.records import Record, fields_of, no_field
from sae_core.models.model_places import COMMIT
from sae_core.settings.texts import CorpusConfig
from sae_core.utils.errors import SAEError, one_line


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set, at one commit."""

    config: CorpusConfig
    commit: str

    @property
    def name(self) -> str:
        """For people: the id, with the configuration if one is named."""
        parts = (self.config.dataset_id, self.config.dataset_name)
        return ":".join(filter(None, parts))

    def records(self) -> Iterator[Record]:
        """The rows of the split, in their order.

        Raises:
            SAEError: there is no such split or field, or the Hub fails.
        """
        where = f"data set {self.name}, {self.config.dataset_split}"
        with _loading(where):
            rows, field = self._rows(where), self.config.subject_field
            names = _class_names(rows.features, field)
            for number, content in enumerate(rows):
                if names:
                    content = {**content, field: names.get(content[field])}
                yield Record(f"{where}: row {number}", content)

    def _rows(self, where: str) -> Any:
        import datasets

        config = self.config
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        rows = datasets.load_dataset(
            config.dataset_id,
            config.dataset_name,
            split=config.dataset_split,
            revision=self.commit,
            streaming=config.dataset_streaming,
        )
        if rows.features is None:  # a stream knows them only from its first row
            return rows
        columns: dict[str, None] = {}
        for field, option in fields_of(config).items():
            column = field if field in rows.features else field.split(".")[0]
            if column not in rows.features:
                raise no_field(where, field, list(rows.features), option)
            columns[column] = None
        return rows.select_columns(list(columns))  # so that no picture or sound is decoded


def _class_names(features: Any, field: str | None) -> dict[int, str]:
    """What the numbers in a field stand for, if the data set says that they are classes."""
    from datasets import ClassLabel

    kind = (features or {}).get(field)
    return dict(enumerate(kind.names)) if isinstance(kind, ClassLabel) else {}


def find_dataset(config: CorpusConfig) -> HubDataset:
    """The data set that the settings name, at the commit that its revision is now.

    Raises:
        SAEError: there is none, or the Hub does not let this token read it.
    """
    from huggingface_hub.errors import GatedRepoError

    from sae_core.utils.hub_client import connect, named, patiently

    api, revision = connect(), config.dataset_revision
    assert config.dataset_id is not None
    name = config.dataset_id
    if Path(name).exists():  # the library reads it, at whatever state it is
        raise SAEError(
            f"--dataset-id {name}: there is a folder of that name here, which would be read in its "
            "place; start elsewhere or rename it, or give its files as --data-path"
        )
    if revision and COMMIT.fullmatch(revision):
        return HubDataset(config, revision)
    where = f"--dataset-id {name}, revision {revision or 'main'}"
    try:
        with named(where):
            found = patiently(lambda: api.dataset_info(name, revision=revision))
    except SAEError as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise SAEError(
                f"{where}: is only for those who have been given access; ask for it on the data "
                "set's page on the Hub, and use a token of that account"
            ) from error
        raise
    return HubDataset(config, str(found.sha))


@contextmanager
def _loading(where: str) -> Iterator[None]:
    """A block in which the library loads: its failures in one line, with the options to change."""
    from sae_core.utils.hub_client import named

    with named(where):
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            # The library's messages list the configurations and splits that there are.
            said = re.sub(
                r"Please pick one among the available", "There are these", one_line(error)
            )
            raise SAEError(
                f"{where}: cannot be read ({said}); see --dataset-name and --dataset-split"
            ) from error
