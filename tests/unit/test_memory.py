"""Out of memory: less at once, the same result; and an error only when one item is too many."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from short_training import make_sae, train
from synthetic import SparseDirections, random_sae
from tiny_model import WIDTH
from torch import Tensor

from sae_core.activations.shards import harvest
from sae_core.activations.store import StreamingSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.evaluation.metrics import evaluate
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae import largest_entries
from sae_core.sae.kinds import KINDS
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction
from sae_core.train_config import EndToEndConfig
from sae_core.trainer.end_to_end import EndToEnd
from sae_core.utils.errors import SAEError
from sae_core.utils.memory import Microbatch

HOOK = Hook(1, "hook_resid_post")


@contextmanager
def memory_for(model: LanguageModel, most: int, graph: bool = False) -> Iterator[None]:
    """The model's last block runs out of memory with more than `most` windows; with `graph`, only
    where gradients are wanted."""

    def forward(_: Any, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > most and (args[0].requires_grad or not graph):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    layer = 0 if not graph else model.n_layers - 1
    block = model.model.get_submodule("model.layers")[layer]
    handle = block.register_forward_pre_hook(forward)
    try:
        yield
    finally:
        handle.remove()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_harvest(
    language_model: LanguageModel,
    windows: TokenWindows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hooks, seen = [HOOK, Hook(3, "hook_mlp_out")], []
    with memory_for(language_model, 2):
        harvest(
            language_model,
            windows,
            hooks,
            tmp_path / "little",
            batch_size=8,
            progress=lambda done, total: seen.append((done, total)),
        )
    harvest(language_model, windows, hooks, tmp_path / "two", batch_size=2)
    assert files(tmp_path / "little") == files(tmp_path / "two")
    n_windows = windows.n_train + windows.n_validation
    assert seen[-1] == (n_windows, n_windows)
    assert capsys.readouterr().out.splitlines() == [
        "out of memory: continuing with 4 windows per forward pass",
        "out of memory: continuing with 2 windows per forward pass",
    ]


def test_a_cpu_takes_fewer_windows_than_make_up_a_pass(
    language_model: LanguageModel, windows: TokenWindows
) -> None:
    tokens = windows.train(0, torch.arange(2))
    assert language_model.windows_at_once(windows.length, 1) > 2
    whole = language_model.activations(tokens, [HOOK])[HOOK]
    with memory_for(language_model, 2):
        torch.testing.assert_close(language_model.activations(tokens, [HOOK])[HOOK], whole)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_streaming(language_model: LanguageModel, windows: TokenWindows) -> None:
    def source(batch_size: int) -> StreamingSource:
        options = {"batch_size": batch_size, "tokens_per_step": 64, "seed": 0}
        return StreamingSource(language_model, windows, HOOK, **options)

    with memory_for(language_model, 3):
        found = list(source(12).train_batches(0))
    assert torch.equal(torch.cat(found), torch.cat(list(source(3).train_batches(0))))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_evaluation(language_model: LanguageModel, windows: TokenWindows) -> None:
    sae = random_sae(d_in=WIDTH, dtype=torch.float32)
    held_out = windows.evaluation()[:7]
    with memory_for(language_model, 2):
        found = evaluate(language_model, sae, held_out, 4)
    assert found == evaluate(language_model, sae, held_out, 2)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("graph", [False, True])
def test_end_to_end_losses(
    graph: bool, language_model: LanguageModel, windows: TokenWindows
) -> None:
    config = EndToEndConfig(use_block_mse=True)
    tokens = windows.train(0, torch.arange(6))

    def loss(batch_size: int) -> tuple[float, Tensor]:
        losses = EndToEnd(language_model, windows, HOOK, config, batch_size)
        passes = losses.clean(tokens, max_norm=float("inf"))
        x = torch.cat([part.x[part.kept] for part in passes])
        x_hat = (0.9 * x).requires_grad_()
        value, figures = losses.loss(passes, x_hat)
        value.backward()
        assert figures["logit_kl"] > 0
        return float(value.detach()), x_hat.grad

    whole = loss(6)
    with memory_for(language_model, 2, graph):
        value, gradient = loss(6)
    assert value == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(gradient, whole[1])
    if not graph:
        assert torch.equal(gradient, loss(1)[1]) or torch.equal(gradient, loss(3)[1])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which can be fewer rows than a batch of these tests has."""
    monkeypatch.setattr(largest_entries, "TILE_ROWS", 16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_training_step(kind: str) -> None:
    class Small(KINDS[kind]):  # type: ignore[misc, name-defined]
        """Has memory for 64 rows of the encoder product."""

        def reconstruct(
            self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
        ) -> Reconstruction:
            made = super().reconstruct(x, target, compute)
            if compute.row_block is None or compute.row_block > 64:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return made

    def sae(cls: type | None = None) -> Any:
        made = make_sae(kind, cls, n_dead=30, aux_penalty=0.5)
        made.spec.n_batches_to_dead = 3
        return made

    found, expected = train(sae(Small)), train(sae(), row_block=64)
    assert found.history == expected.history
    tensors = expected.state().tensors
    assert all(torch.equal(tensor, tensors[n]) for n, tensor in found.state().tensors.items())


@pytest.mark.usefixtures("small_tiles")
def test_a_step_is_tried_again_only_with_blocks_that_are_smaller(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A block is a tile at least; what a step needs besides does not depend on it."""
    tried = []

    class Large(KINDS["jumprelu"]):  # type: ignore[misc]
        """Has no memory for its pairs."""

        def reconstruct(
            self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
        ) -> Reconstruction:
            tried.append(compute.row_block)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SAEError, match="product, 16: use fewer --tokens-per-step, a smaller"):
        train(make_sae("jumprelu", Large), row_block=100)
    assert tried == [100, 48, 24, 16]  # 100 rows are six tiles
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_one_window_that_does_not_fit(
    language_model: LanguageModel, windows: TokenWindows, tmp_path: Path
) -> None:
    with memory_for(language_model, 0), pytest.raises(SAEError) as error:
        harvest(language_model, windows, [HOOK], tmp_path / "shard", batch_size=4)
    message = str(error.value)
    assert "out of memory with the fewest windows per forward pass, 1: " in message
    assert "--max-text-length" in message and "Tried to allocate 2.00 GiB" in message


def test_units_that_are_larger_than_the_work() -> None:
    microbatch, tried = Microbatch(1000, "items", "give up"), []

    def work(part: slice) -> int:
        tried.append(part.stop - part.start)
        if tried[-1] > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return part.start

    assert list(microbatch.parts(5, work)) == [0, 1, 2, 3, 4]
    assert tried == [5, 2, 1, 1, 1, 1, 1]


def test_little_work_does_not_make_a_unit_smaller() -> None:
    microbatch = Microbatch(4, "items", "give up")
    assert [list(microbatch.parts(n, lambda at: at.stop - at.start)) for n in (1, 3, 9)] == [
        [1],
        [3],
        [4, 4, 1],
    ]


def test_other_errors_are_not_taken_for_it() -> None:
    def work(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        Microbatch(4, "items", "give up").retry(work)


@pytest.mark.usefixtures("small_tiles")
def test_rows_are_not_lost_when_a_training_ran_out_of_memory_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What stands in the message is said once, and holds for the rest of the training."""

    class Once(KINDS["batch_topk"]):  # type: ignore[misc]
        failed = False

        def reconstruct(
            self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
        ) -> Reconstruction:
            if not self.failed:
                type(self).failed = True
                raise torch.OutOfMemoryError("CUDA out of memory.")
            assert compute.row_block == 128
            return super().reconstruct(x, target, compute)

    train(make_sae(cls=Once), source=SparseDirections(), num_epochs=1)
    assert capsys.readouterr().out.splitlines() == [
        "out of memory: continuing with 128 rows of the encoder product"
    ]
