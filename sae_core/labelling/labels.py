"""The label of a feature."""

from typing import Any, Literal, NamedTuple, Self

from sae_core.utils.errors import one_line

LONGEST = 2000
"""Characters of a label or a description."""

Status = Literal["ok", "invalid answer", "refused", "no answer", "not asked"]


class Label(NamedTuple):
    """A line of `results/labels/<run>.jsonl`."""

    feature: int
    label: str = ""
    description: str = ""
    confidence: float = 0.0
    detection: float | None = None
    """Balanced accuracy; None if the label was not scored."""
    fuzzing: float | None = None
    status: Status = "ok"
    """`invalid answer`: twice not in the schema. `refused`: the endpoint takes no such request.
    `no answer`: it failed at every try. `not asked`: the ceiling on tokens was reached."""

    @classmethod
    def of(cls, feature: int, answer: dict[str, Any]) -> Self:
        """The label in a labeller's answer."""
        label, description = (one_line(answer[k], LONGEST) for k in ("label", "description"))
        return cls(feature, label, description, float(answer["confidence"]))

    @property
    def described(self) -> str:
        """What a scorer is told."""
        return f"{self.label}. {self.description}"
