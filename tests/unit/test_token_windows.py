"""Windows of tokens: the split, packing, random crops for training, fixed windows held out."""

import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from by_definition import in_memory, split_texts, stream
from tiny_model import tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sae_core.activations.token_windows import TokenWindows, corpus_windows, read_windows
from sae_core.corpus import repetition, split
from sae_core.corpus.corpora import json_list
from sae_core.corpus.repetition import overlap, repeated_share
from sae_core.corpus.split import Split
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokenise import tokenise
from sae_core.corpus.tokens import Tokens
from sae_core.data_processing.textbook_process import chunks
from sae_core.data_processing.texts import write_texts
from sae_core.train_config import DataConfig
from sae_core.utils.errors import SAEError

LENGTH = 16
BOS = -1
"""What numbered windows begin with: no token of theirs."""


def numbered(
    n_train: int = 203, n_held_out: int = 100, bos: bool = False, seed: int = 0
) -> TokenWindows:
    """Windows of `LENGTH` over streams of these lengths, in which every token is its place."""
    streams = (torch.arange(n, dtype=torch.int32) for n in (n_train, n_held_out))
    return TokenWindows(*streams, LENGTH, seed, BOS if bos else None)


def sides(texts: list[str], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """The texts of both sides of a split."""
    both = Split(in_memory(ByT5Tokenizer(), texts), val_fraction, seed)
    return [*both.texts(False)], [*both.texts(True)]


def all_windows(windows: TokenWindows, pass_index: int) -> Tensor:
    return windows.train(pass_index, torch.arange(windows.n_train))


# The split


@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 0.5])
def test_split_is_complete_and_disjoint(val_fraction: float) -> None:
    texts = [f"text {i}" for i in range(40)]
    train, held_out = sides(texts, val_fraction, seed=3)
    assert len(held_out) == 40 * val_fraction
    assert sorted(train + held_out) == sorted(texts)
    assert train == sorted(train, key=texts.index)  # both in the order of the texts
    assert held_out == sorted(held_out, key=texts.index)


def test_split_is_a_function_of_the_seed() -> None:
    texts = [f"text {i}" for i in range(40)]
    torch.manual_seed(1)
    first = sides(texts, 0.25, seed=3)
    torch.manual_seed(2)
    assert sides(texts, 0.25, seed=3) == first
    assert sides(texts, 0.25, seed=4) != first


@pytest.mark.parametrize(("n", "val_fraction"), [(4, 0.1), (1, 0.1), (1, 0.9), (2, 0.99)])
def test_too_few_texts_to_split(n: int, val_fraction: float) -> None:
    with pytest.raises(SAEError, match=rf"--val-fraction {val_fraction}: {n} texts are too few"):
        sides(["text"] * n, val_fraction, seed=0)
    assert sides(["text"] * n, 0.0, seed=0) == (["text"] * n, [])


def chunked(words: list[str], size: int, overlap: int) -> list[str]:
    return list(chunks(" ".join(words), size, overlap))


def words(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(n)]


def shared(train: list[str], held_out: list[str], n: int = 20) -> int:
    """Stretches of `n` characters on both sides."""
    sides = [{text[i : i + n] for text in side for i in range(len(text) - n)}
             for side in (train, held_out)]  # fmt: skip
    return len(sides[0] & sides[1])


@pytest.mark.parametrize(("size", "overlap"), [(200, 40), (200, 90), (200, 199), (1000, 100)])
@pytest.mark.parametrize("val_fraction", [0.1, 0.5])
def test_what_chunks_repeat_is_on_one_side(size: int, overlap: int, val_fraction: float) -> None:
    chapters = [words(600, seed) for seed in range(3)]
    texts = [chunk for chapter in chapters for chunk in chunked(chapter, size, overlap)]
    train, held_out = sides(texts, val_fraction, seed=5)
    assert shared(train, held_out) == 0 and repeated_share(train, held_out) == 0
    assert train and held_out
    assert {w for text in train + held_out for w in text.split()} == {*chain(*chapters)}


