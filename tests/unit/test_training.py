"""The loop on activations whose directions are known: what it minimises, records and tells."""

import math

import pytest
import torch
from short_training import FEATURES, D, K, Recorder, make_sae, train
from synthetic import BATCH_KINDS, DENSE_KINDS, KINDS, SparseDirections, normal
from torch import Tensor

from sae_core.sae import losses
from sae_core.sae.kinds.batch_topk import BatchTopKSAE
from sae_core.sae.reconstruction import PLAIN, AuxiliaryLoss, Compute, Reconstruction
from sae_core.sae.static.moments import RULES
from sae_core.train_config import TrainingConfig
from sae_core.trainer.optimizer import adam, hand_over_gradients, set_learning_rate
from sae_core.training import Normalisation, Trainer, learning_rate
from sae_core.utils.errors import SAEError

SHARED_KEYS = set(
    "loss recon_loss l1_loss sparsity recon_contribution l1_contribution aux_loss kind_loss".split()
)
KEYS = SHARED_KEYS | {"dead_features", "dead_feature_percentage"}


# The pieces


def test_learning_rate_is_a_trapezium() -> None:
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:80] == [2.0] * 75
    assert rates[80:] == pytest.approx([2.0 * (100 - s) / 20 for s in range(80, 100)])
    assert learning_rate(0, 1, 2.0) == 2.0  # a training of one step
    falls = [learning_rate(step, 100, 2.0, decay=0.9) for step in range(100)]
    assert falls[:5] == rates[:5]
    assert falls[10:] == pytest.approx([2.0 * (100 - s) / 90 for s in range(10, 100)])
    assert all(0 < learning_rate(s, n, 1.0) <= 1 for n in range(1, 12) for s in range(n))


def test_normalisation_leaves_outliers_out() -> None:
    x = 5 + 3 * normal(1000, D, dtype=torch.float32)
    sinks = torch.full((4, D), 1000.0)
    found = Normalisation.measure(torch.cat([sinks, x]))
    torch.testing.assert_close(found.mean, x.mean(0))
    assert found.scale == pytest.approx(float((x - x.mean(0)).pow(2).sum(1).mean().sqrt()))
    assert found.max_norm == pytest.approx(10 * float(x.norm(dim=1).median()), rel=0.02)
    scaled = found(torch.cat([x[:500], sinks, x[500:]]).bfloat16())
    assert scaled.shape == x.shape and scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, (x.bfloat16().float() - x.mean(0)) / found.scale)
    assert float(found(x).pow(2).sum(1).mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_activations_without_a_scale(value: float) -> None:
    with pytest.raises(SAEError, match="activations at this hook have scale (0|nan)"):
        Normalisation.measure(torch.full((10, D), value))


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_records(kind: str) -> None:
    penalty = {"l1_coefficient": 0.1} if kind in DENSE_KINDS else {}
    trainer = train(make_sae(kind, **penalty), num_epochs=12, lr=0.02)
    history = trainer.history
    assert KEYS | {f"val_{key}" for key in SHARED_KEYS} <= set(history)
    assert {len(column) for column in history.values()} == {12}
    assert history["epoch"] == list(range(1, 13))
    assert history["tokens"] == [256 * 8 * epoch for epoch in range(1, 13)]
    for part in ("", "val_"):
        assert history[f"{part}recon_loss"][-1] < 0.5 * history[f"{part}recon_loss"][0]
        assert history[f"{part}recon_loss"][-1] < 0.3  # of activations with E||x||^2 = 1
    if kind in BATCH_KINDS:
        assert history["sparsity"] == [K] * 12
        assert history["val_sparsity"] == pytest.approx([K] * 12, abs=0.01)
    elif kind not in DENSE_KINDS:
        assert history["val_sparsity"][-1] == pytest.approx(K, rel=0.05)
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(FEATURES))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_sum_of_its_contributions(kind: str) -> None:
    sae = make_sae(kind, n_dead=30, l1_coefficient=0.25, aux_penalty=0.5)
    history = train(sae, recon_weight=3.0, num_epochs=2).history
    for part in ("", "val_"):
        column = {key: torch.tensor(history[part + key], dtype=torch.double) for key in SHARED_KEYS}
        close = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(column["recon_contribution"], 3 * column["recon_loss"], **close)
        torch.testing.assert_close(column["l1_contribution"], 0.25 * column["l1_loss"], **close)
        parts = column["recon_contribution"] + column["l1_contribution"] + column["kind_loss"]
        if not part:  # what validates leaves it out
            parts += 0.5 * column["aux_loss"]
        torch.testing.assert_close(column["loss"], parts, **close)
    assert history["aux_loss"][0] > 0.1


