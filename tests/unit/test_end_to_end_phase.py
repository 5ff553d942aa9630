"""The end-to-end phase of a training: when it begins, what it records, what stays the same."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from short_training import Recorder
from synthetic import KINDS, spec
from tiny_model import WIDTH
from torch import Tensor

from sae_core.activations.shards import harvest
from sae_core.activations.store import CachedSource, StreamingSource
from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.pretrained import Origin
from sae_core.sae.kinds import build
from sae_core.train_config import DataConfig, EndToEndConfig, TrainingConfig
from sae_core.trainer.ahead import Stepping
from sae_core.trainer.batches import Batch
from sae_core.trainer.end_to_end import EndToEnd
from sae_core.trainer.resume import SavedStates
from sae_core.training import Observer, Trainer
from sae_core.utils.seeding import generator

HOOK = Hook(1, "hook_resid_post")
STEP = 100
KL = ("logit_kl", "kl_contribution")
MSE = ("total_post_layer_mse", "block_mse_contribution", "2_mse", "3_mse")


class Setting:
    """A tiny model and its windows, to train short on."""

    def __init__(self, model: LanguageModel, windows: TokenWindows) -> None:
        self.model, self.windows = model, windows

    def stream(self, **changes: Any) -> StreamingSource:
        options = {"batch_size": 4, "tokens_per_step": STEP, "seed": 5, **changes}
        return StreamingSource(self.model, self.windows, HOOK, **options)

    def phase(self, batch_size: int = 4, **config: Any) -> EndToEnd:
        return EndToEnd(self.model, self.windows, HOOK, EndToEndConfig(**config), batch_size)

    def trainer(
        self,
        phase: EndToEnd | None,
        source: Any = None,
        kind: str = "batch_topk",
        observer: Observer | None = None,
        origin: Origin | None = None,
        stepping: Stepping = "auto",
        **config: Any,
    ) -> Trainer:
        wanted = spec(kind, d_in=WIDTH, d_sae=2 * WIDTH, l1_coefficient=0.01)
        if wanted.matryoshka_sizes:
            wanted.matryoshka_sizes = [WIDTH, 2 * WIDTH]
        sae = build(wanted)
        sae.initialise(generator(0, "weights"))
        settings = TrainingConfig(
            **{"num_epochs": 4, "lr": 0.01, "early_stopping_patience": 0, **config}
        )
        source = source or self.stream()
        observer = observer or Observer()
        return Trainer(
            sae, source, settings, observer, end_to_end=phase, stepping=stepping, origin=origin
        )

    def train(self, *args: Any, **options: Any) -> Trainer:
        trainer = self.trainer(*args, **options)
        for _ in trainer.train():
            pass
        return trainer


@pytest.fixture(scope="module")
def setting(language_model: LanguageModel, texts: list[str]) -> Setting:
    """Half a dozen texts: an epoch has a dozen steps."""
    data = DataConfig(max_text_length=24, val_fraction=0.25, seed=5)
    return Setting(language_model, read_windows(language_model.tokenizer, texts[:6], data))


def is_there(column: list[float | None]) -> list[bool]:
    return [value is not None for value in column]


# When


@pytest.mark.parametrize(
    ("fraction", "epochs"),
    [(0.01, [4]), (0.25, [4]), (0.4, [3, 4]), (0.75, [2, 3, 4]), (1.0, [1, 2, 3, 4])],
)
def test_phase_is_the_last_share_of_the_steps(
    fraction: float, epochs: list[int], setting: Setting
) -> None:
    phase, with_terms = setting.phase(end_to_end_fraction=fraction), 0
    loss = phase.loss

    def counted(passes: Any, x_hat: Tensor, *batch: int) -> Any:
        nonlocal with_terms
        with_terms += x_hat.requires_grad
        return loss(passes, x_hat, *batch)

    phase.loss = counted  # type: ignore[method-assign]
    recorder = Recorder()
    trainer = setting.train(phase, observer=recorder)
    per_epoch = trainer.source.steps_per_epoch
    assert with_terms == max(1, round(fraction * 4 * per_epoch))
    steps = [event[1:3] for event in recorder.events if event[0] == "step"]
    assert steps == [(e, s) for e in range(1, 5) for s in range(1, per_epoch + 1)]
    for name in KL:
        for part in ("", "val_"):
            column = trainer.history[part + name]
            assert is_there(column) == [epoch in epochs for epoch in range(1, 5)]
    assert all(is_there(trainer.history["loss"])) and all(is_there(trainer.history["val_loss"]))
    assert {len(column) for column in trainer.history.values()} == {4}


def test_steps_of_fixed_sizes_keep_no_memory_in_the_phase(setting: Setting) -> None:
    trainer = setting.trainer(setting.phase(end_to_end_fraction=0.25), stepping="static")
    ahead, has_step = trainer.ahead, []
    assert ahead is not None
    for _ in trainer.train():
        has_step.append((ahead.step is not None, ahead.run is not None))
    assert has_step == [(True, True)] * 3 + [(False, False)]


def test_without_a_phase_nothing_of_it_is_recorded(setting: Setting) -> None:
    assert not [name for name in setting.train(None).history if "kl" in name or "mse" in name]


def test_steps_before_the_phase_are_those_of_a_local_training(setting: Setting) -> None:
    local, tail = setting.train(None), setting.train(setting.phase(end_to_end_fraction=0.25))
    for name, column in local.history.items():
        if not name.startswith(("dead", "tokens")):
            assert tail.history[name][:3] == column[:3]
    assert tail.history["recon_loss"][3] != local.history["recon_loss"][3]


def test_phase_takes_windows_that_the_epoch_has_not_read(setting: Setting) -> None:
    """An epoch that is half local reads each window once."""
    phase, source = setting.phase(end_to_end_fraction=0.5), setting.stream()
    read: list[int] = []
    order = source._order(0).tolist()

    class Watched(TokenWindows):
        def train(self, pass_index: int, indices: Tensor) -> Tensor:
            read.extend(indices.tolist())
            return super().train(pass_index, indices)

    watched = Watched.__new__(Watched)
    watched.__dict__.update(setting.windows.__dict__)
    phase.windows = source.windows = watched
    setting.train(phase, source=source, num_epochs=1)
    assert read == order[: len(read)] and len(read) > len(order) - 2 * STEP / source.positions


# What


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_loss_is_the_sum_of_its_contributions(fraction: float, kind: str, setting: Setting) -> None:
    phase = setting.phase(use_block_mse=True, end_to_end_fraction=fraction)
    history = setting.train(phase, kind=kind, num_epochs=2).history
    for part in ("", "val_"):
        rows = {name: history[part + name][-1] for name in (*KL, *MSE)}
        others = ("recon_contribution", "l1_contribution")
        parts = sum(history[part + name][-1] for name in others)
        parts += history[f"{part}kind_loss"][-1]
        if not part:  # what validates leaves it out
            parts += 0.03125 * history["aux_loss"][-1]
        parts += rows["kl_contribution"] + rows["block_mse_contribution"]
        assert history[f"{part}loss"][-1] == pytest.approx(parts, rel=1e-5)
        assert rows["total_post_layer_mse"] == pytest.approx(rows["2_mse"] + rows["3_mse"])
        if fraction == 1:
            assert rows["kl_contribution"] == pytest.approx(1e-2 * rows["logit_kl"])
            assert rows["block_mse_contribution"] == pytest.approx(
                1e-3 * rows["total_post_layer_mse"]
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("term", "name"), [("use_logit_kl", "logit_kl"), ("use_block_mse", MSE[0])]
)
def test_end_to_end_losses_fall(term: str, name: str, setting: Setting) -> None:
    """Nothing else is minimised."""
    used = {"use_logit_kl": False, "use_block_mse": False, term: True}
    weights = {"logit_kl_weight": 1.0, "block_mse_weight": 1.0}
    phase = setting.phase(end_to_end_fraction=1.0, **used, **weights)
    history = setting.train(phase, recon_weight=0.0, num_epochs=8).history
    assert history[name][-1] < 0.7 * history[name][0]
    assert history[f"val_{name}"][-1] < history[f"val_{name}"][0]


def test_phase_lowers_the_kl_of_a_local_training(setting: Setting) -> None:
    """Judged by the same phase, whose weight in one case is 0."""
    kl = [
        setting.train(setting.phase(logit_kl_weight=weight, end_to_end_fraction=0.25)).history
        for weight in (0.0, 1e-2)
    ]
    assert kl[1]["val_logit_kl"][-1] < 0.9 * kl[0]["val_logit_kl"][-1]


def test_a_phase_of_every_step_lowers_the_kl_of_the_sae_that_it_begins_with(
    setting: Setting, tmp_path: Path
) -> None:
    """As in arXiv 2503.17272; the terms pull as hard as the reconstruction from the first step."""
    local = setting.train(None, num_epochs=8)
    normalise = local.normalise
    sae = local.sae.folded(normalise.mean, normalise.scale, torch.float32)
    origin = Origin(sae, "local", {})
    phases = [
        setting.phase(end_to_end_fraction=1.0, logit_kl_weight=weight) for weight in (0.0, 1e-2)
    ]
    tuned = [setting.train(phase, num_epochs=2, lr=1e-3, origin=origin).history for phase in phases]
    assert tuned[1]["val_logit_kl"][-1] < 0.95 * tuned[0]["val_logit_kl"][-1]
    assert phases[1].weights["logit_kl"] != EndToEndConfig.logit_kl_weight


def test_model_stays_as_it_is(setting: Setting) -> None:
    before = {n: p.clone() for n, p in setting.model.model.named_parameters()}
    setting.train(setting.phase(end_to_end_fraction=1.0), num_epochs=1)
    for name, parameter in setting.model.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_phase_begins_with_terms_that_pull_as_hard_as_the_reconstruction(setting: Setting) -> None:
    phase, pulls = setting.phase(end_to_end_fraction=0.25), []
    loss = phase.loss

    def watched(passes: Any, x_hat: Tensor, *batch: int) -> Any:
        value, figures = loss(passes, x_hat, *batch)
        if x_hat.requires_grad:
            [gradient] = torch.autograd.grad(value, x_hat, retain_graph=True)
            x = torch.cat([part.x[part.kept] for part in passes])
            scale = trainer.normalise.scale
            local = 2 * (x_hat - x).detach() / (len(x) * scale**2)  # of ||x - x_hat||^2 / scale^2
            pulls.append((float(gradient.norm()), float(local.norm())))
        return value, figures

    phase.loss = watched  # type: ignore[method-assign]
    trainer = setting.trainer(phase)
    for _ in trainer.train():
        pass
    assert pulls[0][0] == pytest.approx(pulls[0][1], rel=1e-3)


def test_one_window_in_three_is_spliced_and_all_train(setting: Setting) -> None:
    every, third = (
        setting.trainer(setting.phase(end_to_end_fraction=1.0, end_to_end_stride=stride)).batches
        for stride in (1, 3)
    )
    for whole, batch in zip(every.train(0, 0), third.train(0, 0), strict=True):
        assert isinstance(whole, Batch) and whole.passes and whole.spliced is None
        assert isinstance(batch, Batch) and batch.passes and batch.spliced is not None
        torch.testing.assert_close(batch.x, whole.x)
        windows = torch.cat([part.tokens for part in whole.passes])
        assert torch.equal(torch.cat([part.tokens for part in batch.passes]), windows[::3])
        x = torch.cat([part.x[part.kept] for part in batch.passes])
        torch.testing.assert_close(batch.of_spliced(batch.x), third.normalise.scaled(x.float()))


def test_outliers_are_left_out_and_counted(setting: Setting, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "sae_core.sae.normalisation.OUTLIER_FACTOR", 1.05
    )  # about a third of the tokens
    phase = setting.phase(end_to_end_fraction=1.0)
    trainer = setting.train(phase, num_epochs=1)
    assert (
        0.1
        < trainer.progress.outliers / (trainer.progress.outliers + trainer.progress.tokens)
        < 0.6
    )
    assert math.isfinite(trainer.history["val_logit_kl"][0])


# What does not matter


@pytest.mark.usefixtures("as_on_a_gpu")
def test_batch_size_changes_nothing(setting: Setting) -> None:
    options = {"use_block_mse": True, "end_to_end_fraction": 0.5}
    histories = [
        setting.train(setting.phase(size, **options), num_epochs=2).history for size in (1, 3, 100)
    ]
    for other in histories[1:]:
        for name, column in histories[0].items():
            if not name.startswith("dead"):
                assert other[name][-1] == pytest.approx(column[-1], rel=1e-3), name


@pytest.mark.parametrize(("passes", "stride"), [(1, 2), (4, 1)])
def test_cached_and_streaming_give_the_same(
    passes: int, stride: int, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest(setting.model, setting.windows, [HOOK], tmp_path, batch_size=4, passes=passes)
    cached = CachedSource([tmp_path], HOOK, tokens_per_step=STEP, seed=5)
    stream = setting.stream()
    monkeypatch.setattr(type(stream), "pass_of", lambda _, epoch: epoch % passes)
    options = {
        "use_block_mse": True,
        "end_to_end_fraction": 0.4,
        "end_to_end_stride": stride,
    }
    one, other = (setting.train(setting.phase(**options), source=s) for s in (cached, stream))
    for name, column in one.history.items():
        assert is_there(other.history[name]) == is_there(column)
        if not name.startswith("dead"):
            assert other.history[name][-2:] == pytest.approx(column[-2:], rel=1e-3), name


def test_no_validation_windows(setting: Setting) -> None:
    source = setting.stream()
    source.n_validation = 0
    history = setting.train(setting.phase(), source=source).history
    assert is_there(history["logit_kl"]) == [False, False, False, True]
    assert not any(name.startswith("val_") for name in history)


@pytest.mark.parametrize(
    "tokens_per_step", [pytest.param(5, marks=pytest.mark.slow), 23, 60, 10**6]
)
def test_any_step_size(tokens_per_step: int, setting: Setting) -> None:
    source = setting.stream(tokens_per_step=tokens_per_step)
    trainer = setting.train(setting.phase(end_to_end_fraction=0.5), source=source, num_epochs=1)
    assert math.isfinite(trainer.history["logit_kl"][0])


# Early stopping


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("spoilt", [1, None])
def test_a_validation_loss_that_is_not_finite(
    spoilt: int | None, value: float, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first batch, or of all, in each epoch but the second."""
    phase = setting.phase(end_to_end_fraction=1.0)
    trainer = setting.trainer(phase, num_epochs=3)
    loss, validate, number = phase.loss, trainer.validate, 0

    def count() -> Any:
        nonlocal number
        number = 0
        return validate()

    def spoil(passes: Any, x_hat: Tensor, *batch: int) -> Any:
        nonlocal number
        total, figures = loss(passes, x_hat, *batch)
        number += 1
        if (
            not x_hat.requires_grad
            and trainer.progress.epoch != 2
            and (spoilt is None or number <= spoilt)
        ):
            total, figures = total * value, figures | {"logit_kl": figures["logit_kl"] * value}
        return total, figures

    monkeypatch.setattr(phase, "loss", spoil)
    monkeypatch.setattr(trainer, "validate", count)
    n_batches = len(list(trainer.source.validation_windows()))
    assert n_batches > 1
    list(trainer.train())
    skipped = spoilt or n_batches
    assert trainer.history["val_skipped_batches"] == [skipped, 0, skipped]
    losses = trainer.history["val_loss"]
    assert is_there(losses) == [True] * 3 if spoilt else [False, True, False]
    assert all(math.isfinite(found) for found in losses if found is not None)
    if not spoilt:
        assert trainer.progress.stopping.best_epoch == 2


