"""The static step on a real GPU: as a graph and operation by operation, and beside its twin."""

from typing import Any

import pytest
import torch

if not torch.cuda.is_available() or torch.version.cuda is None:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from short_training import FEATURES, D, K
from synthetic import SparseDirections, normal, spec

from sae_core.sae.config import SAEConfig, SAEType
from sae_core.sae.kinds import build
from sae_core.sae.normalisation import Normalisation
from sae_core.sae.precision import Precision
from sae_core.sae.reconstruction import Compute
from sae_core.sae.static.backend import TWIN, kernels
from sae_core.train_config import OptimizerName, TrainingConfig
from sae_core.trainer.ahead import Stepping
from sae_core.trainer.events import Observer
from sae_core.trainer.optimizer import adam
from sae_core.trainer.static_step import StaticStep
from sae_core.training import Trainer
from sae_core.utils.seeding import generator
from sae_core.workflow.gpu_step import step_bytes

GPU = torch.device("cuda")
PRECISIONS = [
    Precision(torch.bfloat16, torch.bfloat16),
    Precision(torch.bfloat16, torch.float32),
]


def trainer(
    stepping: Stepping,
    precision: Precision,
    log_freq: int = 100,
    kind: str = "batch_topk",
    optimizer: OptimizerName = "adam",
) -> Trainer:
    wanted = spec(kind, d_in=D, d_sae=FEATURES, top_k=K, n_batches_to_dead=2, aux_penalty=0.5)
    if wanted.matryoshka_sizes:
        wanted.matryoshka_sizes = [16, FEATURES]
    sae = build(wanted)
    sae.initialise(generator(0, "weights"))
    return Trainer(
        sae.to(GPU),
        SparseDirections(),
        TrainingConfig(num_epochs=6, early_stopping_patience=0, lr=0.01, optimizer=optimizer),
        Observer(),
        Compute(precision=precision),
        log_freq=log_freq,
        stepping=stepping,
    )


def trained(*how: Any, **further: Any) -> Trainer:
    training = trainer(*how, **further)
    for _ in training.train():
        pass
    return training


def assert_same(found: Trainer, right: Trainer) -> None:
    assert found.history == right.history
    for name, tensor in right.state().tensors.items():
        assert torch.equal(found.state().tensors[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *(("batch_topk", precision) for precision in PRECISIONS),
        *(("topk", precision) for precision in PRECISIONS),
        ("matryoshka_batch_topk", PRECISIONS[1]),
        *(("multi_batch_topk", precision) for precision in PRECISIONS),
    ],
    ids=["bfloat16", "float32", "topk", "topk in float32", "nested", "k", "k in float32"],
)
def test_a_graph_gives_the_bytes_of_its_operations_every_time(
    kind: str, precision: Precision
) -> None:
    first = trained("static", precision, kind=kind)
    for other in (trained("graph", precision, kind=kind), trained("graph", precision, 3, kind)):
        assert_same(other, first)


def test_graphs_of_several_trainings_take_turns() -> None:
    """And use each other's memory."""
    ways = [("batch_topk", PRECISIONS[0]), ("topk", PRECISIONS[1]), ("batch_topk", PRECISIONS[1])]
    together = [trainer("graph", precision, kind=kind) for kind, precision in ways]
    for _ in zip(*(training.train() for training in together), strict=True):
        pass
    for found, (kind, precision) in zip(together, ways, strict=True):
        assert_same(found, trained("static", precision, kind=kind))


@pytest.mark.parametrize("optimizer", ["adam", "active_adam"])
def test_a_graph_trains_as_the_ordinary_code(optimizer: OptimizerName) -> None:
    graph, ordinary = (
        trained(how, PRECISIONS[1], optimizer=optimizer) for how in ("graph", "ordinary")
    )
    for name in ("loss", "aux_loss", "val_loss"):
        assert graph.history[name] == pytest.approx(ordinary.history[name], rel=1e-3), name


def test_nothing_waits_for_the_host() -> None:
    training = trained("graph", PRECISIONS[0])
    assert training.ahead is not None
    step, run = training.ahead.step, training.ahead.run
    assert step is not None and run is not None
    raw = training.source.activations[:8].flatten(0, 1)  # type: ignore[attr-defined]
    step.begin()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.feed(raw, 1e-3)
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", PRECISIONS, ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["batch_topk", "topk", "multi_batch_topk"])
def test_a_step_needs_the_memory_that_the_planner_says(kind: SAEType, precision: Precision) -> None:
    d, width, n = 512, 8192, 4096
    config = SAEConfig(kind, width // d, topk=32)
    sae = build(spec(kind, d_in=d, d_sae=width, top_k=config.topk, top_k_aux=config.topk))
    sae.initialise(generator(0, "weights"))
    normalise = Normalisation(torch.zeros(d, device=GPU), d**0.5, 1e3)
    raw, sae = normal(n, d, dtype=torch.float32).to(GPU), sae.to(GPU)
    step = StaticStep(sae, adam(sae, 1e-3), normalise, 1.0, precision, raw, 2, kernels())
    step.begin()
    for _ in range(2):  # the first also compiles, and makes what cuBLAS keeps
        step.feed(raw, 1e-3)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run()
    held = torch.cuda.max_memory_allocated() - before
    planned = step_bytes(config, d, n, exact=precision.value_dtype == torch.float32)
    assert 0.8 * planned < held < 1.1 * planned


def test_the_kernels_select_what_the_twin_does() -> None:
    n, n_features, total = 300, 5000, 300 * 20
    pre = (normal(n, n_features).float() * 2).bfloat16().to(GPU)
    rows, columns = (
        torch.arange(n, device=GPU) % 7 > 0,
        torch.arange(n_features, device=GPU) % 5 > 0,
    )
    wanted = torch.tensor(total, dtype=torch.int32, device=GPU)
    found = [
        ops.select(pre, rows, columns, wanted, total, torch.zeros_like(wanted))
        for ops in (kernels(), TWIN)
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