def test_sparsity_penalty_makes_a_sparser_code() -> None:
    codes = [
        train(make_sae("standard", l1_coefficient=c), lr=0.01).history["sparsity"][-1]
        for c in (0.0, 0.5, 1.0)
    ]
    assert codes[0] > 1.5 * codes[1] > 1.5**2 * codes[2]


def test_same_seed_same_history() -> None:
    first, again, other = (
        train(source=SparseDirections(seed=s), num_epochs=2).history for s in (0, 0, 1)
    )
    assert first == again
    assert first["loss"] != other["loss"]


class DenseTwin(BatchTopKSAE):
    """The same SAE with dense matrices and PyTorch's own gradients."""

    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        code = self._topk(self.pre_activations(x), len(x) * self.spec.top_k)
        active = code > 0
        return Reconstruction(
            self.decode(code),
            code.sum(1).mean(),
            float(active.sum()) / len(x),
            active.any(0),
            x.new_zeros(()),
        )

    def auxiliary_loss(
        self,
        x: Tensor,
        x_hat: Tensor,
        target: Tensor | None = None,
        compute: Compute = PLAIN,
    ) -> AuxiliaryLoss:
        dead = self.dead_features
        if not dead.any():
            return AuxiliaryLoss(x.new_zeros(()))
        pre = ((x - self.b_dec.detach()) @ self.W_enc + self.b_enc)[:, dead]
        code = self._topk(pre, len(x) * min(self.spec.top_k_aux, int(dead.sum())))
        return AuxiliaryLoss(losses.normalised_residual_loss(x - x_hat, code @ self.W_dec[dead]))

    def _topk(self, pre: Tensor, total: int) -> Tensor:
        code = torch.relu(pre)
        return code * (code >= code.flatten().topk(total).values[-1])


@pytest.mark.parametrize("n_dead", [0, 40])
def test_loss_curve_is_that_of_the_dense_twin(n_dead: int) -> None:
    curves = []
    for cls in (BatchTopKSAE, DenseTwin):
        recorder = Recorder()
        sae = make_sae(cls=cls, n_dead=n_dead, l1_coefficient=0.05, aux_penalty=0.5)
        history = train(sae, observer=recorder, lr=0.01).history
        curves.append([e[3] for e in recorder.events if e[0] == "step"] + history["val_loss"])
    assert len(curves[0]) == 4 * 8 + 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def fallen_silent(aux_penalty: float) -> list[float]:
    """The dead features after each epoch, when 32 of 64 begin too quiet for the top-k."""
    sae = make_sae(n_dead=32, aux_penalty=aux_penalty, top_k_aux=8)
    sae.spec.n_batches_to_dead = 4
    return train(sae, num_epochs=20, lr=0.015).history["dead_features"]


def test_auxiliary_loss_revives_dead_features() -> None:
    left_alone, helped = fallen_silent(0.0), fallen_silent(16.0)
    assert left_alone[0] >= 32 and left_alone[-1] >= 32
    assert helped[0] >= 20 and helped[-1] < left_alone[-1] / 2


def test_row_block_changes_nothing_but_rounding() -> None:
    for kind in KINDS:
        whole, blocks = (train(make_sae(kind), row_block=rows).history for rows in (None, 37))
        assert all(blocks[key] == pytest.approx(whole[key], rel=1e-4) for key in whole)


def test_row_block_does_not_change_validation_with_dead_features() -> None:
    histories = []
    for rows in (None, 37):
        sae = make_sae(n_dead=30, aux_penalty=1e-6)
        histories.append(train(sae, row_block=rows, num_epochs=1).history)
    assert histories[0]["aux_loss"] == pytest.approx(histories[1]["aux_loss"], rel=1e-4)
    assert histories[0]["val_aux_loss"] == pytest.approx(histories[1]["val_aux_loss"], rel=1e-4)


