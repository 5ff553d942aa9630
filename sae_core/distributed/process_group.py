"""One training in several processes, one per GPU, as `torchrun.py` starts them.

Every process holds the whole SAE and works on its shard of each batch's tokens. The loss is the
mean of the processes' losses, weighted by their tokens. The gradients are summed, and all processes
take the same step, so the weights stay alike to the last bit. What depends on the whole batch, such
as which pre-activations BatchTopK keeps, needs a collective call: all processes have to make the
same ones, in the same order.

The first process alone writes files and messages.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from sae_core.utils.errors import SAEError
from sae_core.utils.ranks import local_rank


class ProcessGroup:
    """The processes that train one SAE together; by default this process alone.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        device: where they exchange numbers of the host: GPUs do that faster among themselves.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and messages."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.size == 1

    def shard(self, n: int) -> slice:
        """This process's share of `n` tokens or windows.

        Raises:
            SAEError: there are not enough for all processes.
        """
        if n < self.size:
            raise SAEError(
                f"a step has {n} tokens or windows for {self.size} processes: raise "
                "--tokens-per-step, or use fewer --gpus"
            )
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes, with gradients: each `x` gets the sum of the gradients
        that the processes have for the result."""
        return x if self.is_single else _AllReduce.apply(x)

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one collective call."""
        if not self.is_single:
            bucket = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(bucket)
            parts = bucket.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def mean(self, mean: Tensor, n: int, total: int) -> Tensor:
        """The mean over all `total` tokens, if this process's `n` have the mean `mean`."""
        return mean if self.is_single else self.all_reduce(mean * n) / total

    def before(self, n: int) -> int:
        """The sum of `n` over the processes before this one."""
        return 0 if self.is_single else int(self.sum_before(self._tensor(n)))

    def sum_before(self, number: Tensor) -> Tensor:
        """The same for a () tensor, which stays where it is."""
        if self.is_single:
            return torch.zeros_like(number)
        each = number.new_zeros(self.size)
        each[self.rank] = number
        return self.all_reduce(each)[: self.rank].sum()

    def total(self, n: int) -> int:
        """The sum of `n` over the processes."""
        return n if self.is_single else int(self.all_reduce(self._tensor(n)))

    def max(self, n: int) -> int:
        """The greatest `n` of all processes."""
        if self.is_single:
            return n
        found = self._tensor(n)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every process's `x` (n, ...), by rank; `n` may differ."""
        if self.is_single:
            return [x]
        lengths = [self._tensor(0) for _ in range(self.size)]
        dist.all_gather(lengths, self._tensor(len(x)))
        padded = x.new_zeros(max(map(int, lengths)), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]

    def _tensor(self, n: int) -> Tensor:
        return torch.tensor(n, device=self.device)

    def barrier(self) -> None:
        """Wait for all processes."""
        if not self.is_single:
            dist.barrier()

    def leave(self) -> None:
        """End the common work: the first process goes on alone, and the others exit here."""
        if not self.is_single:
            dist.destroy_process_group()
        if not self.is_first:
            sys.exit()


class _AllReduce(Function):
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


SINGLE_PROCESS = ProcessGroup()


def join(device: str) -> ProcessGroup:
    """The group of processes that were started together with this one, if there are any others.

    Args:
        device: to compute on, as `pick_device` takes it.

    Raises:
        SAEError: there are more of them than GPUs.
    """
    own = local_rank()
    if own is None:
        return SINGLE_PROCESS
    if device != "cpu" and torch.backends.mps.is_available():
        raise SAEError("--gpus: Apple's GPUs cannot share a training; use 1, or --device cpu")
    backend, place = "gloo", "cpu"
    if device != "cpu" and torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        if own >= n_gpus:
            raise SAEError(f"--gpus: this machine, or this job, has {n_gpus}")
        torch.cuda.set_device(own)
        backend, place = "cpu:gloo,cuda:nccl", f"cuda:{own}"
    # The default arguments of its functions are the group, if there is one as it is imported. They
    # would keep the group's threads beyond `leave`, and those can abort a process that ends.
    import_module("torch.distributed.nn")
    dist.init_process_group(backend)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), place)
