"""Most bytes that tensors hold at once."""

import weakref
from typing import Any

from torch import Tensor, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldMemory(TorchDispatchMode):
    """Counts the memory of the tensors that are made while it is active, and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _is(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage not in self._known and id(storage) not in given:
                self._known.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.most = max(self.most, self.held)
        return result

    def _free(self, n_bytes: int) -> None:
        self.held -= n_bytes


def _is(value: Any) -> bool:
    """A sparse tensor has no memory of its own, but that of its parts."""
    return isinstance(value, Tensor) and value.layout is strided
