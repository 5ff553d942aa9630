"""Labels by a language model that knows the answers, or does not: what is asked, and the scores."""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest

from sae_core.labelling.answers import parse_answer
from sae_core.labelling.asking import Asker
from sae_core.labelling.chat import Reply
from sae_core.labelling.config import AskingConfig, LabellerConfig
from sae_core.labelling.estimate import estimate
from sae_core.labelling.label_files import in_words, label_figures, read_labels, write_labels
from sae_core.labelling.labeller import Labeller
from sae_core.labelling.labels import Label
from sae_core.labelling.ledger import Ledger
from sae_core.labelling.prompts import LABEL_SCHEMA, Question, judgement_schema, label_question
from sae_core.labelling.scores import balanced_accuracy
from sae_core.labelling.windows import CONTRAST, Material, Pool, Window
from sae_core.utils.errors import SAEError

N = 12
CONFIG = LabellerConfig(labeller="oracle")


class Stub:
    """A language model in this process."""

    where = "here"

    def __init__(self, answer: Callable[[Question], Any], tokens_in: int = 50) -> None:
        self.answer, self.tokens_in = answer, tokens_in
        self.questions: list[Question] = []

    async def ask(self, question: Question) -> Reply:
        self.questions.append(question)
        found = self.answer(question)
        return Reply(found if isinstance(found, str) else json.dumps(found), self.tokens_in, 10)

    async def close(self) -> None:
        pass


def perfect(question: Question) -> dict[str, Any]:
    return oracle.answer(question.user)


def materials(n: int = N) -> list[Material]:
    entries = [oracle.entry(feature) for feature in range(n)]
    return list(map(Pool(entries, 0).material, entries))


def labels_by(
    stub: Stub,
    config: LabellerConfig = CONFIG,
    ledger: Ledger | None = None,
    given: Iterable[Material] | None = None,
    at_once: int = 3,
) -> list[Label]:
    asker = Asker(stub, ledger or Ledger(None, config), tries=2)
    work = Labeller(asker, config).run(given or materials(), at_once, lambda: None)
    return asyncio.run(work)


# The windows


def test_the_labeller_and_the_scorer_see_different_windows() -> None:
    [first, *_] = found = materials()
    assert len(first.shown) == len(first.scored) == len(first.quiet) == 5
    assert len(first.contrast) == CONTRAST
    for material in found:
        word = oracle.word(material.feature)
        assert all(word in window.tokens for window in material.shown + material.scored)
        assert not any(word in window.tokens for window in material.contrast + material.quiet)
        seen = {window.tokens for window in material.shown + material.contrast}
        assert not seen & {window.tokens for window in material.scored + material.quiet}


def test_windows_without_activation_are_of_no_related_feature() -> None:
    entries = [oracle.entry(feature) for feature in range(6)]
    entries[0] |= {"neighbours": [[1, 0.9]], "partners": [[2, 0.5, 10]]}
    material = Pool(entries, 0).material(entries[0])
    assert {window.feature for window in material.contrast + material.quiet} == {3, 4, 5}
    assert all(window.peak == 0 for window in material.quiet)


def test_text_that_overlaps_a_features_own_is_no_window_without_activation() -> None:
    entries = [oracle.entry(feature) for feature in range(2)]
    for one, other in zip(entries[0]["top"], entries[1]["top"], strict=True):
        other |= {"text": one["text"], "position": one["position"], "peak": one["peak"]}
    entries[1]["quantiles"] = []
    material = Pool(entries, 0).material(entries[0])
    assert not material.quiet and not material.contrast


def test_windows_seen_by_the_labeller_are_not_scored() -> None:
    entry = oracle.entry(0)
    entry["top"] = [entry["top"][0]] * 8
    material = Pool([entry], 0).material(entry)
    assert len(material.scored) == 1  # one of the two at the quantiles


def test_marks() -> None:
    window = Window(0, 0, 0, ("a", " b", " c", "", " d"), (0.0, 4.0, 3.0, 0.0, 1.0))
    assert window.marks() == [False, True, True, False, False], "1 is below 0.3 of 4"
    assert window.shown(window.marks()) == "a<< b c>> d"
    assert window.shown([True, False, False, True, True]) == "<<a>> b c<< d>>"
    assert window.shown() == "a b c d"


def test_the_prompt_has_what_is_known_of_the_feature() -> None:
    [material, *_] = materials()
    question = label_question("m", material)
    texts = oracle.windows_of(question.user)
    assert len(texts) == len(material.shown) + len(material.contrast)
    assert sum("<<word0>>" in text for text in texts) == len(material.shown)
    assert '" next0"' in question.user and "1. 1.00  " in question.user


# The answers

