"""Labels without an LLM, for features of which it is known what they fire on."""

import math
import re
from collections.abc import Sequence

import torch
from synthetic import random_sae

from sae_core.evaluation.default_labels import DefaultLabels, Label
from sae_core.evaluation.features import feature_table
from sae_core.evaluation.tally import Tally
from sae_core.evaluation.words import Pieces, Words
from sae_core.sae.sparse_ops import sparse

SENTENCES = (
    "The plant makes sugar by photosynthesis, and photosynthesis needs light.",
    "An acid of hydrogen holds many atoms of oxygen; Acid rain is made by them.",
    "The force of gravity on a mass is measured by a balance.",
)
NOUNS = [a + b for a in ("ba", "de", "fi", "go", "lu", "mo") for b in ("nar", "tel", "rim", "sok")]
"""Words that come once, or nearly so."""
END = "<|end|>"
SPLIT = ("photos", "tion")
LENGTH = 23
N_TEXTS = 480


def made_up(i: int) -> str:
    """The i-th text: every word of `NOUNS` in some of them, a number of its own in every fourth."""
    a, b, c = (NOUNS[(i // 24 + n) % len(NOUNS)] for n in range(3))
    rare = (
        f"A cup of {a} with {10 + i} grams.",
        f"They say that in the end the {a}tion was slow.",
        f"An enzyme {a} {b} {c}.",
    )
    kind = i % 24
    return rare[kind // 6] if kind % 6 == 0 and kind < 18 else SENTENCES[i % len(SENTENCES)]


class Tokenizer:
    """A token is a word with the space before it, a sign, or one of the pieces of `SPLIT`."""

    def __init__(self) -> None:
        self.names = [END]

    def read(self, text: str) -> list[int]:
        found = re.findall(rf" ?(?:{'|'.join(SPLIT)}|\w+?(?=tion\b)|\w+)|\W", text)
        self.names += [piece for piece in dict.fromkeys(found) if piece not in self.names]
        return [self.names.index(piece) for piece in found]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.names[token] for token in tokens)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.names[token]


class Read:
    """Texts as windows; two subjects."""

    def __init__(self, texts: Sequence[str]) -> None:
        tokenizer = Tokenizer()
        ids, text = [], []
        for number, sentence in enumerate(texts):
            tokens = [*tokenizer.read(sentence), 0]
            ids += tokens
            text += [number] * len(tokens)
        n = len(ids) // LENGTH * LENGTH
        windows = torch.tensor(ids[:n]).view(-1, LENGTH)
        self.texts = torch.tensor(text[:n]).view(-1, LENGTH)
        self.words = Words(Pieces(tokenizer), windows, 0)
        self.pieces = [piece for window in self.words.pieces for piece in window]
        self.names = [self.words.names[i] for i in self.words.ids]

    def label(self, *active: Sequence[float]) -> list[Label]:
        """Of features whose activations on all tokens are given."""
        code = torch.tensor(active, dtype=torch.float32).T.contiguous()  # (tokens, features)
        tally = Tally(len(active), 2, top=10, context=8, device=torch.device("cpu"))
        subject = (self.texts >= N_TEXTS // 2).long()
        tally.add(sparse([code]), torch.zeros_like(self.texts, dtype=torch.bool), subject)
        table = feature_table(random_sae("standard", d_in=4, d_sae=len(active)), tally)
        return DefaultLabels(table, self.words, ("one", "two")).of_all()

    def on(self, *words: str, strength: float = 1.0) -> list[float]:
        return [strength * (name in words) for name in self.names]

    def once(self, *words: str, strength: float = 1.0) -> list[float]:
        """On one token of each word, none in the window of another."""
        active, taken = [0.0] * len(self.names), set[int]()
        for word in words:
            at = next(
                i for i, n in enumerate(self.names)
                if n == word and i // LENGTH not in taken and i % LENGTH
            )  # fmt: skip
            taken.add(at // LENGTH)
            active[at] = strength
        return active


READ = Read([made_up(i) for i in range(N_TEXTS)])
DIFFERENT = ("plant", "makes", "needs", "light", "hydrogen", "atoms", "oxygen", "gravity", "rain")
"""Words of different sentences and places."""


def test_words_are_whole_lower_case_and_know_the_word_before() -> None:
    at = next(
        i for i, p in enumerate(READ.pieces) if p == "ynthesis" and 4 < i % LENGTH < LENGTH - 1
    )
    assert READ.pieces[at - 1] == " photos"
    assert READ.names[at] == READ.names[at - 1] == "photosynthesis"
    before = [READ.words.names[i] if i >= 0 else None for i in READ.words.before.tolist()]
    assert before[at] == before[at - 1] in ("by", "and") and before[at + 1] == "photosynthesis"
    assert before[0] is None
    assert "acid" in READ.names and "Acid" not in READ.words.names and "¶" in READ.words.names
    assert int(READ.words.counts.sum()) == len(READ.names)


def test_a_word_and_its_share_of_the_activation() -> None:
    """The share is of the activation, not of the tokens: the other word is as frequent."""
    strong, weak = READ.on("photosynthesis", strength=6.0), READ.on("needs", strength=4.0)
    one, two = READ.label(strong, [a + b for a, b in zip(strong, weak, strict=True)])
    assert one.text == "photosynthesis (100%)" and one.peaks == [("photosynthesis", 10)]
    total, on_it = sum(strong) + sum(weak), sum(strong)
    [share] = re.fullmatch(r"photosynthesis \((\d+)%\)", two.text).groups()  # type: ignore[union-attr]
    assert abs(int(share) / 100 - on_it / total) < 0.15


def test_several_words() -> None:
    [label] = READ.label([READ.names[i] in ("acid", "gravity") for i in range(len(READ.names))])
    name, share = label.text.split(" (")
    assert set(name.split(", ")) == {"acid", "gravity"} and share == "100%)"


def test_a_piece_of_different_words() -> None:
    [label] = READ.label([float(piece == "tion") for piece in READ.pieces])
    assert label.text == "…tion (100%)"


def test_a_piece_beside_a_word() -> None:
    pieces = [i for i, piece in enumerate(READ.pieces) if piece == "tion"][:5]
    active = READ.once(*["light"] * 5)
    for i in pieces:
        active[i] = 1.0
    [label] = READ.label(active)
    assert label.text == "light, …tion (100%), one"


def test_a_strong_window_counts_more_than_a_weak_one() -> None:
    strong, weak = READ.once("acid", "acid", strength=50.0), READ.once(*DIFFERENT)
    [label] = READ.label([max(pair) for pair in zip(strong, weak, strict=True)])
    assert re.fullmatch(r"acid \(9\d%\), one", label.text)


def test_peaks_that_share_nothing_are_called_mixed() -> None:
    few, many = READ.label(READ.once(*DIFFERENT[:3]), READ.once(*DIFFERENT))
    assert few.text == "plant, needs, makes (100%), one"
    assert re.fullmatch(r"mixed: \w+, \w+, \w+ \(33%\), one", many.text)


def test_a_class_of_tokens() -> None:
    [label] = READ.label([float(name.isdigit()) for name in READ.names])
    assert label.text == "numbers (100%)"


def test_years_are_told_from_other_numbers() -> None:
    read = Read([f"It was said that in {1780 + i % 200} they had {i}." for i in range(N_TEXTS)])
    years = [float(bool(re.fullmatch("1[789]..", name))) for name in read.names]
    numbers = [float(name.isdigit()) - y for name, y in zip(read.names, years, strict=True)]
    assert [label.text for label in read.label(years, numbers)] == [
        "years (100%)", "numbers (100%)",
    ]  # fmt: skip


def test_signs_stand_between_quotes() -> None:
    """So that a comma is told from those between the names."""
    [label] = READ.label(READ.once("acid", "acid", "acid", ",", ",", ";", ";"))
    assert label.text.startswith("acid, “,”, “;” (100%)")


def test_the_word_before() -> None:
    before = [READ.words.names[i] if i >= 0 else "" for i in READ.words.before.tolist()]
    [label] = READ.label(
        [float(b == "of" and n in NOUNS) for b, n in zip(before, READ.names, strict=True)]
    )
    assert label.text == "after “of” (100%)"


def test_a_word_that_stands_before_all_peaks() -> None:
    """Which of the three words after it is active changes."""
    at = [i for i, name in enumerate(READ.names) if name == "enzyme"]
    active = [0.0] * len(READ.names)
    for n, i in enumerate(at):
        active[min(i + 1 + n % 3, len(active) - 1)] = 1.0
    [label] = READ.label(active)
    assert label.text.startswith("near “enzyme” (")


def test_a_context_of_few_windows_may_be_chance() -> None:
    """Three words after the same one, which are not all after it."""
    at = [i + 1 for i, name in enumerate(READ.names) if name == "enzyme" and i % LENGTH < 20][::4]
    active = [0.0] * len(READ.names)
    for i in at[:4]:
        active[i] = 1.0
    [label] = READ.label(active)
    assert "enzyme" not in label.text and "after" not in label.text


def test_subject_and_silence() -> None:
    text = READ.texts.flatten().tolist()
    late = [
        float(t >= N_TEXTS // 2 and name == "mass")
        for t, name in zip(text, READ.names, strict=True)
    ]
    first = [float(i % LENGTH == 0) for i in range(len(READ.names))]
    silent, only_first, of_two = READ.label([0.0] * len(text), first, late)
    assert silent.text == "never active" and only_first.text == "position 0 only"
    assert of_two.text == "mass (100%), two"
    assert silent.score < of_two.score and not math.isnan(of_two.score)


def test_a_word_says_more_than_a_sign_and_a_sharp_feature_more_than_a_blunt_one() -> None:
    blunt = [1.0 * (len(name) > 3) * (1 + i % 11) for i, name in enumerate(READ.names)]
    word, sign, many = READ.label(READ.on("enzyme"), READ.on(";"), blunt)
    assert word.text.startswith("enzyme (100%)") and sign.text.startswith("“;” (100%)")
    assert word.score > max(sign.score, many.score)