def test_texts_that_do_not_overlap_stay_as_they_are() -> None:
    texts = [f"{i} {' '.join(words(9, i))}" for i in range(200)]
    texts[7] = f"{texts[6]} {texts[8]}"  # what an author repeats is no overlap
    for seed in range(20):
        train, held_out = sides(texts, 0.5, seed)
        assert sorted(train + held_out) == sorted(texts)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("the end of a text is what follows", "of a text is what follows, and more", 25),
        ("of a text is what follows", "of a text is what follows", 25),
        ("no", "of a text is what follows, and more", 0),
        ("few follow", "few follow", 0),
        ("x" * 50, "x" * 30, 30),
        ("x" * 50 + "y", "x" * 50, 0),
        ("ab" * 30 + "a", "ba" * 20 + "ba", 42),
        ("what is, what is, and what is, ", "what is, and what is, so", 22),
    ],
)
def test_overlap(before: str, after: str, expected: int) -> None:
    longest = max(n for n in range(len(after) + 1) if before.endswith(after[:n]))
    assert overlap(before, after) == expected == (longest if longest >= 20 else 0)


def test_share_of_the_held_out_text_that_training_has(monkeypatch: pytest.MonkeyPatch) -> None:
    common, own = " ".join(words(300, 1)), " ".join(words(900, 2))
    train = [" ".join(words(500, 3)), f"so {common}", "short"]
    n, m = len(common) - 39, len(own) - 39
    assert repeated_share(train, [common, own, "short"]) == n / (n + m)
    assert repeated_share(train, ["short"]) == repeated_share(train, []) == 0
    assert repeated_share([], [own]) == 0
    monkeypatch.setattr(repetition, "BLOCK", 100)
    assert repeated_share(train, [common, own, "short"]) == n / (n + m)
    monkeypatch.setattr(repetition, "MOST_STRETCHES", 1000)
    assert repeated_share(train, [common, own]) == pytest.approx(n / (n + m), abs=0.05)


def test_the_share_of_a_large_corpus_is_computed_once(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "KEPT_FROM", 1)
    monkeypatch.setenv("SAE_CORE_CACHE", str(tmp_path / "cache"))
    calls = []

    def counted(train: Any, held_out: Any) -> float:
        calls.append(train)
        return repeated_share(train, held_out)

    monkeypatch.setattr(split, "repeated_share", counted)

    def share(given: list[str], seed: int = 0) -> float:
        write_texts(tmp_path / "texts.json", given)
        tokenise(json_list(tmp_path / "texts.json"), ByT5Tokenizer(), tmp_path / "tokens", 1)
        return Split(TokenFile.open(tmp_path / "tokens"), 0.5, seed).repeated()

    twice = texts[:4] * 2
    first = share(twice)
    assert 0 < first == share(twice) and len(calls) == 1
    assert [share(twice, 1), share(texts)] != [first, first] and len(calls) == 3
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("{")
    assert share(twice) == first == share(twice) and len(calls) == 4
    monkeypatch.setenv("SAE_CORE_CACHE", str(tmp_path / "texts.json"))  # no folder can be there
    assert share(twice) == first and len(calls) == 5


# Packing


@pytest.mark.parametrize("bos", [False, True])
def test_stream_is_the_texts_joined_by_end_of_text(bos: bool, texts: list[str]) -> None:
    tokens = Tokens(tokenizer(" ".join(texts), bos))
    packed, lengths = map(torch.from_numpy, tokens.packed(texts))
    ends = (packed == tokens.end_of_text).nonzero().squeeze(1)
    assert len(ends) == len(texts) and torch.equal(ends + 1, lengths.cumsum(0))
    pieces = packed.tensor_split(ends + 1)[:-1]
    assert [tokens.tokenizer.decode(piece[:-1]) for piece in pieces] == texts
    assert tokens.bos == (1 if bos else None)
    assert tokens.bos not in packed.tolist()


def ids_of(tokens: Tokens, *texts: str) -> list[int]:
    return tokens.packed(texts)[0].tolist()


SPELLED = "A text <bos> spells <|endoftext|> and<s> </s>."