GOOD = {"label": "a", "description": "b", "confidence": 0.5}


@pytest.mark.parametrize(
    "text",
    [json.dumps(GOOD), f"```json\n{json.dumps(GOOD, indent=1)}\n```",
     f"<think>{{maybe}}</think>\n{json.dumps(GOOD)}"],
)  # fmt: skip
def test_an_answer_is_read(text: str) -> None:
    assert parse_answer(text, LABEL_SCHEMA) == GOOD


@pytest.mark.parametrize(
    "text",
    ["", "no", "[]", "{", '{"label": "a", "description": "b"}',
     json.dumps(GOOD | {"confidence": 1.5}), json.dumps(GOOD | {"confidence": True}),
     json.dumps(GOOD | {"label": "  "}), json.dumps(GOOD | {"label": 7}),
     json.dumps(GOOD | {"more": 1}), json.dumps(GOOD).replace("0.5", "NaN"),
     json.dumps(GOOD).replace("0.5", "1e999"), "[" * 100_000 + "{}",
     "{" * 3_000_000, "<think>" * 1_000_000],
)  # fmt: skip
def test_an_answer_that_is_not_in_the_schema(text: str) -> None:
    assert parse_answer(text, LABEL_SCHEMA) is None


def test_a_judgement_has_one_value_a_window() -> None:
    assert parse_answer('{"active": [true, false]}', judgement_schema(2))
    assert parse_answer('{"active": [true]}', judgement_schema(2)) is None
    assert parse_answer('{"active": [true, 1]}', judgement_schema(2)) is None


# The scores


def test_balanced_accuracy() -> None:
    truth = [True, True, True, False]
    assert balanced_accuracy(truth, truth) == 1
    assert balanced_accuracy(truth, [True, False, False, False]) == pytest.approx(2 / 3)
    assert balanced_accuracy(truth, [False, False, False, True]) == 0
    assert balanced_accuracy([True], [True]) is None


def test_a_perfect_oracle_scores_1() -> None:
    labels = labels_by(Stub(perfect))
    assert [label.label for label in labels] == [oracle.word(feature) for feature in range(N)]
    assert [label.feature for label in labels] == list(range(N))
    assert {(label.detection, label.fuzzing, label.status) for label in labels} == {(1, 1, "ok")}


@pytest.mark.parametrize("same", [True, False])
def test_a_scorer_that_always_says_the_same_scores_one_half(same: bool) -> None:
    def answer(question: Question) -> dict[str, Any]:
        if question.name == "label":
            return perfect(question)
        return {"active": [same] * len(oracle.windows_of(question.user))}

    labels = labels_by(Stub(answer))
    assert {(label.detection, label.fuzzing) for label in labels} == {(0.5, 0.5)}


def test_a_labeller_that_always_says_the_same_scores_one_half() -> None:
    def answer(question: Question) -> dict[str, Any]:
        return GOOD if question.name == "label" else perfect(question)

    labels = labels_by(Stub(answer))
    assert {(label.detection, label.fuzzing) for label in labels} == {(0.5, 0.5)}


def test_scores_tell_good_labels_from_shuffled_ones() -> None:
    """By at least 0.2; here the oracle's are perfect, and a wrong word is never there."""
    good = labels_by(Stub(perfect))
    moved = {label.feature: good[(label.feature + 5) % N] for label in good}
    asker = Asker(Stub(perfect), Ledger(None, CONFIG), tries=1)
    labeller = Labeller(asker, CONFIG)

    async def scored() -> list[Label]:
        return [
            await labeller.scored(moved[m.feature]._replace(feature=m.feature), m)
            for m in materials()
        ]

    shuffled = label_figures(asyncio.run(scored()))
    for name in ("detection", "fuzzing"):
        assert label_figures(good)[name] - shuffled[name] >= 0.2


def test_only_fuzzing_has_marked_tokens_as_many_in_every_window() -> None:
    stub = Stub(perfect)
    labels_by(stub, given=materials()[:1])
    texts: dict[str, list[str]] = {"label": [], "detection": [], "fuzzing": []}
    for question in stub.questions:
        texts[question.name] += oracle.windows_of(question.user)
    assert [text.count("<<") for text in texts["fuzzing"]] == [1] * 10
    assert [text.count("<<") for text in texts["detection"]] == [0] * 10


def test_another_model_scores() -> None:
    stub = Stub(perfect)
    labels_by(stub, LabellerConfig(labeller="a", label_scorer="b"), given=materials()[:1])
    assert {(q.name, q.model) for q in stub.questions} == {
        ("label", "a"), ("detection", "b"), ("fuzzing", "b"),
    }  # fmt: skip


