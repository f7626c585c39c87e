"""A pretend accelerator: its tensors hold real numbers, which the CPU computes.

    with pretend("cuda") as gpu:            # or "mps"
        lm = tarflowlm.load("english-mini", device="cuda")
        with gpu.counting() as counted:
            lm.write("once")
        print(counted.num_waits, counted.num_launches, gpu.peak)
        print(counted)                      # every wait of the host, with its file and line

While the context lasts, `torch.device("cuda")` is there. Tensors on it say so, and the package
takes its own branches for it. Nothing is registered with PyTorch: afterwards, other tests of the
process see no accelerator.

What it finds
- Tensors of the CPU and of the device in one operation raise, as on a GPU. Numbers [] may be on the
  CPU, and so may the indices of an index, for which the host waits.
- A generator of the CPU cannot draw on the device, nor the other way round.
- Waits: what stops the host until the device has done its work. These are `item`, `tolist`,
  `nonzero`, masks as indices, copies to the CPU, and copies from it unless they are pinned and do
  not block.
- Launches: operations that start a kernel, as PyTorch's eager mode would.
- Bytes that are alive, and their peak. More than there is room for raise as on a GPU.
- On "cuda", autocast follows CUDA's policy, which is not that of the CPU: layer_norm, sum, exp and
  log give float32.
- On "mps", float64 raises.

What it does not find: errors of the kernels themselves, their rounding, streams, and whatever
compilation changes, as compiled functions run eagerly here. Several GPUs, DDP and FSDP2 are not
pretended. Composite operations have the parts that they have on a CPU. Autocast casts a weight at
every use; CUDA keeps the copy for the length of the context, and so launches a little less.

How it works: a tensor of the device wraps one of the CPU. To PyTorch's C++ it is on the CPU, so
that autograd needs no device of its own. A mode of torch functions makes and moves tensors.
"""

import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

import tarflowlm

CPU = torch.device("cpu")
ROOT = Path(tarflowlm.__file__).parents[1]
PACKAGES = ("tarflowlm", "tarflowlm_apps")
REAL_GENERATOR = torch.Generator

VIEWS = """
    alias as_strided chunk detach diagonal empty empty_like empty_strided expand lift_fresh
    new_empty new_empty_strided permute select slice split split_with_sizes squeeze t transpose
    unbind unfold unsqueeze view view_as_complex view_as_real
    _conj _neg_view _reshape_alias _unsafe_view
"""
VIEWS = frozenset(VIEWS.split())
"""Operations without a kernel."""
INDEXED = frozenset({"index", "index_put", "_index_put_impl", "_unsafe_index"})
WAITING = """
    _local_scalar_dense _unique2 bincount equal is_nonzero masked_select nonzero unique_consecutive
"""
WAITING = frozenset(WAITING.split())
"""Operations whose result, or its size, has to be known to the host."""


@dataclass
class Counted:
    """What happened within a context of `PretendDevice.counting`."""

    waits: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """By the kind of a wait and the innermost places in the package: file, line and function."""
    launches: Counter[str] = field(default_factory=Counter)
    """By operation."""

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    def places(self) -> dict[str, int]:
        """Waits by file and function, which an edit elsewhere in the file does not change."""
        found = Counter[str]()
        for (_, *places), count in self.waits.items():
            found[re.sub(r":\d+", "", places[-1]) if places else "elsewhere"] += count
        return dict(found)

    def __str__(self) -> str:
        return "\n".join(f"{n:6} {' < '.join(reversed(p))}" for p, n in self.waits.most_common())


class PretendTensor(Tensor):
    """A tensor of the device, around the one that it `held`."""

    held: Tensor
    home: "PretendDevice"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor, home: "PretendDevice", shares: bool = False) -> "PretendTensor":
        """`shares`: with the memory of another tensor of the device."""
        if home.device.type == "mps" and real.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64. Please use float32 instead."
            )
        made = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CPU,
        )
        made.held = real
        made.home = home
        if not shares:
            home.keep_account(real)
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    device = property(lambda self: self.home.device)
    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: self.home.device.type == "cuda")
    is_mps = property(lambda self: self.home.device.type == "mps")

    def get_device(self) -> int:
        return self.home.device.index

    def tolist(self) -> list[Any]:
        self.home.wait("tolist")
        return self.held.tolist()

    def numpy(self, **_: object) -> None:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()"
        )

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"


def held(x: Any, ours: list[PretendTensor], others: list[Tensor]) -> Any:
    """x with what tensors of the device hold; lists these, and other tensors but numbers []."""
    if isinstance(x, PretendTensor):
        ours.append(x)
        return x.held
    if isinstance(x, Tensor):
        if x.dim():
            others.append(x)
    elif type(x) in (list, tuple):
        return type(x)(held(y, ours, others) for y in x)
    return x


