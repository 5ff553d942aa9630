"""From the disk to a device: the batches of a GPU are those of a CPU, and nothing hangs."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, OnGPU, PretendGPU, pretended_streams
from torch import Tensor

from sae_core.activations import loader, store
from sae_core.activations.loader import Chunk, Form, shuffled_chunks
from sae_core.activations.shards import harvest
from sae_core.activations.store import CachedSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.models.language_model import Hook, LanguageModel

HOOK, TARGET = Hook(1, "mlp.hook_in"), Hook(1, "hook_mlp_out")
CPU = torch.device("cpu")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    pretended_streams(monkeypatch.setattr)
    with PretendGPU():
        yield GPU


@pytest.fixture(scope="module")
def shards(
    language_model: LanguageModel, windows: TokenWindows, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    root = tmp_path_factory.mktemp("shards")
    for shard in (0, 1):
        options = {"batch_size": 5, "n_shards": 2, "shard": shard}
        harvest(language_model, windows, [HOOK, TARGET], root / str(shard), **options)
    return [root / "0", root / "1"]


@pytest.mark.parametrize("target", [None, TARGET])
@pytest.mark.parametrize("together", [23 * 7, 10**6])
def test_batches_on_a_gpu_are_those_of_a_cpu(
    target: Hook | None,
    together: int,
    shards: list[Path],
    a_gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In several chunks and in one; training and validation."""
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", together)
    there, here = (
        CachedSource(shards, HOOK, tokens_per_step=100, seed=5, target=target, device=device)
        for device in (a_gpu, CPU)
    )
    for name in ("train_batches", "validation_batches"):
        given = [0] if name == "train_batches" else []
        found, expected = (list(getattr(source, name)(*given)) for source in (there, here))
        assert len(found) == len(expected) > 2
        for mine, theirs in zip(found, expected, strict=True):
            assert isinstance(mine, OnGPU) and not isinstance(theirs, OnGPU)
            assert torch.equal(mine.cpu(), theirs)


FORM = Form(sites=1, positions=2, width=1, dtype=torch.float32)


def chunks(n: int) -> Iterator[Chunk]:
    for number in range(n):
        yield Chunk(torch.tensor([2 * number, 2 * number + 1]), torch.tensor([3, 2, 1, 0]))


def numbers(rows: Tensor, windows: Tensor) -> None:
    rows.copy_(windows.view(1, -1, 1, 1).expand_as(rows))


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_loader_that_is_left_early_ends(device: torch.device, a_gpu: torch.device) -> None:
    before = set(threading.enumerate())  # those of an earlier test may end meanwhile
    for n_taken in (1, 2, 5):
        rows = shuffled_chunks(chunks(20), numbers, FORM, 2, device)
        taken = [next(rows).cpu().flatten().tolist() for _ in range(n_taken)]
        assert taken == [[2 * i + 1, 2 * i + 1, 2 * i, 2 * i] for i in range(n_taken)]
        rows.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_fails_in_a_thread_is_raised(device: torch.device, a_gpu: torch.device) -> None:
    def read(rows: Tensor, windows: Tensor) -> None:
        if windows[0] == 4:
            raise OSError("the third")
        numbers(rows, windows)

    rows = shuffled_chunks(chunks(20), read, FORM, 2, device)
    next(rows), next(rows)
    with pytest.raises(OSError, match="the third"):
        next(rows)


def test_a_signal_between_two_chunks_ends_the_loader(
    a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the thread has begun with the next chunk, and the place of this one is not free yet."""
    n_chunks = iter(range(9))

    def take() -> None:
        with PretendGPU(), pytest.raises(KeyboardInterrupt):
            list(shuffled_chunks(chunks(20), numbers, FORM, 2, a_gpu))

    class Interrupted(ThreadPoolExecutor):
        def submit(self, *given: Any) -> Any:
            coming = super().submit(*given)
            if threading.current_thread() is taker and next(n_chunks) == 2:
                raise KeyboardInterrupt
            return coming

    monkeypatch.setattr(loader, "ThreadPoolExecutor", Interrupted)
    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    taker.join(10)
    assert not taker.is_alive() and next(n_chunks) == 3