def test_labels_without_scores() -> None:
    stub = Stub(perfect)
    labels = labels_by(stub, LabellerConfig(labeller="a", score_labels=False))
    assert len(stub.questions) == N and {label.detection for label in labels} == {None}


def test_a_feature_without_other_windows_is_labelled_and_not_scored() -> None:
    [label] = labels_by(Stub(perfect), given=materials(1))
    assert label.status == "ok" and label.detection is None and label.fuzzing is None


# Answers that are no use, and the ceiling


def test_an_answer_not_in_the_schema_is_asked_for_again_and_then_recorded() -> None:
    def answer(question: Question) -> Any:
        if question.name == "label":
            bad = "word3" in question.user or ("word5" in question.user and next(once, False))
            return {"label": "x"} if bad else perfect(question)
        return "I cannot say" if "The feature: word7" in question.user else perfect(question)

    once = iter([True])
    stub = Stub(answer)
    given = without_contrast(materials())
    found = {label.feature: label for label in labels_by(stub, given=given)}
    assert found[3] == Label(3, status="invalid answer")
    assert found[5].status == "ok" and found[5].detection == 1
    assert found[7].status == "ok" and found[7].detection is None and found[7].fuzzing is None
    asked = [q.user for q in stub.questions if q.name == "label"]
    assert len(asked) == N + 2 and len(set(asked)) == N
    assert in_words(list(found.values())) == (
        "11 of 12 features are labelled; mean detection 1.00; mean fuzzing 1.00; 1 invalid answer"
    )


def without_contrast(given: list[Material]) -> list[Material]:
    """So that a feature's word is in no other feature's first request."""
    return [Material(m.feature, m.promoted, m.shown, (), m.scored, m.quiet) for m in given]


def test_the_ceiling_on_tokens_holds() -> None:
    config = LabellerConfig(labeller="a", most_tokens=6000, answer_tokens=100)
    stub = Stub(perfect, tokens_in=300)
    ledger = Ledger(None, config)
    labels = labels_by(stub, config, ledger, at_once=4)
    assert 3000 < ledger.spent <= 6000
    assert ledger.spent == 310 * len(stub.questions)
    statuses = {label.status for label in labels}
    assert statuses == {"ok", "not asked"} and len(labels) == N
    more = LabellerConfig(labeller="a", most_tokens=60_000, answer_tokens=100)
    assert {label.status for label in labels_by(stub, more)} == {"ok"}


def test_tokens_of_earlier_answers_count(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    config = LabellerConfig(labeller="a", most_tokens=6000, answer_tokens=100)
    first = labels_by(Stub(perfect, 300), config, Ledger(path, config), at_once=1)
    stub = Stub(perfect, 300)
    again = labels_by(stub, config, Ledger(path, config), at_once=1)
    assert again == first and not stub.questions


def test_an_estimate_is_what_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    before = estimate(materials(), CONFIG, Ledger(path, CONFIG))
    stub = Stub(perfect)
    labels_by(stub, ledger=Ledger(path, CONFIG), given=materials()[:4])
    middle = estimate(materials(), CONFIG, Ledger(path, CONFIG))
    assert before.requests == N * 5 and middle.requests == (N - 4) * 5
    assert len(stub.questions) == 4 * 5 and before.unscored == 0
    # The ceiling is on the tokens of all answers, earlier ones too.
    spent = sum(sum(reply) for reply in replies(path))
    assert middle.spent == spent and before.spent == 0
    left = middle.tokens_in + middle.tokens_out
    for most, is_enough in ((spent + left, True), (spent + left - 1, False)):
        said = middle.in_words(replace(CONFIG, most_tokens=most), AskingConfig(endpoint="http://x"))
        assert ("more than --most-tokens" in said) == (not is_enough)


def replies(path: Path) -> list[tuple[int, int]]:
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["tokens_in"], line["tokens_out"]) for line in lines]


# The file


def test_the_file_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels/run.jsonl"
    labels = [Label(3, "a", "b", 0.5, 0.75, None), Label(1, status="refused")]
    write_labels(path, labels)
    assert list(read_labels(path).values()) == labels
    assert json.loads(path.read_text().splitlines()[0]) == {
        "feature": 3, "label": "a", "description": "b", "confidence": 0.5, "detection": 0.75,
        "fuzzing": None, "status": "ok",
    }  # fmt: skip
    for damage in ("{", '{"feature": "3"}', '{"feature": 3}'):
        path.write_text(damage)
        with pytest.raises(SAEError, match="run.jsonl"):
            read_labels(path)
    path.write_text(json.dumps(Label(3)._asdict() | {"confidence": "high", "fuzzing": []}))
    with pytest.raises(SAEError, match=r"not a whole label \(confidence, fuzzing\)"):
        read_labels(path)