def pretended(x: Any, known: dict[int, Tensor], home: "PretendDevice", shares: bool) -> Any:
    """x with every tensor on the device: one that is `known`, or a new one."""
    if isinstance(x, Tensor):
        return known[id(x)] if id(x) in known else PretendTensor(x, home, shares)
    if type(x) in (list, tuple):
        return type(x)(pretended(y, known, home, shares) for y in x)
    return x


@cache
def name_of(func: Any) -> str:
    """The name of an operation, in place or not."""
    return func._schema.name.partition("::")[2].rstrip("_")


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of PyTorch's dispatcher with at least one tensor of the device."""
    ours: list[PretendTensor] = []
    others: list[Tensor] = []
    held_args = held(args, ours, others)
    held_kwargs = {key: held(x, ours, others) for key, x in kwargs.items()} if kwargs else kwargs
    home = ours[0].home
    name = name_of(func)
    is_view = name in VIEWS
    if not is_view:
        home.counted.launches[name] += 1
    if name == "copy":
        if others:
            home.wait("to the CPU" if isinstance(args[1], PretendTensor) else "from the CPU")
    elif name in INDEXED:
        indices = [x for x in args[1] if x is not None]
        if any(isinstance(x, PretendTensor) and x.dtype is torch.bool for x in indices):
            home.wait("mask as index")
        if any(not isinstance(x, PretendTensor) for x in indices):
            home.wait("index on the CPU")
        values = [x for x in others if not any(x is index for index in indices)]
        if values or not isinstance(args[0], PretendTensor):
            home.refuse(func, ours, others)
    elif others:
        home.refuse(func, ours, others)
    elif name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size", 0) is None):
        home.wait(name)
    if name == "_conj":  # a view on a real device; here nothing would resolve its bit
        func, is_view = torch.ops.aten.conj_physical.default, False
    known: dict[int, Tensor] = {id(x.held): x for x in ours}
    if others:
        known |= {id(x): x for x in others}
    return pretended(func(*held_args, **held_kwargs), known, home, is_view and "empty" not in name)


