"""Static steps that run while the host goes on to the next batch, and its looks at them.

The host gives the device one batch after another and never waits. At each log point it looks: it
reads the figures of all steps since the last look in one copy, and reports them in order. If a step
was not taken, no later one was either. The host then takes that batch with the ordinary code, which
handles whatever is wrong with it, and gives the device the later ones again. So batches are kept
until the next look, which comes early if they would take more than `KEPT_BYTES`.

On a GPU the step is captured as a CUDA graph, which one call launches. It uses the memory that it
was captured with: all that a step reads and writes stays where it is. Of several trainings in a
process, each has a graph, and one graph runs at a time. So what a step needs only while it runs is
in the same memory for all of them.
"""

import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae_core.sae.reconstruction import Compute
from sae_core.sae.static.backend import has_kernels
from sae_core.sae.static.facts import Figures
from sae_core.sae_base import SparseAutoencoder
from sae_core.trainer.static_step import StaticStep
from sae_core.utils.errors import SAEError, is_out_of_memory

Stepping = Literal["auto", "ordinary", "static", "graph"]
"""How steps are taken: by the ordinary code, or in fixed sizes, operation by operation or as a
graph. `auto` takes a graph where it can."""

KINDS = "batch_topk", "matryoshka_batch_topk", "multi_batch_topk", "topk"
"""Those with a static step, by name: their classes would make all kinds depend on this file."""

KEPT_BYTES = 2**30
"""Most memory that the batches between two looks take."""

ADVICE = "give --activation-batch-size, and the step takes so many at a time"

REHEARSALS = 2
"""Steps before a capture, during which libraries initialise. They change no weights."""


class Waiting(NamedTuple):
    """A batch that the device has been given, and that no look has reported yet."""

    raw: Tensor
    """(N, D) activations."""
    lr: float
    number: int
    """Of the step in its epoch, from 1."""


class Ahead:
    """The steps since the last look.

    Args:
        make: builds the static step for batches like the one given, with room for the figures of
            so many steps.
        captured: whether the step runs as a CUDA graph; otherwise it runs operation by operation.
        log_freq: steps between two looks.
        tell: is called with each step that was taken, and its figures.
        redo: is called with a batch whose step was not taken.
    """

    def __init__(
        self,
        make: Callable[[Tensor, int], StaticStep],
        captured: bool,
        log_freq: int,
        tell: Callable[[Waiting, Figures], None],
        redo: Callable[[Waiting], None],
    ) -> None:
        self.make, self.captured, self.log_freq = make, captured, log_freq
        self.tell, self.redo = tell, redo
        self.waiting: list[Waiting] = []
        self.step: StaticStep | None = None
        self.run: Callable[[], None] | None = None
        self.most = self.length = 1

    def forget(self) -> None:
        """Give up the step and its memory; the next batch makes another. To be called when the SAE
        or the optimizer has other tensors, and when no batch comes for long."""
        self.waiting, self.step, self.run = [], None, None

    @property
    def is_settled(self) -> bool:
        """Whether every batch has been told or redone. With several processes it is so in all of
        them after the same batches."""
        return not self.waiting

    def take(self, batch: Waiting) -> None:
        """Give the device a batch, and look where the log does."""
        self._give(batch)
        if batch.number % self.log_freq == 0:
            self.look()

    def look(self) -> None:
        """Wait for the device, and tell what it has done with every batch that it was given."""
        while self.waiting:  # those that come after one that was redone are given again
            self._look_once()

    def _look_once(self) -> None:
        given, self.waiting = self.waiting, []
        assert self.step is not None
        figures = self.step.figures(len(given))
        n_taken = sum(bool(each.taken) for each in figures)  # the first ones
        for batch, each in zip(given[:n_taken], figures, strict=False):
            self.tell(batch, each)
        if n_taken == len(given):
            self.length = min(2 * self.length, self.most)
            return
        self.redo(given[n_taken])
        self.length = 1  # more may follow, and each costs the steps given after it
        for batch in given[n_taken + 1 :]:
            self._give(batch)

    def _give(self, batch: Waiting) -> None:
        step = self.step or self._prepare(batch.raw)
        if not self.waiting:
            step.begin()
        step.feed(batch.raw, batch.lr)
        assert self.run is not None
        self.run()
        self.waiting.append(batch)
        if len(self.waiting) >= self.length:
            self._look_once()

    def _prepare(self, raw: Tensor) -> StaticStep:
        self.most = max(1, min(self.log_freq, KEPT_BYTES // raw.nbytes))
        self.length = self.most
        try:
            self.step = self.make(raw, max(self.most, REHEARSALS))
            self.run = Captured(self.step) if self.captured else self.step.run
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise SAEError(f"no memory for a step of {len(raw)} tokens: {ADVICE}") from error
        return self.step


def picked(stepping: Stepping, sae: SparseAutoencoder, compute: Compute) -> Stepping:
    """What `auto` stands for: fixed sizes for a kind of `KINDS` on an NVIDIA GPU with a bfloat16
    product, unless the rows of a block are limited; otherwise the ordinary code. One process takes
    a graph. Several take their operations one by one: a graph with the messages of NCCL in it
    has not been tried on real GPUs."""
    if stepping != "auto":
        return stepping
    fits = (
        compute.row_block is None
        and compute.precision is not None
        and compute.precision.matmul_dtype == torch.bfloat16
        and sae.spec.sae_type in KINDS
        and has_kernels(sae.b_dec.device)
    )
    if not fits:
        return "ordinary"
    return "graph" if compute.group.is_single else "static"


class Pool:
    """Where all graphs have what they need only while they run. It lives as long as one of them:
    CUDA gives no memory to a graph in a pool whose graphs are gone."""

    def __init__(self) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()


_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()
"""The one that is in use, if there is one."""


class Captured:
    """A step as a CUDA graph; a call launches it."""

    def __init__(self, step: StaticStep) -> None:
        """Capture it. Other threads may use the GPU meanwhile."""
        step.begin(halted=True)
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(REHEARSALS):
                step.run()
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.pool = next(iter(_pools), None) or Pool()
        given = {"pool": self.pool.handle, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.graph, **given):
            step.run()
        _pools.add(self.pool)

    def __call__(self) -> None:
        self.graph.replay()