def best_epochs(trainer: Trainer) -> Iterator[tuple[int, bool]]:
    for record in trainer.train():
        yield record.epoch, record.improved


def test_best_epoch_is_chosen_anew_in_the_phase(setting: Setting) -> None:
    """No epoch is better than the first by 100; that the loss has gained a term does not matter."""
    phase = setting.phase(end_to_end_fraction=0.5)
    trainer = setting.trainer(phase, num_epochs=6, early_stopping_min_delta=100.0)
    assert [epoch for epoch, improved in best_epochs(trainer) if improved] == [1, 4]
    assert trainer.progress.stopping.best_epoch == 4


def test_patience_that_runs_out_leads_to_the_phase(setting: Setting) -> None:
    phase, recorder = setting.phase(end_to_end_fraction=0.4), Recorder()
    trainer = setting.trainer(
        phase,
        observer=recorder,
        num_epochs=10,
        early_stopping_min_delta=100.0,
        early_stopping_patience=2,
    )
    assert list(best_epochs(trainer)) == [
        (1, True), (2, False), (3, False), (7, True), (8, False), (9, False)
    ]  # fmt: skip
    assert trainer.history["epoch"] == [1, 2, 3, 7, 8, 9]
    assert is_there(trainer.history["logit_kl"]) == [False] * 3 + [True] * 3
    assert recorder.events[-1] == ("end", 6, True)


