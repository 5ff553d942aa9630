"""Model cards: one for each SAE, and one at a repository's root that lists them all.

Both are pure functions of what they describe, so that an unchanged SAE gives an unchanged card.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sae_core.errors import SAEError
from sae_core.files import file_sha256
from sae_core.naming import REPO_ID
from sae_core.reporting.summary import COLUMNS, reading_order, show
from sae_core.sae_config import SAESpec
from sae_core.train_config import RepoConfig

CARD = "README.md"

TEMPLATES = Path(__file__).parent / "templates"
SAE_CARD, REPO_CARD = TEMPLATES / "sae_card.md.j2", TEMPLATES / "repo_card.md.j2"

TAGS = ("sparse-autoencoder", "saelens", "interpretability")

BEGIN, END = "<!-- list of SAEs: begin -->", "<!-- list of SAEs: end -->"

LISTED = ("l0", "fvu", "loss_recovered", "dead_fraction")
"""Figures in a repository's list of SAEs."""


@dataclass(frozen=True)
class SAEFacts:
    """What the cards say about one SAE."""

    run_name: str
    spec: SAESpec
    evaluation: dict[str, Any] | None
    repo: RepoConfig
    weights_sha256: str

    @classmethod
    def read(cls, folder: Path, evaluation: Path | None, repo: RepoConfig) -> "SAEFacts":
        """The facts of a final SAE directory and, if there is one, of its evaluation.

        Raises:
            SAEError: a file is missing or not what it should be.
        """
        weights = folder / "weights.pt"
        if not weights.is_file():
            raise SAEError(f"{folder}: not an SAE directory, it has no weights.pt")
        figures = None
        if evaluation is not None:
            try:
                figures = dict(json.loads(evaluation.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise SAEError(f"{evaluation}: not a readable evaluation ({error})") from error
        spec = SAESpec.load(folder / "config.json")
        return cls(folder.name, spec, figures, repo, file_sha256(weights))

    @property
    def model_name(self) -> str:
        return str(self.spec.metadata.get("model_name", "an unnamed language model"))

    @property
    def base_model(self) -> str | None:
        """The language model's id on the Hub, if it is known to have one."""
        name = self.model_name
        is_id = REPO_ID.fullmatch(name) and not Path(name).exists()
        return self.repo.hf_base_model or (name if is_id else None)


def sae_card(facts: SAEFacts) -> str:
    """The card of one SAE."""
    figures = facts.evaluation or {}
    shown = [
        (column.heading, show(figures[key], column.spec), column.meaning)
        for key, column in COLUMNS.items()
        if isinstance(figures.get(key), int | float)
    ]
    origin = dict(facts.spec.metadata)
    training = origin.pop("training", {}) | origin.pop("end_to_end", {})
    card = ModelCard.from_template(
        _metadata(facts),
        template_path=str(SAE_CARD),
        facts=facts,
        spec=facts.spec,
        origin=origin,
        training=training,
        figures=shown,
    )
    return _text(card)


def repo_card(old: str | None, facts: SAEFacts, repo_id: str) -> str:
    """The card at the root of a repository: `old` with the line of one SAE added or renewed.

    Whatever else people wrote into the card stays.
    """
    if old is None:
        card = ModelCard.from_template(
            ModelCardData(),
            template_path=str(REPO_CARD),
            repo_id=repo_id,
            example=facts.run_name,
            begin=BEGIN,
            end=END,
        )
    else:
        card = ModelCard(old)
    _extend(card.data, _metadata(facts))
    rows = _rows(card.text) | {facts.run_name: _row(facts)}
    ordered = [rows[name] for name in sorted(rows, key=reading_order)]
    headings = ["SAE", "language model", "hook", "kind", "features"]
    headings += [COLUMNS[key].heading for key in LISTED]
    rule = ["---"] * 5 + ["---:"] * len(LISTED)
    table = "\n".join([_line(headings), _line(rule), *ordered])
    block = f"{BEGIN}\n{table}\n{END}"
    before, begin, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2]
    card.text = f"{before}{block}{after}" if begin else f"{card.text.rstrip()}\n\n{block}\n"
    return _text(card)


def _metadata(facts: SAEFacts) -> ModelCardData:
    return ModelCardData(
        base_model=facts.base_model,
        datasets=[facts.repo.hf_dataset] if facts.repo.hf_dataset else None,
        library_name="saelens",
        license=facts.repo.hf_license,
        tags=list(TAGS),
    )


def _extend(data: Any, new: ModelCardData) -> None:
    """Add what is new to a card's metadata, and leave what is there."""
    for key in ("base_model", "datasets", "tags"):
        there, more = getattr(data, key, None), getattr(new, key)
        both = [*_listed(there), *(value for value in _listed(more) if value not in _listed(there))]
        if both:
            setattr(data, key, both)
    for key in ("library_name", "license"):
        if getattr(data, key, None) is None:
            setattr(data, key, getattr(new, key))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _rows(text: str) -> dict[str, str]:
    """The lines of a card's list, by run name."""
    block = text.partition(BEGIN)[2].partition(END)[0]
    found = (re.match(r"\| \[([^\]]+)\]", line) for line in block.splitlines())
    return {row[1]: row.string for row in found if row}


def _row(facts: SAEFacts) -> str:
    figures = facts.evaluation or {}
    cells = [
        f"[{facts.run_name}](./{facts.run_name})",
        facts.base_model or facts.model_name,
        f"`{facts.spec.site}`",
        facts.spec.sae_type,
        f"{facts.spec.d_sae:,}",
        *(show(figures.get(key), COLUMNS[key].spec) for key in LISTED),
    ]
    return _line(cells)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _text(card: ModelCard) -> str:
    return f"{str(card).rstrip()}\n"
