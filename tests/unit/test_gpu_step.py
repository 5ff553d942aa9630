"""What a step of fixed sizes gives a GPU, as far as that can be seen without one: operations, their
number, their devices and memory."""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from held_memory import HeldMemory
from operations import Operations
from pretend_gpu import GPU, PretendGPU, _move_module
from short_training import FEATURES, D
from synthetic import spec
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae import dense_ops
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import build
from sae_core.sae.normalisation import Normalisation
from sae_core.sae.precision import Precision
from sae_core.sae.static import launching, pair_kernels
from sae_core.sae.static.backend import TWIN, kernels
from sae_core.trainer import ahead, objective
from sae_core.trainer.optimizer import adam
from sae_core.trainer.static_step import StaticStep
from sae_core.workflow import gpu_step
from sae_core.workflow.gpu_step import step_bytes

EXACT = Precision(torch.bfloat16, torch.float32)
ROUNDED = Precision(torch.bfloat16, torch.bfloat16)

SHAPE = {"d": 576, "width": 9216, "k": 64, "tokens": 4096}
DENSE = {"d": 1024, "width": 4096, "k": 128, "tokens": 4096}


class OneOfFour(ProcessGroup):
    """The second of four processes, whose messages come back as they are, and how many it sends."""

    def __init__(self) -> None:
        super().__init__(1, 4)
        self.sent = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        self.sent += 1
        return x.clone()

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        self.sent += 1


def without_data(
    precision: Precision,
    shape: dict[str, int],
    kind: str,
    group: ProcessGroup = SINGLE_PROCESS,
    **further: Any,
) -> StaticStep:
    """A step of the kernels; for tensors that have no memory."""
    d, width = shape["d"], shape["width"]
    wanted = spec(kind, d_in=d, d_sae=width, top_k=shape["k"], top_k_aux=shape["k"], **further)
    sae = build(wanted)
    raw = torch.zeros(shape["tokens"], d, dtype=torch.bfloat16)
    normalise = Normalisation(torch.zeros(d), 1.0, 10.0)
    optimizer, ops = adam(sae, 1e-3), kernels()
    step = StaticStep(sae, optimizer, normalise, 1.0, precision, raw, 4, ops, group)
    step.begin()
    step.feed(raw, 1e-3)
    return step


