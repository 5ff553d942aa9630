"""How large a tensor becomes while something is computed."""

from typing import Any

from torch import Tensor, strided
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that was made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                sparse = tensor.layout is not strided
                size = tensor._nnz() if sparse else tensor.untyped_storage().nbytes()
                entries = size if sparse else size // tensor.element_size()
                self.entries = max(self.entries, entries)
        return result