def test_patience_that_runs_out_within_the_phases_first_epoch(setting: Setting) -> None:
    """The phase begins in the middle of an epoch, whose local steps are passed over."""
    phase, recorder = setting.phase(end_to_end_fraction=0.3), Recorder()
    trainer = setting.trainer(
        phase,
        observer=recorder,
        num_epochs=5,
        early_stopping_min_delta=100.0,
        early_stopping_patience=2,
    )
    assert [epoch for epoch, _ in best_epochs(trainer)] == [1, 2, 3, 4, 5]
    per_epoch = trainer.source.steps_per_epoch
    first = trainer.batches.n_local_steps - 3 * per_epoch
    assert 0 < first < per_epoch
    seen = [event[2] for event in recorder.events if event[:2] == ("step", 4)]
    assert seen == list(range(first + 1, per_epoch + 1))


# Interrupted


class StopsAt(Recorder):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


@pytest.mark.parametrize(("beyond", "stride"), [(-1, 1), (1, 3), (2, 1)])
def test_an_interrupted_phase_goes_on_as_if_nothing_had_been(
    beyond: int, stride: int, setting: Setting, tmp_path: Path
) -> None:
    """From the step before the phase, and from its first two, which have been balanced."""

    def trainer(observer: Observer | None = None) -> Trainer:
        phase = setting.phase(end_to_end_fraction=0.4, use_block_mse=True, end_to_end_stride=stride)
        return setting.trainer(phase, observer=observer, num_epochs=2)

    whole = trainer()
    list(whole.train())
    interrupted = trainer(StopsAt(whole.batches.n_local_steps + beyond))
    with pytest.raises(InterruptedError):
        list(interrupted.train())
    states = SavedStates(tmp_path, {})
    states.save(interrupted.state())
    resumed, state = trainer(), states.newest()
    assert state is not None
    resumed.restore(state)
    list(resumed.train())
    assert resumed.history == whole.history
    tensors = whole.state().tensors
    assert all(torch.equal(t, tensors[name]) for name, t in resumed.state().tensors.items())


def test_the_model_is_loaded_when_the_phase_begins(setting: Setting) -> None:
    """And not before; the training is the same."""
    loaded: list[int] = []

    def load() -> LanguageModel:
        loaded.append(lazy.progress.n_done)
        return setting.model

    config = EndToEndConfig(end_to_end_fraction=0.5)
    lazy = setting.trainer(EndToEnd(load, setting.windows, HOOK, config, 4))
    for _ in lazy.train():
        pass
    eager = setting.train(setting.phase(end_to_end_fraction=0.5))
    assert lazy.history == eager.history
    assert loaded == [lazy.batches.n_local_steps] and loaded[0] > 0
