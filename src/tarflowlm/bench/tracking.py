"""Memory of a program on fake tensors: its peak, and its largest tensor."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_BLOCK = 512
"""Bytes that the CUDA allocator rounds a tensor up to."""


@dataclass
class Usage:
    """Bytes held by the tensors of one device, each storage once."""

    current: int = 0
    peak: int = 0
    largest: int = 0
    """Bytes of the largest tensor with its own memory that an operator returned."""
    shape: tuple[int, ...] = ()
    """Of that tensor."""
    operator: str = ""
    """The operator that returned it."""
    end: int = 0
    """Bytes held at the end."""
    _sizes: dict[int, int] = field(default_factory=dict)

    def hold(self, storage: torch.UntypedStorage) -> bool:
        """Count a storage until it is freed; returns whether it is new."""
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = 0
        self.resize(storage)
        weakref.finalize(storage, self._release, key).atexit = False
        return True

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Count the new size of a storage that is held."""
        key, size = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        if key in self._sizes:
            self.current += size - self._sizes[key]
            self._sizes[key] = size
            self.peak = max(self.peak, self.current)

    def _release(self, key: int) -> None:
        self.current -= self._sizes.pop(key)


class _Tracker(TorchDispatchMode):
    def __init__(self, usage: Usage, device: torch.device) -> None:
        super().__init__()
        self.usage, self.device = usage, device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # it has no memory of its own; the dispatcher sees its shard next
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                new = self.usage.hold(tensor.untyped_storage())
                size = tensor.numel() * tensor.element_size()
                if new and size > self.usage.largest:
                    self.usage.largest, self.usage.shape, self.usage.operator = size, tuple(tensor.shape), str(func)
        return result


@contextmanager
def tracked(device: torch.device, tensors: Any = ()) -> Iterator[Usage]:
    """Usage of the tensors created on `device` in this context, and of `tensors`, which exist already."""
    usage = Usage()
    for tensor in tree_iter(tensors):
        usage.hold(tensor.untyped_storage())
    # FSDP2 frees a gathered tensor by resizing its storage, which no dispatch mode sees
    resize: Callable[..., Any] = torch.UntypedStorage.resize_

    @wraps(resize)
    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        usage.hold(storage)
        usage.resize(storage)
        return result

    storages: Any = torch.UntypedStorage
    storages.resize_ = resized
    try:
        with _Tracker(usage, device):
            yield usage
    finally:
        usage.end = usage.current
        storages.resize_ = resize
