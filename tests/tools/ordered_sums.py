"""Whether all sums have one order on a GPU, where many threads may add to one number at a time."""

import math
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RACES = set(
    "index_add index_add_ scatter_add scatter_add_ index_reduce index_reduce_ put put_ histc "
    "embedding_dense_backward _embedding_bag_dense_backward nll_loss2d_forward".split()
)
"""Operations whose additions have no order there (`torch.use_deterministic_algorithms`)."""

REDUCTIONS = {"scatter_reduce", "scatter_reduce_"}
"""Those that have one if they take the largest or smallest number."""


class Unordered(RuntimeError):
    """An operation gives other bytes each time on a GPU."""


def _races(name: str, args: tuple[Any, ...]) -> bool:
    tensors = [x for x in args if isinstance(x, Tensor)]
    if not any(x.is_floating_point() for x in tensors):
        return False  # integers have no roundings
    if name in REDUCTIONS:
        return args[4] not in ("amax", "amin")
    if name == "bincount":
        return len(tensors) > 1  # with weights
    if name in ("cumsum", "cumprod"):
        return math.prod(tensors[0].shape) == tensors[0].shape[args[1]] > 1  # a scan by blocks
    return name in RACES or ("_attention" in name and name.endswith("_backward"))


class OrderedSums(TorchDispatchMode):
    """While it is active, an operation that has no order on a GPU raises `Unordered`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _races(func._schema.name.removeprefix("aten::"), args):
            raise Unordered(f"{func}: without an order on a GPU")
        return func(*args, **(kwargs or {}))


def raises_of(work: Any) -> bool:
    """Whether `work` has no order there."""
    try:
        with OrderedSums():
            work()
    except Unordered:
        return True
    return False