class _Moved(Function):
    """A copy on another device, with a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, home: "PretendDevice", there: bool) -> Tensor:
        ctx.back = home, not there
        return home.moved(x, there)

    @staticmethod
    def backward(ctx, grad: Tensor):
        home, there = ctx.back
        return home.moved(grad, there), None, None


class Generator(REAL_GENERATOR):
    """A generator that may belong to the device, with the numbers of the CPU's.

    Its state there has another size, as that of a GPU has.
    """

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)

    def get_state(self) -> Tensor:
        state = super().get_state()
        return state if self.place.type == "cpu" else torch.cat((state, state[:1]))

    def set_state(self, state: Tensor) -> "Generator":
        super().set_state(state if self.place.type == "cpu" else state[:-1])
        return self


class PretendDevice(TorchFunctionMode):
    """The device, and the mode in which PyTorch's functions make and move its tensors."""

    def __init__(self, kind: str, index: int, memory: int) -> None:
        super().__init__()
        self.device = torch.device(kind, index)
        self.memory = memory
        self.current = dict[str, int]()
        """The current device of every thread that has chosen one; else it is device 0."""
        self.alive = 0
        """Bytes of tensors."""
        self.peak = 0
        """The most bytes so far."""
        self.counted = Counted()
        self.lost = set[str]()
        """The threads that asked for the stream of another device: it would get a context there."""
        self._storages = dict[int, weakref.ref[torch.UntypedStorage]]()

    # what is counted

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """Counts what happens within; contexts may be nested, and then the inner one counts."""
        before, self.counted = self.counted, Counted()
        self.peak = self.alive
        try:
            yield self.counted
        finally:
            self.counted = before

    def wait(self, kind: str) -> None:
        """Count a wait of the host."""
        places = list[str]()
        frame = sys._getframe(1)
        while frame is not None and len(places) < 2:
            code = frame.f_code
            file = Path(code.co_filename)
            if any(package in file.parts for package in PACKAGES) and file.is_relative_to(ROOT):
                name = file.relative_to(ROOT).as_posix()
                places.append(f"{name}:{frame.f_lineno} {code.co_name}")
            frame = frame.f_back
        self.counted.waits[kind, *reversed(places)] += 1

    def refuse(self, func: object, ours: list[PretendTensor], others: list[Tensor]) -> None:
        shapes = ([tuple(x.shape) for x in some] for some in (ours, others))
        theirs = " and cpu ".join(map(str, shapes))
        what = "Expected all tensors to be on the same device, but found at least two devices"
        raise RuntimeError(f"{what}: {func} has {self.device} {theirs}")

    def keep_account(self, real: Tensor) -> None:
        storage = real.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None and known() is storage:
            return
        size = storage.nbytes()
        if self.alive + size > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def free(_: object) -> None:
            self.alive -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, free)

    # functions of PyTorch

    def is_here(self, device: Any) -> bool:
        """Whether `device`, None for the CPU, is this one. RuntimeError if there is none such."""
        if device is None:
            return False
        found = torch.device(device)
        if found.type in ("cpu", "meta"):
            return False
        if found.type != self.device.type or self.index_of(found) != self.device.index:
            raise RuntimeError(f"{found}: invalid device, only {self.device} is there")
        return True

    def index_of(self, device: Any = None) -> int:
        """The number of a device of this kind: without one, that of the thread's current device."""
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.current.get(threading.current_thread().name, 0) if index is None else index

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MOVES:
            return MOVES[func](self, *args, **kwargs)
        generator = kwargs.get("generator")
        device = kwargs.get("device")
        if self.is_here(device):
            if generator is not None and not self.is_here(generator.device):
                raise RuntimeError(f"Expected a '{self.device.type}' device type for generator")
            made = func(*args, **kwargs | {"device": "cpu"})
            if isinstance(made, PretendTensor):  # made like another one
                return made
            if func in (torch.tensor, torch.as_tensor):
                self.wait("from the CPU")
            self.counted.launches[func.__name__] += 1
            return PretendTensor(made, self)
        if generator is not None and self.is_here(generator.device) and device is not None:
            raise RuntimeError(f"Expected a '{device}' device type for generator")
        if self.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            args, kwargs = autocast(func, args, kwargs)
        return func(*args, **kwargs)

    def moved(self, x: Tensor, there: bool, *, pinned: bool = False) -> Tensor:
        """A copy of x on the device or, unless `there`, on the CPU."""
        self.counted.launches["copy"] += 1
        if not pinned:
            self.wait("from the CPU" if there else "to the CPU")
        if there:
            return PretendTensor(x.detach().clone(), self)
        return x.detach().held.clone()

    def to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if "other" in kwargs or (args and isinstance(args[0], Tensor)):
            other = kwargs.pop("other", None)
            other = args[0] if other is None else other
            device, dtype, non_blocking, layout = other.device, other.dtype, False, None
            copy = copy or (len(args) > 2 and args[2])
        else:
            if args and isinstance(args[-1], bool) and sum(isinstance(a, bool) for a in args) > 1:
                copy, args = args[-1], args[:-1]
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        layout = layout or torch.preserve_format
        there, here = self.is_here(device or x.device), isinstance(x, PretendTensor)
        if there == here:
            return x.to(dtype or x.dtype, copy=copy, memory_format=layout)
        if torch.is_grad_enabled() and x.requires_grad:
            y = _Moved.apply(x, self, there)
        else:
            y = self.moved(x, there, pinned=non_blocking and getattr(x, "is_pinned_here", False))
        if dtype is not None and dtype is not y.dtype:
            y = y.to(dtype)
        return y

    def pin_memory(self, x: Tensor, *_: object) -> Tensor:
        copy = x.clone()
        copy.is_pinned_here = True
        return copy


MOVES: dict[Any, Callable[..., Tensor]] = {
    Tensor.to: PretendDevice.to,
    Tensor.cpu: lambda self, x, **_: self.to(x, CPU),
    Tensor.cuda: lambda self, x, *_, **__: self.to(x, self.device),
    Tensor.type_as: lambda self, x, other: self.to(x, other),
    Tensor.pin_memory: PretendDevice.pin_memory,
}


# autocast


