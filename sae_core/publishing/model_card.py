"""Model cards: one for each SAE, and one at a repository's root that lists them all.

Both are pure functions of what they describe, so an unchanged SAE gives an unchanged card.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sae_core.labelling.label_files import SCORES, in_words, read_labels
from sae_core.labelling.labels import Label
from sae_core.reporting.summary import COLUMNS, SPLICED_COLUMNS, reading_order, show
from sae_core.sae.config import SAESpec
from sae_core.settings.services import RepoConfig
from sae_core.utils.errors import SAEError, one_line
from sae_core.utils.files import file_sha256
from sae_core.utils.naming import (
    EXPORT_FILES,
    FEATURES_FILE,
    LABELS_FILE,
    LOCAL_PATH,
    REPO_ID,
    local_name,
    model_id,
    same_name,
    without_paths,
)
from sae_core.utils.records import read_json

CARD = "README.md"

TEMPLATES = Path(__file__).parent / "templates"
SAE_CARD, REPO_CARD = TEMPLATES / "sae_card.md.j2", TEMPLATES / "repo_card.md.j2"

MARKS = re.compile(r"[\\`*_\[\]!~$]")
"""Characters that begin markup within a line."""

TAGS = ("sparse-autoencoder", "saelens", "interpretability")

BEGIN, END = "<!-- list of SAEs: begin -->", "<!-- list of SAEs: end -->"

LISTED = ("l0", "fvu", "loss_recovered", "dead_fraction")
"""Figures in a repository's list of SAEs."""

SHOWN_LABELS = 10
"""Labels by a language model on the card of an SAE."""


@dataclass(frozen=True)
class SAEFacts:
    """The facts about one SAE for its cards, without paths of the machine that trained it."""

    run_name: str
    spec: SAESpec
    evaluation: dict[str, Any] | None
    repo: RepoConfig
    weights_sha256: str
    renamed: Mapping[str, str]
    """What others read in place of a name that was made of a path."""
    files: Mapping[str, Path]
    """The directory's files by name, whether they are there or not, and what is known of its
    features."""
    labels: tuple[Label, ...] = ()
    """What a language model says of its features."""

    @classmethod
    def read(
        cls,
        folder: Path,
        evaluation: Path | None,
        repo: RepoConfig,
        labels: Path | None = None,
        features: Path | None = None,
    ) -> "SAEFacts":
        """The facts of a final SAE directory and, if there are any, of its evaluation, of the
        labels by a language model (JSON lines) and of the table of its features (CSV).

        A directory from before models had names of their own may be called after a path; it gets
        the name that it would have now. A directory in the older form needs only weights and
        configuration.

        Raises:
            SAEError: a file is missing or not what it should be.
        """
        weights = folder / "weights.pt"
        if not weights.is_file():
            raise SAEError(f"{folder}: not an SAE directory, it has no weights.pt")
        spec = SAESpec.load(folder / "config.json")
        recorded = spec.metadata.get("model_name") or ""
        renamed = {}
        if LOCAL_PATH.match(recorded) or recorded.count("/") > 1:
            old, new = model_id(recorded), model_id(local_name(recorded))
            renamed = {recorded: local_name(recorded), folder.name: folder.name.replace(old, new)}
        spec.metadata = without_paths(spec.metadata, renamed)
        name = renamed.get(folder.name, folder.name)
        files = {name: folder / name for name in EXPORT_FILES}
        if spec.is_older_form:
            files = {name: path for name, path in files.items() if path.exists()}
        if features is not None:
            files[FEATURES_FILE] = features
        said: tuple[Label, ...] = ()
        if labels is not None:
            files[LABELS_FILE], said = labels, tuple(read_labels(labels).values())
        facts = cls(name, spec, None, repo, file_sha256(weights), renamed, files, said)
        if evaluation is None:
            return facts
        figures = facts.public(evaluation)
        if not isinstance(figures, dict):
            raise SAEError(f"{evaluation}: not a readable evaluation; evaluate the SAE again")
        return replace(facts, evaluation=figures)

    def public(self, path: Path) -> Any:
        """The contents of a JSON file in a form that may be published."""
        return without_paths(read_json(path, path.stem, "create it again"), self.renamed)

    @property
    def model_name(self) -> str:
        return str(self.spec.metadata.get("model_name") or "an unnamed language model")

    @property
    def is_described(self) -> bool:
        """Whether there is a table of what its features fire on."""
        return FEATURES_FILE in self.files

    @property
    def has_features(self) -> bool:
        """Whether anything is known of its features."""
        return self.is_described or bool(self.labels)

    @property
    def labelled(self) -> str:
        """How many features have a label by a language model, and how good the labels are."""
        return in_words(self.labels) if self.labels else ""

    @property
    def threshold(self) -> float | None:
        """The threshold of the evaluation, for an SAE that was stored without one."""
        return (self.evaluation or {}).get("calibration", {}).get("threshold")

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
        for key, column in (COLUMNS | SPLICED_COLUMNS).items()
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
        scores=SCORES,
        labels=_label_rows(facts.labels),
    )
    return _text(card)


