"""The step of fixed sizes against the ordinary one: the same training, event by event."""

from typing import Any

import pytest
import torch
from short_training import Recorder, make_sae
from synthetic import SparseDirections

from sae_core.sae.precision import Precision
from sae_core.sae_base import Compute, SparseAutoencoder
from sae_core.train_config import TrainingConfig
from sae_core.trainer.ahead import Stepping
from sae_core.training import Trainer

EXACT = Precision(torch.bfloat16, torch.float32)
ROUNDED = Precision(torch.bfloat16, torch.bfloat16)


def trainer(
    stepping: Stepping,
    precision: Precision = EXACT,
    source: SparseDirections | None = None,
    log_freq: int = 3,
    n_dead: int = 0,
    max_skipped: int = 10,
    **changes: Any,
) -> tuple[Trainer, Recorder]:
    """A training of three epochs of eight steps, and a record of what it tells."""
    recorder = Recorder()
    sae = make_sae(n_dead=n_dead, aux_penalty=0.5, **changes)
    settings = TrainingConfig(num_epochs=3, early_stopping_patience=0, lr=0.01)
    compute, source = Compute(precision=precision), source or SparseDirections()
    made = Trainer(sae, source, settings, recorder, compute, None, max_skipped, log_freq, stepping)
    return made, recorder


def run(training: Trainer) -> SparseAutoencoder:
    for _ in training.train():
        pass
    return training.sae


def assert_alike(found: Trainer, right: Trainer, rel: float = 1e-4) -> None:
    assert found.progress.outliers == right.progress.outliers
    assert found.progress.tokens == right.progress.tokens
    assert set(found.history) == set(right.history)
    for name, column in right.history.items():
        assert found.history[name] == pytest.approx(column, rel=rel, abs=1e-5), name
    for name, tensor in right.sae.state_dict().items():
        other = found.sae.state_dict()[name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=rel, msg=name)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a penalty": {"l1_coefficient": 0.05},
    "dead features": {"n_dead": 30},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_training_is_that_of_ordinary_steps(changes: dict[str, Any]) -> None:
    (static, told), (ordinary, expected) = (trainer(s, **changes) for s in ("static", "ordinary"))
    run(static), run(ordinary)
    assert [e[:3] for e in told.events if e[0] != "epoch"] == [
        e[:3] for e in expected.events if e[0] != "epoch"
    ]
    assert_alike(static, ordinary)
