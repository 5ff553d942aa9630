"""What trainings have found: a file of JSON lines, one a training.

A line stands for its training as long as the settings, the data and the code are the same, so a
table that is asked for again costs seconds.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sae_core.utils.files import write_file

RECORDS = Path(__file__).parent / "trials.jsonl"


@dataclass(frozen=True)
class Settings:
    """What is trained, on what."""

    contender: str
    """Whose training: a name of `quality.py`, or that of an idea of `ideas.yaml`."""
    hook: str
    k: int
    features: int
    tokens_per_step: int
    lr: float
    seed: int
    tokens: int
    """To train; outliers among them are left out."""
    data: str
    """SHA-256 of the windows that the activations are of, their number format and passes."""
    tokens_to_dead: int
    """Without firing, after which a feature counts as dead in the training; of ours alone."""


@dataclass(frozen=True)
class Figures:
    """What the SAE is like, on held-out tokens but for `calibration_fvu`."""

    fvu: float
    """At the threshold that gives the tokens an L0 of k."""
    dead: float
    """Share of the features that are active on no token, at this threshold."""
    own_fvu: float | None
    """At the SAE's own threshold; None where that was not looked at."""
    own_l0: float | None
    calibration_fvu: float
    """On other held-out tokens, at an L0 of k: what the learning rate is chosen by."""
    seconds: float
    """CPU time of the training."""


@dataclass(frozen=True)
class Record:
    """A training that has been done."""

    settings: Settings
    figures: Figures
    code: str
    """A hash of the code, or a library's version; of an idea that is not in the code, its name."""
    measured: str
    """When and on what."""


class Records:
    """The records of a file, one for each of the settings.

    Args:
        path: the file, which need not exist.
    """

    def __init__(self, path: Path = RECORDS) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._by_settings = {found.settings: found for found in map(_read, lines)}

    def all(self) -> list[Record]:
        """In the order of their settings."""
        return sorted(self._by_settings.values(), key=lambda record: str(asdict(record.settings)))

    def find(self, settings: Settings, code: str) -> Record | None:
        """The record of a training with these settings by this code, if there is one."""
        found = self._by_settings.get(settings)
        return found if found and found.code == code else None

    def add(self, record: Record) -> None:
        """Keep a record, in the file as well, in place of an older one with the same settings."""
        self._by_settings[record.settings] = record
        lines = [json.dumps(asdict(record)) for record in self.all()]
        write_file(self.path, "\n".join(lines) + "\n")


def _read(line: str) -> Record:
    fields = json.loads(line)
    settings, figures = Settings(**fields.pop("settings")), Figures(**fields.pop("figures"))
    return Record(settings, figures, **fields)
