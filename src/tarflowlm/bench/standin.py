"""A GPU without a GPU: a device that computes nothing, for shapes, devices and memory of programs that need one.

Tensors on it are fake: they have shape, dtype and device, but no numbers, so a step of any size takes a second. They
catch operands on different devices, and numbers that the host reads. PyTorch has fake CUDA tensors as well, but their
backward pass needs a real GPU; a backend of one's own does not (tested with PyTorch 2.13).
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
"""What autocast on CUDA runs in half and in single precision, as far as these models use it."""


class _Stream:
    """The streams and events of FSDP2, which have nothing to wait for here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> "_Stream":
        return self

    record_event = record

    def wait(self, *_: Any) -> None:
        pass

    wait_event = wait_stream = synchronize = wait


class _Nothing(FakeTensorMode):
    # constants are fake from the start: there is no memory on the device to put them into
    avoid_device_init = True


@cache
def device() -> torch.device:
    """The device, of which there is one in a process from the first call on; it then counts as its accelerator.

    UserError where PyTorch has no such devices.
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
def nothing_computed() -> Iterator[torch.device]:
    """A context in which tensors are fake; yields the device."""
    place = device()
    with _Nothing(allow_non_fake_inputs=False):
        yield place


@contextmanager
def simulated(world: int) -> Iterator[DeviceMesh | None]:
    """This process as the first of `world` that train together, whose messages go nowhere; None where it is alone."""
    if world == 1:
        yield None
        return
    try:
        # imported for what it registers: the shapes that collectives return
        import torch.distributed._tools.fake_collectives
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise UserError(f"PyTorch {torch.__version__} cannot simulate processes: {error}") from None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    # FSDP2 asks the device's module for streams, and here and there this function
    accelerator: Any = torch.accelerator
    before, accelerator.current_stream = accelerator.current_stream, _Stream
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*returned a view tensor")
            # outside of `nothing_computed`: a mesh reads its ranks
            yield init_device_mesh(device().type, (world,))
    finally:
        accelerator.current_stream = before
        dist.destroy_process_group()


def placed(model: LanguageModel, place: torch.device) -> LanguageModel:
    """A model that was built on the meta device, its parameters and buffers replaced by fake ones on `place`."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=place)
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
"""A library that is let go takes its kernels along."""


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
