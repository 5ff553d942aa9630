"""Run a command on a pretended GPU: tensors on it lie on the CPU, but say that they do not.

    python tests/tools/pretend_gpu.py scripts/evaluate.py --device cuda ...

An operation that mixes both kinds fails, as it would on a GPU, and so does NumPy's access to a
tensor there, and a sum that would have another order there every time. Everything that asks for the
device takes the branch for CUDA.
"""

import runpy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from ordered_sums import OrderedSums
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

MOVES = {"to", "cpu", "copy_"}
"""Functions between devices."""

INDEXING = {"__getitem__", "__setitem__", "index_put_", "index_put"}
"""Functions whose indices may lie on the CPU."""

OF_THE_TENSOR = {"__get__", "__set__", "__delete__", "backward", "requires_grad_", "register_hook"}
"""What concerns the very object, not its numbers."""


class OnGPU(Tensor):
    """A tensor that says that it lies on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = _on_gpu(self.detach().as_subclass(Tensor).clone())
        copied.requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copied
        return copied


def _is_there(tensor: Tensor) -> bool:
    return isinstance(tensor, OnGPU) or getattr(tensor, "lies_there", False)


def _on_gpu(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:  # there are no subclasses of those
        tensor.lies_there = True
    if _is_there(tensor):
        return tensor
    return tensor.as_subclass(OnGPU)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, OnGPU) else value


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class PretendGPU(TorchFunctionMode):
    """While it is active, "cuda" is a device like any other."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [_is_there(x) for x in given]
        if name in MOVES:
            return self._move(func, name, args, kwargs)
        device = kwargs.get("device")
        if _is_gpu(device):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if name == "pin_memory":
            return args[0]
        if name == "numpy" and any(there):
            raise TypeError("can't convert a tensor on the GPU to NumPy; use .cpu() first")
        here = [x for x in given if not _is_there(x) and x.dim() > 0]
        indexed = given[0] if given and name in INDEXING else None
        allowed = name in OF_THE_TENSOR or isinstance(indexed, OnGPU)
        if any(there) and here and not allowed:
            raise RuntimeError(
                f"{resolve_name(func) or name}: expected all tensors to be on the same device"
            )
        result = func(*args, **kwargs)
        to_gpu = any(there) if device is None else _is_gpu(device)
        if not to_gpu:
            return result
        own = {id(x) for x in given}
        return tree_map(
            lambda x: _on_gpu(x) if isinstance(x, Tensor) and id(x) not in own else x, result
        )

    def _move(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        tensor, rest = args[0], list(args[1:])
        target = isinstance(tensor, OnGPU)
        if name == "copy_":
            func(tensor, *rest, **kwargs)
            return tensor
        if name == "cpu":
            return _plain(tensor).clone()
        for i, value in enumerate(rest):
            if isinstance(value, torch.device | str):
                target, rest[i] = _is_gpu(value), torch.device("cpu")
            elif isinstance(value, Tensor):
                target = isinstance(value, OnGPU)
        if "device" in kwargs:
            target = _is_gpu(kwargs["device"])
            kwargs["device"] = torch.device("cpu")
        moved = func(tensor, *rest, **kwargs)
        if moved is tensor and target == isinstance(tensor, OnGPU):
            return tensor
        return _on_gpu(moved) if target else _plain(moved).clone()


def _move_module(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`nn.Module.to` for devices and number formats."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                moved = tensor.detach().as_subclass(Tensor)
                if dtype is not None and moved.is_floating_point():
                    moved = moved.to(dtype)
                there = isinstance(tensor, OnGPU) if device is None else device.type == "cuda"
                if table is part._parameters:
                    moved = nn.Parameter(moved, tensor.requires_grad)
                new = moved.as_subclass(OnGPU).detach() if there else moved
                if there:
                    new.requires_grad_(tensor.requires_grad)
                    new._is_param = table is part._parameters
                table[name] = new
    return module


class NoStream(nullcontext):
    """A stream or an event of a GPU that does everything at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def pretended_streams(set_to: Callable[..., None]) -> None:
    """Set what CUDA's streams are made with to stand-ins."""
    for name in ("Stream", "Event", "current_stream", "stream"):
        set_to(torch.cuda, name, NoStream)


def pretend() -> None:
    """Make this process believe that there is a GPU."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_there(*args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        model, report = load(*args, device_map="cpu", **kwargs)
        return (model.to(GPU) if _is_gpu(device_map) else model), report

    transformers.AutoModelForCausalLM.from_pretrained = load_there
    save = torch.save
    torch.save = lambda data, *args, **kwargs: save(tree_map(_plain, data), *args, **kwargs)
    nn.Module.to = _move_module
    nn.Module.cpu = lambda module: _move_module(module, torch.device("cpu"))
    torch.cuda.is_available = lambda: True
    torch.version.cuda = None  # no kernel can run there
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.empty_cache = lambda: None
    pretended_streams(setattr)
    OrderedSums().__enter__()
    PretendGPU().__enter__()


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    pretend()
    runpy.run_path(sys.argv[0], run_name="__main__")