def test_outliers_are_left_out_and_counted() -> None:
    source = SparseDirections()
    clean = train(source=source, num_epochs=1)
    source.activations[::4, 3] *= 1000  # one position of 16 training and 2 validation windows
    trainer = train(source=source, num_epochs=1)
    assert trainer.progress.outliers == 16 and trainer.progress.tokens == clean.progress.tokens - 16
    assert trainer.normalise.scale == pytest.approx(clean.normalise.scale, rel=0.01)
    assert trainer.history["val_loss"] == pytest.approx(clean.history["val_loss"], rel=0.1)


def test_active_adam_against_a_dense_twin() -> None:
    """Three steps by the formulas; features 0, 3, 6 ... have a gradient in the first alone."""
    sae, rate, n_steps = make_sae(), 0.01, 3
    optimizer = adam(sae, rate, RULES["active_adam"])
    wanted = {name: tensor.detach().double().clone() for name, tensor in sae.named_parameters()}
    m, v = ({name: torch.zeros_like(t) for name, t in wanted.items()} for _ in range(2))
    still = torch.arange(FEATURES) % 3 == 0
    for step in range(1, n_steps + 1):
        for seed, (name, parameter) in enumerate(sae.named_parameters()):
            gradient = normal(*parameter.shape, seed=10 * step + seed).float()
            rows = gradient.T if name == "W_enc" else gradient
            if step > 1 and name != "b_dec":
                rows[still] = 0
            parameter.grad = gradient.T.contiguous().T if name == "W_enc" else gradient
            m[name] = 0.9 * m[name] + 0.1 * gradient.double()
            v[name] = 0.98 * v[name] + 0.02 * gradient.double() ** 2
            moved = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.98**step)).sqrt() + 1e-8)
            if name == "W_dec":
                moved = 14 * m[name] / m[name].norm(dim=1, keepdim=True)
            moves = gradient != 0  # no other entry is exactly zero
            wanted[name] = torch.where(moves, wanted[name] - rate * moved, wanted[name])
        hand_over_gradients(sae, optimizer)
        set_learning_rate(optimizer, rate)
        optimizer.step()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("kind", "travel", "slow"),
    [
        *((kind, 1.0, {}) for kind in KINDS if kind != "jumprelu"),
        ("jumprelu", math.inf, {"threshold": 0.05, "b_enc": 0.1}),
        ("jumprelu", 2.0, {"threshold": 0.05, "b_enc": 0.1}),
        ("jumprelu", 0.2, {"threshold": 0.3, "b_enc": 0.6}),
        ("jumprelu", 0.01, {}),
    ],
)
def test_learning_rates_of_the_parameters(kind: str, travel: float, slow: dict[str, float]) -> None:
    """Adam's first step moves every number by the learning rate of its parameter."""
    sae, rate = make_sae(kind), 0.01
    optimizer = adam(sae, rate, travel=travel)
    before = {name: tensor.detach().clone() for name, tensor in sae.named_parameters()}
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    hand_over_gradients(sae, optimizer)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    scales = {"W_dec": 2.0, **slow}
    for name, parameter in sae.named_parameters():
        moved = torch.full_like(parameter, rate * scales.get(name, 1.0))
        torch.testing.assert_close(before[name] - parameter, moved, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_with_active_adam(kind: str) -> None:
    penalty = 0.1 if kind in DENSE_KINDS else 0.0
    history = train(
        make_sae(kind, l1_coefficient=penalty), lr=0.01, optimizer="active_adam", lr_decay=0.9
    ).history
    assert history["val_recon_loss"][-1] < 0.8 * history["val_recon_loss"][0]


def test_what_the_optimizer_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of bounded length, across the decoder's rows; the trapezium's learning rates."""
    sae, rates, step = make_sae(), [], torch.optim.Adam.step

    def checked(optimizer: torch.optim.Adam) -> None:
        assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-6 < sae.W_dec.grad.norm()
        assert sum(float(p.grad.pow(2).sum()) for p in sae.parameters()) < 1 + 1e-5
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr("torch.optim.Adam.step", checked)
    train(sae, num_epochs=2, lr=0.02, recon_weight=100.0)
    assert rates == [learning_rate(s, 16, 0.02) for s in range(16)]


@pytest.mark.parametrize(
    ("lr", "decay", "travelled"),
    [(0.02, 0.2, 0.06), (0.01, 0.9, 0.06), (1e-3, 0.2, None), (0.5, 0.2, None)],
)
def test_thresholds_can_move_so_far(
    lr: float, decay: float, travelled: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all steps together, unless their rate would be above the encoder's, or far below it."""
    sae, rates, step = make_sae("jumprelu"), [], torch.optim.Adam.step

    def recorded(optimizer: torch.optim.Adam) -> None:
        at = {g["params"][0].data_ptr(): g["lr"] for g in optimizer.param_groups}
        rates.append((at[sae.W_enc.data_ptr()], at[sae.threshold.data_ptr()]))
        step(optimizer)

    monkeypatch.setattr("torch.optim.Adam.step", recorded)
    train(sae, num_epochs=2, lr=lr, lr_decay=decay)
    encoder, threshold = map(sum, zip(*rates, strict=True))
    expected = travelled or (encoder if lr < 0.01 else 0.05 * encoder)
    assert len(rates) == 16 and threshold == pytest.approx(expected)


def test_validation_batch_of_nothing_but_outliers() -> None:
    source = SparseDirections(n_validation=3, tokens_per_step=32)  # a window is a batch
    source.activations[-1] *= 1000
    history = train(source=source, num_epochs=1).history
    assert math.isfinite(history["val_loss"][0]) and history["val_sparsity"][0] > 0


# Events, stopping, faults


def test_observers_see_events_in_order() -> None:
    recorder = Recorder()
    trainer = train(observer=recorder, num_epochs=2)
    steps = trainer.source.steps_per_epoch
    names = [event[0] for event in recorder.events]
    assert names == ["start", *(["step"] * steps + ["epoch"]) * 2, "end"]
    assert recorder.events[0] == ("start", 2, steps) and recorder.events[-1] == ("end", 2, False)
    assert [e[1:3] for e in recorder.events if e[0] == "step"] == [
        (epoch, step) for epoch in (1, 2) for step in range(1, steps + 1)
    ]
    for epoch in (1, 2):
        seen = [e[3] for e in recorder.events if e[:2] == ("step", epoch)]
        assert trainer.history["loss"][epoch - 1] == pytest.approx(sum(seen) / steps, rel=1e-6)


@pytest.mark.parametrize(
    ("patience", "min_delta", "n_validation", "epochs"),
    [(2, 100.0, 8, 3), (1, 100.0, 8, 2), (0, 100.0, 8, 6), (2, 100.0, 0, 6), (1, 0.0, 8, 6)],
)
def test_early_stopping(patience: int, min_delta: float, n_validation: int, epochs: int) -> None:
    """No epoch after the first is better by 100, and every one is better by a little."""
    recorder = Recorder()
    config = TrainingConfig(
        num_epochs=6, early_stopping_patience=patience, early_stopping_min_delta=min_delta
    )
    trainer = Trainer(make_sae(), SparseDirections(n_validation=n_validation), config, recorder)
    improved = [record.improved for record in trainer.train()]
    assert len(improved) == len(trainer.history["loss"]) == epochs
    assert recorder.events[-1] == ("end", epochs, epochs < 6)
    if n_validation and min_delta:
        assert improved == [True] + [False] * (epochs - 1)
    elif n_validation:
        assert all(improved)


def test_no_validation_split() -> None:
    trainer = train(source=SparseDirections(n_validation=0))
    assert not any(key.startswith("val_") for key in trainer.history)
    assert trainer.sae.threshold > 0
    x = trainer.normalise(trainer.source.activations.flatten(0, 1))
    assert float((trainer.sae.encode(x) > 0).sum()) / len(x) == pytest.approx(K, rel=0.1)


def test_the_validation_loss_chooses_the_best_epoch_and_has_no_auxiliary_loss() -> None:
    sae = make_sae(n_dead=32, aux_penalty=16.0, top_k_aux=8)
    sae.num_batches_not_active.zero_()
    sae.spec.n_batches_to_dead = 20  # in the third epoch
    trainer = train(sae, num_epochs=6, early_stopping_patience=2)
    losses, errors, aux = (trainer.history[f"val_{n}"] for n in ("loss", "recon_loss", "aux_loss"))
    assert max(aux[:2]) == 0 and min(aux[2:]) > losses[0] / 16, "the auxiliary loss has begun"
    assert errors == sorted(errors, reverse=True) and losses == sorted(losses, reverse=True)
    assert len(losses) == trainer.progress.stopping.best_epoch == 6