@pytest.mark.parametrize("bos", [False, True])
def test_control_tokens_in_a_text_are_read_as_text(bos: bool) -> None:
    made = tokenizer(SPELLED, bos)
    tokens = Tokens(made)
    plain = made("A text about nothing of the kind.", add_special_tokens=False)["input_ids"]
    assert ids_of(tokens, "A text about nothing of the kind.")[:-1] == plain
    ids = ids_of(tokens, SPELLED, SPELLED)
    assert ids.count(0) == 2 and 1 not in ids  # 0 ends a text, and 1 is BOS
    assert made.decode(ids[: len(ids) // 2 - 1]) == SPELLED
    assert made("<bos>", add_special_tokens=False)["input_ids"] == [1]  # it still is one


@pytest.mark.parametrize("model", [models.Unigram, models.WordPiece, models.WordLevel, models.BPE])
def test_control_tokens_of_every_family_of_tokenizers(model: Any) -> None:
    special = ["<unk>", "<s>", "</s>"]
    known = {} if model is models.Unigram else {"unk_token": "<unk>"}
    made = Tokenizer(model(**known))
    spaces = pre_tokenizers.WhitespaceSplit() if "Word" in model.__name__ else None
    made.pre_tokenizer = spaces or pre_tokenizers.Metaspace()
    trainer = made.model.get_trainer()
    trainer.special_tokens = [AddedToken(token, special=True) for token in special]
    made.train_from_iterator([SPELLED] * 9, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokens = Tokens(fast)
    ids, end = ids_of(tokens, SPELLED, "A text spells"), tokens.end_of_text
    assert not {fast.bos_token_id, fast.eos_token_id} - {end} & set(ids) and ids.count(end) == 2
    plain = fast("A text spells", add_special_tokens=False)["input_ids"]
    assert ids[ids.index(end) + 1 :] == [*plain, end]


def test_control_tokens_of_a_tokenizer_in_python() -> None:
    made = ByT5Tokenizer()
    ids = ids_of(Tokens(made), "a</s>")
    assert made.convert_ids_to_tokens(ids) == [*"a</s>", "</s>"]


def test_a_tokenizer_that_does_more_than_its_library_is_asked_itself() -> None:
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, texts: Any, **settings: Any) -> Any:
            texts = [texts.upper()] if isinstance(texts, str) else [text.upper() for text in texts]
            return super().__call__(texts, **settings)

    plain = tokenizer("a text and A TEXT")
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer, eos_token="<|endoftext|>")
    assert ids_of(Tokens(shouting), "a text") == ids_of(Tokens(plain), "A TEXT")
    plain.backend_tokenizer.enable_truncation(1)
    plain.backend_tokenizer.enable_padding(length=9)
    assert ids_of(Tokens(plain), "A TEXT") == ids_of(Tokens(shouting), "a text")


def test_no_end_of_text_token() -> None:
    bare = tokenizer("some text")
    bare.eos_token = None
    assert Tokens(bare).end_of_text == 0  # <|endoftext|> is in the vocabulary
    bare.get_vocab = lambda: {}  # type: ignore[method-assign]
    with pytest.raises(SAEError, match="no end-of-text token .* set its eos_token"):
        Tokens(bare)


@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_full_and_follow_the_tokenizer_about_bos(bos: bool, texts: list[str]) -> None:
    made = tokenizer(" ".join(texts), bos)
    windows = read_windows(made, texts, DataConfig(LENGTH, val_fraction=0.25, seed=0))
    train, held_out = split_texts(texts, 0.25, 0)
    step = LENGTH - 1 if bos else LENGTH
    ring = stream(made, train)
    parts = [all_windows(windows, 0), windows.validation(), windows.evaluation()]
    assert windows.n_train == len(ring) // step and windows.positions == LENGTH - 1
    assert all(part.shape[1] == LENGTH and part.dtype == torch.long for part in parts)
    for part in parts:
        assert ((part == 1).sum(1) == (1 if bos else 0)).all()  # 1 is this tokenizer's BOS
        assert bool((part[:, 0] == 1).all()) == bos
    body = parts[0][:, -step:].flatten()
    doubled = torch.cat([ring, ring])
    assert any(torch.equal(doubled[at : at + len(body)], body) for at in range(len(ring)))
    both = torch.stack(list(torch.cat(parts[1:])))
    fixed = stream(made, held_out)[: len(both) * step].view(-1, step)
    assert sorted(both[:, -step:].tolist()) == sorted(fixed.tolist())


# Crops


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pass_index", range(4))
def test_pass_is_a_walk_around_the_ring(bos: bool, pass_index: int) -> None:
    windows = numbered(bos=bos)
    walked = all_windows(windows, pass_index)
    if bos:
        assert (walked[:, 0] == BOS).all()
        walked = walked[:, 1:]
    walked = walked.flatten()
    assert len(walked) == len(walked.unique()) > 203 - LENGTH  # each token at most once
    assert (torch.diff(walked) % 203 == 1).all()  # 202 is followed by 0


def test_crop_depends_on_seed_pass_and_index_alone() -> None:
    windows = numbered(seed=3)
    whole = {p: all_windows(windows, p) for p in (2, 0, 1)}
    again = numbered(seed=3)
    some = torch.tensor([5, 0, 11])
    for pass_index in (0, 1, 2):
        assert torch.equal(again.train(pass_index, some), whole[pass_index][some])
    starts = {int(all_windows(numbered(seed=s), p)[0, 0]) for s in range(3) for p in range(3)}
    assert len(starts) >= 8  # of nine draws from 203


def test_every_token_is_seen_by_some_pass() -> None:
    windows = numbered()
    seen = torch.cat([all_windows(windows, p).flatten() for p in range(40)])
    assert len(seen.unique()) == 203


def test_stream_of_exactly_one_window() -> None:
    windows = numbered(n_train=LENGTH)
    assert windows.n_train == 1
    assert sorted(all_windows(windows, 0)[0].tolist()) == list(range(LENGTH))


# Held-out windows


@pytest.mark.parametrize("bos", [False, True])
def test_held_out_windows_are_fixed_and_disjoint(bos: bool) -> None:
    windows, step = numbered(bos=bos), LENGTH - 1 if bos else LENGTH
    validation, evaluation = windows.validation()[:, -step:], windows.evaluation()[:, -step:]
    assert (len(validation), len(evaluation)) == (3, 3)
    assert torch.equal(validation[:, 0], torch.tensor([0, 2, 4]) * step)
    assert torch.equal(evaluation[:, 0], torch.tensor([1, 3, 5]) * step)
    both = torch.cat([validation, evaluation]).flatten()
    assert sorted(both.tolist()) == list(range(6 * step))
    assert torch.equal(numbered(bos=bos, seed=9).validation(), windows.validation())
    some = torch.tensor([2, 0])
    assert torch.equal(windows.validation(some), windows.validation()[some])


@pytest.mark.parametrize("n_held_out", [0, LENGTH, 2 * LENGTH, 5 * LENGTH])
def test_number_of_held_out_windows(n_held_out: int) -> None:
    windows = numbered(n_held_out=n_held_out)
    n = n_held_out // LENGTH
    assert (windows.n_validation, windows.n_evaluation) == (-(-n // 2), n // 2)
    assert windows.validation().shape == (windows.n_validation, LENGTH)
    assert windows.evaluation().shape == (windows.n_evaluation, LENGTH)


@pytest.mark.parametrize("bos", [False, True])
def test_shorter_than_one_window(bos: bool) -> None:
    least = LENGTH - 1 if bos else LENGTH
    numbered(least, least, bos)
    with pytest.raises(SAEError, match=f"--max-text-length 16: the training texts .* {least - 1} "):
        numbered(least - 1, least, bos)
    with pytest.raises(SAEError, match="held-out texts .* window, or raise --val-fraction"):
        numbered(least, least - 1, bos)


@pytest.mark.parametrize("most", [0, 1, 3, 1000])
def test_the_first_evaluation_windows(most: int) -> None:
    windows = numbered()
    assert torch.equal(windows.evaluation(most), windows.evaluation()[:most])


# The windows of the corpus, with the text of every token


@pytest.mark.parametrize("bos", [False, True])
def test_corpus_windows_label_every_token(texts: list[str], bos: bool) -> None:
    made = tokenizer(" ".join(texts), bos=bos)
    tokens = in_memory(made, texts)
    windows = corpus_windows(tokens, LENGTH, 10_000)
    first = 1 if bos else 0
    assert windows.tokens.shape == windows.text.shape == (len(windows.tokens), LENGTH)
    assert torch.equal(
        windows.tokens[:, first:].flatten(),
        stream(made, texts)[: windows.tokens[:, first:].numel()],
    )
    ends = (windows.tokens[:, first:].flatten() == tokens.end_of_text).long()
    assert torch.equal(windows.text[:, first:].flatten().long(), ends.cumsum(0) - ends)
    assert not bos or (windows.tokens[:, 0] == tokens.bos).all()


def test_some_windows_of_a_long_corpus(texts: list[str]) -> None:
    tokens = in_memory(tokenizer(" ".join(texts)), texts)
    every = corpus_windows(tokens, LENGTH, 10_000)
    some = corpus_windows(tokens, LENGTH, 5)
    at = [i * len(every.tokens) // 5 for i in range(5)]
    assert torch.equal(some.tokens, every.tokens[at]) and torch.equal(some.text, every.text[at])
    with pytest.raises(SAEError, match="--max-text-length 100000: the texts have"):
        corpus_windows(tokens, 100_000, 5)