def operations(
    precision: Precision,
    shape: dict[str, int],
    kind: str,
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[str]:
    """What one step launches, in the order: operations and kernels. Its tensors are fake ones, so
    that whatever has to know a number or a size of its data fails."""
    with FakeTensorMode():
        step = without_data(precision, shape, kind, group)
        with Operations(kernels=False) as counting:
            step.run()
    return counting.names


@pytest.mark.parametrize(
    ("precision", "shape", "kind", "most"),
    [
        (ROUNDED, SHAPE, "batch_topk", 112),
        (EXACT, SHAPE, "batch_topk", 228),
        (ROUNDED, DENSE, "batch_topk", 126),
        (EXACT, DENSE, "batch_topk", 228),
        (ROUNDED, SHAPE, "topk", 119),
        (EXACT, SHAPE, "topk", 164),
        (ROUNDED, SHAPE, "matryoshka_batch_topk", 149),
        (ROUNDED, SHAPE, "multi_batch_topk", 198),
        (EXACT, SHAPE, "multi_batch_topk", 314),
        (ROUNDED, DENSE, "multi_batch_topk", 215),
    ],
)
def test_a_step_asks_nothing_and_launches_little(
    precision: Precision, shape: dict[str, int], kind: str, most: int
) -> None:
    """With dead features or without. The ordinary step launches 131 operations and waits 16 times;
    with dead features 212 and 23, and both more for normalising the batch."""
    names = operations(precision, shape, kind)
    is_dense = precision == ROUNDED and shape == DENSE
    assert ("_segments" in names) != is_dense
    print(len(names), Counter(names))
    assert len(names) <= most


@pytest.mark.parametrize(
    ("precision", "kind", "messages"),
    [
        (ROUNDED, "batch_topk", 10),
        (EXACT, "batch_topk", 16),
        (EXACT, "topk", 10),
        (ROUNDED, "matryoshka_batch_topk", 11),
        (ROUNDED, "multi_batch_topk", 17),
    ],
)
def test_a_shared_step_asks_nothing_either(precision: Precision, kind: str, messages: int) -> None:
    """And sends few messages: all gradients go in one."""
    group = OneOfFour()
    names = operations(precision, SHAPE, kind, group)
    assert "_write_kept" in names and group.sent == messages


@pytest.mark.parametrize("precision", [EXACT, ROUNDED], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ahead.KINDS)
def test_a_step_takes_nothing_from_the_host(kind: str, precision: Precision) -> None:
    """A copy from there would end the capture of a graph."""
    for shape in (SHAPE, DENSE):
        with torch.device("meta"):
            step = without_data(precision, shape, kind)
        with Operations(kernels=False) as counting:
            step.run()
        assert counting.devices == {"meta"}


@pytest.mark.parametrize("precision", [EXACT, ROUNDED], ids=["float32", "bfloat16"])
def test_pairs_read_rows_in_the_format_of_the_values(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are most of what a step reads: a row of a weight, a gradient or an activation each."""
    read: dict[str, set[torch.dtype]] = {}

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False))
        read[kernel.fn.__name__] = {given[name].dtype for name in given.keys() & {"W", "G", "X"}}

    with torch.device("meta"):
        step = without_data(precision, SHAPE, "batch_topk")
    monkeypatch.setattr(launching, "launch", note)
    step.run()
    for kernel in ("_decode", "_sampled", "_segments"):
        assert read[kernel] == {precision.value_dtype}
    assert read["_move_rows"] == {torch.float32}


MEASURED = {
    "A": SHAPE,
    "B": DENSE,
    "C": {"d": 512, "width": 8192, "k": 32, "tokens": 4096},
    "D": {"d": 2560, "width": 40960, "k": 128, "tokens": 8192},
    "E": {"d": 1024, "width": 65536, "k": 64, "tokens": 8192},
}


@pytest.mark.parametrize("exact", [True, False], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ahead.KINDS)
@pytest.mark.parametrize("name", MEASURED)
def test_the_planner_knows_a_steps_memory(name: str, kind: str, exact: bool) -> None:
    """Against what the tensors of a step hold at once, which nothing is without data."""
    shape, fractions = MEASURED[name], (0.25, 0.5)
    d, k = shape["d"], shape["k"]
    sae = SAEConfig(kind, shape["width"] // d, topk=k, matryoshka_fractions=fractions)
    with torch.device("meta"):
        sizes = sae.matryoshka_sizes(shape["width"])
        step = without_data(EXACT if exact else ROUNDED, shape, kind, matryoshka_sizes=sizes)
    with Operations(kernels=False), HeldMemory() as memory:
        step.run()
    assert not memory.held
    assert 0.97 < step_bytes(sae, d, shape["tokens"], exact) / memory.most < 1.08


def test_its_formula_has_the_numbers_of_the_step() -> None:
    assert gpu_step.AUXILIARY_STRIDE == objective.AUXILIARY_STRIDE
    assert gpu_step.SEGMENT == pair_kernels.SEGMENT
    assert gpu_step.DENSE_SHARE == dense_ops.DENSE_SHARE
    assert gpu_step.STATIC_KINDS == ahead.KINDS
    dense = SAEConfig("standard", 4)
    assert gpu_step.step_bytes(dense, 64, 512, exact=False) == 0


class Allocator:
    """CUDA's, as far as pools of graphs go: a pool whose graphs are gone takes no others."""

    def __init__(self) -> None:
        self.handles, self.live = count(), Counter[int]()
        self.known: set[int] = set()

    class CUDAGraph:
        pass

    @contextmanager
    def graph(self, graph: CUDAGraph, pool: int, **_: Any) -> Iterator[None]:
        assert pool not in self.known or self.live[pool], "use_count > 0"
        self.known.add(pool)
        self.live[pool] += 1
        weakref.finalize(graph, self.live.subtract, [pool])
        yield


def test_graphs_share_memory_while_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And after the last one is gone, another can be captured."""
    cuda = Allocator()
    for name in ("CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(cuda.handles))
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    for n_pools in (1, 2):
        first, second = (ahead.Captured(MagicMock()) for _ in range(2))
        assert len(cuda.known) == n_pools and +cuda.live == {first.pool.handle: 2}
        del first
        third = ahead.Captured(MagicMock())
        assert len(cuda.known) == n_pools and third.pool is second.pool
        del second, third
        assert not +cuda.live


def test_a_kernel_runs_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model that is spread over several has its logits on the last."""
    current, ran_on = [0], []

    def exchange(device: int) -> int:
        current.append(device)
        return current[-2]

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    launch_on = {(2,): lambda tensor: ran_on.append(current[-1])}
    launching.launch(launch_on, (2,), SimpleNamespace(is_cuda=True, get_device=lambda: 1))
    assert ran_on == [1] and current[-1] == 0


def test_the_fake_tensors_notice_a_question() -> None:
    with FakeTensorMode():
        x = torch.zeros(3)
        for asked in (lambda: x.nonzero(), lambda: float(x.sum()), lambda: x[x > 0]):
            with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
                asked()


def test_no_operation_mixes_devices() -> None:
    """On a pretended GPU, with dead features, and float32 values."""
    with PretendGPU():
        sae = build(spec(d_in=D, d_sae=FEATURES, top_k=2, top_k_aux=2))
        _move_module(sae, GPU)
        sae.num_batches_not_active[:9] = 1000
        raw, mean = (torch.ones(shape, device=GPU) for shape in ((32, D), (D,)))
        normalise = Normalisation(mean, 1.0, 10.0)
        step = StaticStep(sae, adam(sae, 1e-3), normalise, 1.0, EXACT, raw, 4, TWIN)
        step.begin()
        step.feed(raw, 1e-3)
        step.run()
        assert step.record.device == GPU and step.at == 1
