"""The order of batches: shuffling, epochs, whole windows, and what is read ahead."""

from collections.abc import Iterator

import pytest
import torch
from synthetic import SparseDirections
from torch import Tensor

from sae_core.activations import loader, store
from sae_core.activations.store import ActivationSource
from sae_core.utils.errors import SAEError


class Numbered(ActivationSource):
    """The activation at position p of window w is the number 100 w + p."""

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        return (100 * indices[:, None] + torch.arange(self.positions))[..., None]


def numbered(tokens_per_step: int = 64, seed: int = 0, n_train: int = 50) -> Numbered:
    return Numbered(n_train, 7, 23, tokens_per_step, seed)


@pytest.mark.parametrize("shuffle_tokens", [1, 200, 10**6])
@pytest.mark.parametrize("tokens_per_step", [1, 23, 64, 10**6])
def test_an_epoch_sees_each_activation_at_most_once(
    tokens_per_step: int, shuffle_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", shuffle_tokens)
    source = numbered(tokens_per_step)
    batches = list(source.train_batches(0))
    size = min(tokens_per_step, 50 * 23)  # no larger than an epoch
    assert [batch.shape for batch in batches] == [(size, 1)] * source.steps_per_epoch
    assert len(batches) == 50 * 23 // size
    seen = torch.cat(batches).flatten()
    assert len(seen.unique()) == len(seen) and (seen % 100 < 23).all() and (seen < 5000).all()


def test_order_depends_on_seed_and_epoch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the windows that are shuffled together and the order within change."""
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", 10 * 23)
    orders = {
        (seed, epoch): torch.cat(list(numbered(10 * 23, seed).train_batches(epoch))).flatten()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    windows = {frozenset((order[:230] // 100).tolist()) for order in orders.values()}
    within = {tuple((part % 100).tolist()) for o in orders.values() for part in o.split(230)}
    assert (len(windows), len(within)) == (4, 4 * 5)
    again = torch.cat(list(numbered(10 * 23, seed=1).train_batches(1))).flatten()
    assert torch.equal(again, orders[1, 1])


@pytest.mark.parametrize(("shuffle_tokens", "least"), [(10**6, 30), (10 * 23, 9)])
def test_shuffling_mixes_windows(
    shuffle_tokens: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 activations of 50 windows, or of the 10 that are shuffled together."""
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", shuffle_tokens)
    source = numbered()
    assert source.shuffle_windows == min(50, shuffle_tokens // 23)
    for batch in source.train_batches(0):
        assert len((batch // 100).unique()) >= least


def test_validation_batches_are_every_window_in_order() -> None:
    source = numbered()
    batches = list(source.validation_batches())
    expected = source.read("validation", 0, torch.arange(7)).flatten(0, 1)
    assert torch.equal(torch.cat(batches), expected)
    assert all(len(batch) <= 64 for batch in batches)
    assert list(Numbered(50, 0, 23, 64, 0).validation_batches()) == []


@pytest.mark.parametrize("shuffle_tokens", [1, 10 * 23, 10**6])
@pytest.mark.parametrize("n_steps", [0, 1, 7, 17, 18])
def test_first_batches_of_an_epoch_read_the_windows_they_need(
    n_steps: int, shuffle_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", shuffle_tokens)
    source, read = numbered(), []
    numbers = source.read
    source.read = lambda *given: read.append(given[2]) or numbers(*given)  # type: ignore
    batches = list(source.train_batches(0, n_steps))
    assert source.steps_per_epoch == 17
    assert [batch.shape for batch in batches] == [(64, 1)] * min(n_steps, 17)
    if n_steps < 17:
        needed = -(-n_steps * 64 // 23)
        assert torch.equal(torch.cat([torch.empty(0), *read]), source._order(0)[:needed])


@pytest.mark.parametrize("tokens_per_step", [23, 40, 64, 115, 10**6])
def test_whole_windows_follow_those_that_batches_read(tokens_per_step: int) -> None:
    """Steps share no window, and between them take what their batches would."""
    source = numbered(tokens_per_step)
    steps = [source.windows_of(1, step) for step in range(source.steps_per_epoch)]
    taken = torch.cat(steps)
    assert torch.equal(taken, source._order(1)[: len(taken)])
    for n_steps, before in enumerate(steps):
        first = source._order(1).tolist().index(int(before[0]))
        assert first == -(-n_steps * source.tokens_per_step // 23)
    sizes = {len(step) for step in steps}
    assert max(sizes) - min(sizes) <= 1


def test_a_step_shorter_than_a_window_takes_a_whole_one() -> None:
    source = numbered(tokens_per_step=5)
    steps = [source.windows_of(0, step) for step in range(source.steps_per_epoch)]
    assert [len(step) for step in steps] == [1] * (50 * 23 // 5)
    order = source._order(0).tolist()
    assert [int(step) for step in steps] == [order[i % 50] for i in range(len(steps))]


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For millions of windows it takes as long as a small step."""
    randperm, drawn = torch.randperm, []
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: drawn.append(a) or randperm(*a, **k))
    source = numbered()
    for epoch in (0, 1):
        for step in range(source.steps_per_epoch):
            source.windows_of(epoch, step)
    assert drawn == [(50,), (50,)]


def test_what_fails_while_reading_ahead_is_raised() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise SAEError("the third")

    ahead = loader.one_ahead(items())
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(SAEError, match="the third"):
        next(ahead)
    assert list(loader.one_ahead(iter(range(5)))) == list(range(5))


def test_calibration_reads_windows_from_the_whole_of_the_held_out_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = SparseDirections(n_validation=30, tokens_per_step=64)
    everything = torch.cat(list(source.validation_batches()))
    assert torch.equal(torch.cat(list(source.calibration_batches())), everything)
    monkeypatch.setattr(store, "CALIBRATION_TOKENS", 8 * source.positions)
    some = torch.cat(list(source.calibration_batches())).view(-1, source.positions, 16)
    assert torch.equal(some, everything.view(30, source.positions, 16)[::4])
