"""One training in several processes, one a GPU, as `torchrun.py` starts them.

Every process holds the whole SAE and works on a run of each batch's tokens. The loss is the mean of
the processes' losses, weighted by their tokens; the gradients are added up, and all take the same
step, so that the weights stay alike to the last bit. What depends on the whole batch, such as which
pre-activations BatchTopK keeps, is asked of everyone. All have to ask the same, in the same order.

The first process alone writes files and messages.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from sae_core.errors import SAEError
from sae_core.ranks import local_rank


class Everyone:
    """The processes that train one SAE; this one alone, unless it was told otherwise.

    Args:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def own(self, n: int) -> slice:
        """This process's run of `n` things.

        Raises:
            SAEError: there are not enough for all.
        """
        if n < self.size:
            raise SAEError(
                f"a step has {n} things to work on, tokens or windows, for {self.size} processes: "
                "use more --tokens-per-step, or fewer --gpus"
            )
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, x: Tensor) -> Tensor:
        """Everyone's `x` added up. The gradient of each is the sum of everyone's gradients."""
        return x if self.is_alone else _Sum.apply(x)

    def mean(self, mean: Tensor, n: int) -> Tensor:
        """The mean over everyone's tokens, where this process's `n` have the mean `mean`."""
        return mean if self.is_alone else self.sum(mean * n) / self.count(n)

    def count(self, n: int) -> int:
        """Everyone's `n` added up."""
        return n if self.is_alone else int(self.sum(torch.tensor(n)))

    def greatest(self, n: int) -> int:
        """The greatest of everyone's `n`."""
        if self.is_alone:
            return n
        found = torch.tensor(n)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Everyone's `x` (n, ...), by rank; `n` may differ."""
        if self.is_alone:
            return [x]
        lengths = [torch.tensor(0) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(x)))
        padded = x.new_zeros(max(map(int, lengths)), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Everyone's tensors added up, in place."""
        if not self.is_alone:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Go on when everyone is here."""
        if not self.is_alone:
            dist.barrier()

    def leave(self) -> None:
        """The common work is done: what follows is the first process's, and the others end here."""
        if not self.is_alone:
            dist.destroy_process_group()
        if not self.is_first:
            sys.exit()


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out)
    return out


ALONE = Everyone()


def join(device: str) -> Everyone:
    """The processes that were started together with this one, or this one alone.

    Args:
        device: to compute on, as `pick_device` takes it.

    Raises:
        SAEError: there are more of them than GPUs.
    """
    own = local_rank()
    if own is None:
        return ALONE
    if device != "cpu" and torch.backends.mps.is_available():
        raise SAEError("--gpus: Apple's GPUs cannot share a training; use 1, or --device cpu")
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        if own >= n_gpus:
            raise SAEError(f"--gpus: this machine, or this job, has {n_gpus}")
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return Everyone(dist.get_rank(), dist.get_world_size())