def _label_rows(labels: Sequence[Label]) -> list[str]:
    """The first labels as lines of a Markdown table, each with its scores."""
    shown = [label for label in labels if label.status == "ok"][:SHOWN_LABELS]
    return [
        _line(
            [
                str(label.feature),
                _plain(label.label),
                *(show(getattr(label, name), ".2f") for name in SCORES),
            ]
        )
        for label in shown
    ]


def _plain(text: str) -> str:
    """What a language model wrote, as Markdown that shows it and nothing else: an image in it would
    be fetched from anywhere by all who read the card."""
    return html.escape(MARKS.sub(r"\\\g<0>", text), quote=False)


def repo_card(old: str | None, facts: SAEFacts, repo_id: str) -> str:
    """The card at the root of a repository: `old` with the line of one SAE added or renewed.

    Everything else that people wrote into the card stays.
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
        try:
            card = ModelCard(old)
        except Exception as error:  # the client's YAML parser has errors of its own
            raise SAEError(
                f"{CARD} of {repo_id}: its metadata cannot be read ({one_line(error)}); fix it on "
                "the Hub"
            ) from error
    _extend(card.data, _metadata(facts))
    before, block, after = _around_block(card.text)
    rows = _rows(block) | {facts.run_name: _row(facts)}
    ordered = [rows[name] for name in sorted(rows, key=reading_order)]
    headings = ["SAE", "language model", "hook", "kind", "features"]
    headings += [COLUMNS[key].heading for key in LISTED]
    rule = ["---"] * 5 + ["---:"] * len(LISTED)
    table = "\n".join([_line(headings), _line(rule), *ordered])
    card.text = f"{before}{BEGIN}\n{table}\n{END}{after}"
    return _text(card)


def _around_block(text: str) -> tuple[str, list[str], str]:
    """A repository's card in three: what is before the list, the list's lines, and what is after
    it. People may have deleted a marker, or written something between the two, which counts as
    after it."""
    whole = re.search(f"{BEGIN}((?:(?!{BEGIN}).)*?){END}", text, re.DOTALL)
    lone = re.search(f"{BEGIN}((?:\\s*\\|.*)*)", text)
    found = whole or lone
    if found is None:
        return f"{text.rstrip()}\n\n", [], "\n"
    lines = found[1].split("\n")
    own = [line for line in lines if line.lstrip().startswith("|")]
    others = "\n".join(line for line in lines if line not in own).strip()
    after = text[found.end() :]
    if others or not whole:
        after = "\n\n".join(["", *filter(None, [others, after.lstrip("\n")])])
    return text[: found.start()], own, after


def _metadata(facts: SAEFacts) -> ModelCardData:
    return ModelCardData(
        base_model=facts.base_model,
        datasets=[facts.repo.hf_dataset] if facts.repo.hf_dataset else None,
        library_name="saelens",
        license=facts.repo.hf_license,
        tags=list(TAGS),
    )


def _extend(data: Any, new: ModelCardData) -> None:
    """Add new entries to a card's metadata, and keep the existing ones."""
    for key in ("base_model", "datasets", "tags"):
        there, more = getattr(data, key, None), getattr(new, key)
        known = set(map(same_name, _listed(there)))
        both = [*_listed(there), *(v for v in _listed(more) if same_name(v) not in known)]
        if both:
            setattr(data, key, both)
    for key in ("library_name", "license"):
        if getattr(data, key, None) is None:
            setattr(data, key, getattr(new, key))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _rows(lines: list[str]) -> dict[str, str]:
    """The lines of a card's list, by run name."""
    found = (re.match(r"\| \[([^\]]+)\]", line) for line in lines)
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
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"


def _text(card: ModelCard) -> str:
    return f"{str(card).rstrip()}\n"
