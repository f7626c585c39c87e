"""A stand-in for a GPU: a device that computes nothing, to check shapes, devices and memory of programs without one.

Its tensors are fake: they have shape, dtype and device, but no values, so a step of any size takes about a second.
They catch operands on different devices, and values that the host reads. PyTorch has fake CUDA tensors as well, but
their backward pass needs a real GPU; a custom backend does not (tested with PyTorch 2.13).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tarflowlm.errors import UserError
from tarflowlm.language_model import LanguageModel

NAME = "standin"

_HALF = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
_SINGLE = (
    "layer_norm", "exp", "expm1", "log", "log1p", "reciprocal", "rsqrt", "softplus", "logsumexp",
    "cross_entropy_loss", "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "pow.Tensor_Scalar",
)  # fmt: skip
"""Operators that autocast on CUDA runs in half and in single precision, as far as these models use them."""


class _Stream:
    """Streams and events for FSDP2, with nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> "_Stream":
        return self

    record_event = record

    def wait(self, *_: Any) -> None:
        pass

    wait_event = wait_stream = synchronize = wait


class _FakeMode(FakeTensorMode):
    # constants are fake from the start: the device has no memory to hold them
    avoid_device_init = True


@cache
def device() -> torch.device:
    """The stand-in device. The first call registers it, and it stays the accelerator of this process.

    Raises UserError if this PyTorch cannot register devices from Python.
    """
    from torch.utils import backend_registration

    try:
        register = backend_registration._setup_privateuseone_for_python_backend
        base: Any = backend_registration._DummyBackendModule
    except AttributeError:
        raise UserError(f"PyTorch {torch.__version__} has no backends in Python: use a newer one") from None

    class Module(base):  # type: ignore[misc]
        Stream = Event = _Stream

        def current_stream(self, *_: Any) -> _Stream:
            return _Stream()

        def stream(self, _: Any) -> nullcontext[None]:
            return nullcontext()

        def set_device(self, _: Any) -> None:
            pass

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    register(NAME, Module())
    _register_kernels()
    return torch.device(NAME, 0)


@contextmanager
def fake_tensors() -> Iterator[torch.device]:
    """A context in which tensors are fake; yields the device. Raises errors as `device`."""
    standin = device()
    with _FakeMode(allow_non_fake_inputs=False):
        yield standin


@contextmanager
def simulated_processes(world: int) -> Iterator[DeviceMesh | None]:
    """The mesh of `world` training processes, of which only this first one exists; None for a single process.

    Messages are dropped. Raises UserError if this PyTorch cannot simulate processes.
    """
    if world == 1:
        yield None
        return
    try:
        # imported for its side effect: it registers the shapes that collectives return
        import torch.distributed._tools.fake_collectives
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise UserError(f"PyTorch {torch.__version__} cannot simulate processes: {error}") from None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    # FSDP2 asks the device's module for streams, but in some places this function
    accelerator: Any = torch.accelerator
    before, accelerator.current_stream = accelerator.current_stream, _Stream
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*returned a view tensor")
            # outside of `fake_tensors`: a mesh reads its ranks
            yield init_device_mesh(device().type, (world,))
    finally:
        accelerator.current_stream = before
        dist.destroy_process_group()


def to_fake(model: LanguageModel, standin: torch.device) -> LanguageModel:
    """A model built on the meta device, with its parameters and buffers replaced by fake ones on the device."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=standin)
                if isinstance(tensor, nn.Parameter):
                    module._parameters[name] = nn.Parameter(fake)
                else:
                    module._buffers[name] = fake
    return model


def _register_kernels() -> None:
    """Autocast as on CUDA, and fused attention, which keeps no [T, T] matrix."""
    library, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _KEPT.extend((library, rest))
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    for names, dtype in ((_HALF, torch.bfloat16), (_SINGLE, torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, _cast(operator, dtype), "AutocastPrivateUse1")


_KEPT: list[torch.library.Library] = []
"""References that keep the kernels registered."""


def _cast(operator: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        def cast(value: Any) -> Any:
            wanted = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if wanted else value

        with torch.autocast(NAME, enabled=False):
            return operator(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return kernel


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None:
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
