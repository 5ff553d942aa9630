"""Windows of tokens: the split, packing, random crops for training, fixed windows held out."""

import pytest
import torch
from tiny_model import tokenizer
from torch import Tensor

from sae_core.activations.token_windows import Tokens, TokenWindows, read_windows, split_texts
from sae_core.errors import SAEError
from sae_core.train_config import DataConfig

LENGTH = 16
BOS = -1
"""What `Numbered` windows begin with: no token of theirs."""


class Numbered(Tokens):
    """One token a character, and every token is its own position in the stream."""

    def __init__(self, bos: bool) -> None:
        self.bos, self.end_of_text = BOS if bos else None, -2

    def stream(self, texts: list[str]) -> Tensor:
        return torch.arange(len("".join(texts)), dtype=torch.int32)


def numbered(
    n_train: int = 203, n_held_out: int = 100, bos: bool = False, seed: int = 0
) -> TokenWindows:
    """Windows of `LENGTH` over streams of these lengths."""
    held_out = ["x" * n_held_out] if n_held_out else []
    return TokenWindows(Numbered(bos), ["x" * n_train], held_out, LENGTH, seed)


def all_windows(windows: TokenWindows, pass_index: int) -> Tensor:
    return windows.train(pass_index, torch.arange(windows.n_train))


# The split


@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 0.5])
def test_split_is_complete_and_disjoint(val_fraction: float) -> None:
    texts = [f"text {i}" for i in range(40)]
    train, held_out = split_texts(texts, val_fraction, seed=3)
    assert len(held_out) == 40 * val_fraction
    assert sorted(train + held_out) == sorted(texts)
    assert train == sorted(train, key=texts.index)  # both in the order of the texts
    assert held_out == sorted(held_out, key=texts.index)


def test_split_is_a_function_of_the_seed() -> None:
    texts = [f"text {i}" for i in range(40)]
    torch.manual_seed(1)
    first = split_texts(texts, 0.25, seed=3)
    torch.manual_seed(2)
    assert split_texts(texts, 0.25, seed=3) == first
    assert split_texts(texts, 0.25, seed=4) != first


@pytest.mark.parametrize(("n", "val_fraction"), [(4, 0.1), (1, 0.1), (1, 0.9), (2, 0.99)])
def test_too_few_texts_to_split(n: int, val_fraction: float) -> None:
    with pytest.raises(SAEError, match=rf"--val-fraction {val_fraction}: {n} texts are too few"):
        split_texts(["text"] * n, val_fraction, seed=0)
    assert split_texts(["text"] * n, 0.0, seed=0) == (["text"] * n, [])


# Packing


@pytest.mark.parametrize("bos", [False, True])
def test_stream_is_the_texts_joined_by_end_of_text(bos: bool, texts: list[str]) -> None:
    tokens = Tokens(tokenizer(" ".join(texts), bos))
    stream = tokens.stream(texts)
    ends = (stream == tokens.end_of_text).nonzero().squeeze(1)
    assert len(ends) == len(texts) and ends[-1] == len(stream) - 1
    pieces = stream.tensor_split(ends + 1)[:-1]
    assert [tokens.tokenizer.decode(piece[:-1]) for piece in pieces] == texts
    assert tokens.bos == (1 if bos else None)
    assert tokens.bos not in stream.tolist()


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
    stream = Tokens(made).stream(train)
    parts = [all_windows(windows, 0), windows.validation(), windows.evaluation()]
    assert windows.n_train == len(stream) // step and windows.positions == LENGTH - 1
    assert all(part.shape[1] == LENGTH and part.dtype == torch.long for part in parts)
    for part in parts:
        assert ((part == 1).sum(1) == (1 if bos else 0)).all()  # 1 is this tokenizer's BOS
        assert bool((part[:, 0] == 1).all()) == bos
    body = parts[0][:, -step:].flatten()
    doubled = torch.cat([stream, stream])
    assert any(torch.equal(doubled[at : at + len(body)], body) for at in range(len(stream)))
    both = torch.stack(list(torch.cat(parts[1:])))
    fixed = Tokens(made).stream(held_out)[: len(both) * step].view(-1, step)
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
    with pytest.raises(SAEError, match="held-out texts .* window or a larger --val-fraction"):
        numbered(least, least - 1, bos)
