"""What labels would take, before anything is asked."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sae_core.labelling.answers import parse_answer
from sae_core.labelling.chat import estimated_tokens
from sae_core.labelling.config import AskingConfig, LabellerConfig
from sae_core.labelling.labels import Label
from sae_core.labelling.ledger import Ledger
from sae_core.labelling.prompts import Question, judgement_question, label_question
from sae_core.labelling.scores import batches, detection_samples, fuzzing_samples
from sae_core.labelling.windows import Material

LABEL_ANSWER, JUDGEMENT_ANSWER = 80, 30
"""Tokens of a usual answer."""

USUAL = "x" * 160
"""Stands for a label with its description that is not known yet."""

MILLION = 1_000_000


@dataclass
class Estimate:
    """Requests that are not answered yet, and their tokens."""

    features: int = 0
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    spent: int = 0
    """Tokens of those that are answered, which count towards the ceiling too."""
    unscored: int = 0
    """Features without windows for a score."""

    def in_words(self, config: LabellerConfig, asking: AskingConfig) -> str:
        """The estimate as lines."""
        total, most = self.tokens_in + self.tokens_out, self.requests * config.answer_tokens
        lines = [
            f"{self.features:,} features: {self.requests:,} requests that are not answered yet",
            f"about {self.tokens_in:,} tokens of requests, {self.tokens_out:,} of answers "
            f"(at most {most:,})",
        ]
        if asking.price_in or asking.price_out:
            cost = self.tokens_in * asking.price_in + self.tokens_out * asking.price_out
            top = self.tokens_in * asking.price_in + most * asking.price_out
            lines.append(f"cost: about {cost / MILLION:.2f}, at most {top / MILLION:.2f}")
        else:
            lines.append("cost: give --price-in and --price-out, per million tokens")
        if total + self.spent > config.most_tokens:
            before = f", with {self.spent:,} of earlier answers" if self.spent else ""
            lines.append(
                f"more than --most-tokens {config.most_tokens:,}{before}: the rest stays unlabelled"
            )
        if self.unscored:
            lines.append(f"{self.unscored:,} features have too few windows for scores")
        return "\n".join(lines)


def estimate(materials: Iterable[Material], config: LabellerConfig, ledger: Ledger) -> Estimate:
    """What the labels and scores of these features would take."""
    found = Estimate()
    for material in materials:
        found.features += 1
        if config.score_labels and not (material.scored and material.quiet):
            found.unscored += 1
        for question, answer_tokens in _questions(material, config, ledger):
            reply = ledger.known(question, 0)
            if reply is not None:
                found.spent += reply.tokens_in + reply.tokens_out
                continue
            found.requests += 1
            found.tokens_in += estimated_tokens(question.n_bytes)
            found.tokens_out += answer_tokens
    return found


def _questions(
    material: Material, config: LabellerConfig, ledger: Ledger
) -> Iterator[tuple[Question, int]]:
    """The questions about a feature, with the tokens of their usual answers."""
    question = label_question(config.labeller or "", material)
    yield question, LABEL_ANSWER
    if not (config.score_labels and material.scored and material.quiet):
        return
    known = ledger.known(question, 0)
    answer = known and parse_answer(known.text, question.schema)
    described = Label.of(material.feature, answer).described if answer else USUAL
    for name, make in (("detection", detection_samples), ("fuzzing", fuzzing_samples)):
        for batch in batches(make(material, config.label_seed), config.scored_at_once):
            texts = [sample.text for sample in batch]
            yield judgement_question(config.scorer, name, described, texts), JUDGEMENT_ANSWER