@cache
def policy() -> dict[str, str]:
    """CUDA's way for each operation, from PyTorch's header: narrow, wide, result or promote."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text(encoding="utf-8")
    ways = {
        "LOWER_PRECISION_FP": "narrow",
        "FP32": "wide",
        "FP32_SET_OPT_DTYPE": "result",
        "PROMOTE": "promote",
    }
    found = dict[str, str]()
    for macro, way in ways.items():
        body = re.search(rf"define AT_FORALL_{macro}\(_\)(.*?)\n\n", text, re.DOTALL)
        assert body is not None, macro
        found |= dict.fromkeys(re.findall(r"_\((\w+)[,)]", body.group(1)), way)
    assert {"addmm", "layer_norm", "sum", "addcmul"} <= found.keys()
    # what Python calls otherwise
    others = {"__matmul__": "matmul", "__rmatmul__": "matmul", "__pow__": "pow", "__rpow__": "pow"}
    others["cross_entropy"] = "nll_loss"
    return found | {name: found[known] for name, known in others.items()}


def autocast(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as CUDA's autocast would pass them."""
    way = policy().get(getattr(func, "__name__", ""))
    if way is None or "out" in kwargs:
        return args, kwargs
    floats = list[Tensor]()
    each_float((args, *kwargs.values()), floats.append)
    if not floats:
        return args, kwargs
    if way == "result":
        if kwargs.get("dtype") is None and floats[0].dtype is not torch.float32:
            kwargs = kwargs | {"dtype": torch.float32}
        return args, kwargs
    dtype = torch.get_autocast_dtype("cuda") if way == "narrow" else torch.float32
    if way == "promote" and all(x.dtype is not torch.float32 for x in floats):
        return args, kwargs

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype is dtype else x.to(dtype)

    return each_float(args, cast), {name: each_float(x, cast) for name, x in kwargs.items()}


def each_float(x: Any, act: Callable[[Tensor], Any]) -> Any:
    """`act` on all tensors of the device that autocast may change."""
    if isinstance(x, PretendTensor):
        return act(x) if x.is_floating_point() and x.dtype is not torch.float64 else x
    return type(x)(each_float(y, act) for y in x) if type(x) in (list, tuple) else x


# the context


def grouped(lists: list[list[Tensor]]) -> dict[Any, Any]:
    """PyTorch's groups by device and format, by the devices that tensors say."""
    groups = _group_tensors_by_device_and_dtype(lists)
    return {(some[0][0].device, dtype): (some, at) for (_, dtype), (some, at) in groups.items()}


class _Stream:
    """The one stream of the device."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = None

    def synchronize(self) -> None:
        pass

    wait_stream = synchronize


@contextmanager
def pretend(
    kind: str, *, index: int = 0, memory: int = 80 * 2**30, name: str = "H100"
) -> Iterator[PretendDevice]:
    """A context in which the device `kind`, "cuda" or "mps", is there.

    `memory` in bytes and `name` are what "cuda" says of itself. Of several GPUs only the one with
    this `index` can be used. Threads that start within the context see the device, too.
    """
    gpu = PretendDevice(kind, index, memory)
    run_thread = threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with gpu:
            run_thread(thread)

    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    replaced = {"Generator": Generator, "compilation_problem": lambda kind: None}
    with pytest.MonkeyPatch.context() as patch:
        # whoever has imported a name keeps it
        ours = [m for n, m in sys.modules.items() if n.partition(".")[0] in PACKAGES]
        for module in (torch, *ours):
            for known in replaced.keys() & vars(module).keys():
                patch.setattr(module, known, replaced[known])
        patch.setattr(torch, "compile", lambda function=None, **_: function)
        patch.setattr("tarflowlm.flow.numerics.mixture.compiled", lambda function: function)
        patch.setattr(torch, "inference_mode", torch.no_grad)
        patch.setattr("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype", grouped)
        patch.setattr(threading.Thread, "run", run_with_device)
        if kind == "cuda":
            for known, function in cuda_of(gpu, name).items():
                patch.setattr(torch.cuda, known, function)
        else:
            patch.setattr(torch.backends.mps, "is_available", lambda: True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with gpu:
                yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def cuda_of(gpu: PretendDevice, name: str) -> dict[str, Callable[..., Any]]:
    """Functions of torch.cuda that know the device."""

    def is_it(device: Any = None) -> bool:
        return gpu.index_of(device) == gpu.device.index

    def set_device(device: Any) -> None:
        if isinstance(device, torch.device) and device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index, got {device}")
        gpu.current[threading.current_thread().name] = gpu.index_of(device)

    def reset(device: Any = None) -> None:
        if is_it(device):
            gpu.peak = gpu.alive

    def stream(device: Any = None) -> _Stream:
        if not is_it(device):
            gpu.lost.add(threading.current_thread().name)
        return _Stream()

    return {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: gpu.device.index + 1,
        "current_device": gpu.index_of,
        "set_device": set_device,
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "current_stream": stream,
        "stream": nullcontext,
        "get_device_name": lambda *_: f"NVIDIA {name}",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=gpu.memory),
        "mem_get_info": lambda *_: (gpu.memory - gpu.alive, gpu.memory),
        "max_memory_allocated": lambda device=None: gpu.peak if is_it(device) else 0,
        "reset_peak_memory_stats": reset,
    }
