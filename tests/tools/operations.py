"""How many operations a step of fixed sizes launches, and if it asks anything of the device."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_core.sae.static import launching

NO_WORK = set(
    "view _unsafe_view t transpose detach alias slice select expand unsqueeze squeeze split chunk "
    "split_with_sizes unbind as_strided permute empty empty_like new_empty lift_fresh".split()
)
"""Operations that launch nothing."""


class Operations(TorchDispatchMode):
    """Notes the names of what is launched while it is active, kernels among them, and on which
    devices the tensors of all operations are.

    Args:
        kernels: launch the kernels, too, and not only count them.
    """

    def __init__(self, kernels: bool = True) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: set[str] = set()
        self.kernels, self.launch = kernels, launching.launch

    def __enter__(self) -> "Operations":
        launching.launch = self._launch
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        launching.launch = self.launch
        super().__exit__(*error)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        self.names.append(kernel.fn.__name__)
        if self.kernels:
            self.launch(kernel, grid, *args, **constants)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten" and name not in NO_WORK:
            self.names.append(name)
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.devices |= {tensor.device.type for tensor in tensors}
        return result
