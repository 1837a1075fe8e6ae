"""A stand-in for a GPU: torch's CUDA dispatch, autocast and autograd run as on one, without memory and without kernels.

Two halves. ``standin.c``, preloaded into a process of its own, answers what torch asks of the CUDA runtime before it
runs anything. The mode `StandIn` then gives every tensor on the device a shape, strides and a dtype (torch's
FakeTensor), and passes each operation that would reach the device to a `Meter`. So everything that depends on shapes,
dtypes, layouts and devices is as on a GPU: which operations run, which kernels torch and the project choose, casts,
copies, what autograd keeps and for how long.

It cannot see how long the device takes, the caching allocator's fragmentation, or the workspaces of cuBLAS and cuDNN.

A CUDA graph is what its operations were while it was recorded. As on a GPU, recording one fails at a wait for the
device, and here also at a copy from or to the host, whose memory a replay would read again.

Integers and booleans keep their values, computed on the CPU beside the shapes, because sizes depend on them. Floats
have none; reading one gives 1.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from muse_fast.errors import UserError
from muse_fast.kernels.namespace import NAMESPACE
from muse_fast.ops import backends

TORCH = "2.11"
DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]

PROPERTIES = SimpleNamespace(  # as in standin.c, for what asks torch.cuda
    name="stand-in (sm_90)",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=227 << 10,
    total_memory=80 << 30,
)

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
aten = torch.ops.aten
# Fillings of host tensors, such as initial weights. Only shapes count here, so they are skipped.
RANDOM = {"randn", "normal_", "uniform_", "erfinv_", "random_"}
READS = {"_local_scalar_dense", "equal"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "repeat_interleave", "bincount"}


def run(module: str, arguments: Sequence[str]) -> str:
    """Run ``python -m module arguments`` with a stand-in GPU and return what it prints.

    Raises:
        UserError: another version of torch, or one without CUDA; no C compiler; or the module failed.
    """
    check_torch()
    import nvidia  # headers of the runtime that torch uses; Triton has those that they include
    import triton

    folders = [Path(nvidia.__path__[0], "cu13/include"), Path(triton.__path__[0], "backends/nvidia/include")]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        compiler = os.environ.get("CC", "cc")
        includes = [f"-I{path}" for path in folders]
        options = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", *includes, "-o", str(library)]
        try:
            subprocess.run([compiler, *options, str(Path(__file__).with_suffix(".c"))], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"bench plan: {compiler} cannot compile standin.c ({error}); name a C compiler in $CC"
            ) from error
        environment = os.environ | {"LD_PRELOAD": str(library), "CUDA_VISIBLE_DEVICES": "0"}
        for name in ("TRITON_INTERPRET", backends.ENVIRONMENT):
            environment.pop(name, None)
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"bench plan: {' '.join(command[1:])} failed, see above")
    return done.stdout


def check_torch() -> None:
    version = torch.__version__.split("+")[0]
    if not version.startswith(f"{TORCH}.") or torch.version.cuda is None:
        raise UserError(
            f"bench plan knows what torch {TORCH} with CUDA asks of a device, and this is {torch.__version__}: install "
            f"torch {TORCH}, or adapt bench/plan/standin.c"
        )


class Copy(NamedTuple):
    """A copy between host and device."""

    bytes: int
    to_device: bool
    pinned: bool
    waits: bool
    place: str  # the project's line that asks for it


class Meter(Protocol):
    """What the stand-in tells of a step."""

    def operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """An operation of torch that runs on the device, or that creates or views a tensor there."""

    def kernel(self, name: str, arguments: dict[str, Any]) -> None:
        """A launch of a Triton kernel, with its arguments by name."""

    def copy(self, copy: Copy) -> None: ...

    def record(self) -> AbstractContextManager[Any]:
        """Record what the body does as a graph, which the context returns."""

    def replay(self, graph: Any) -> None:
        """A graph is launched."""

    def wait(self, what: str, place: str) -> None:
        """The host waits for the device."""


class Graph:
    """`torch.cuda.CUDAGraph`."""

    recorded: Any = None

    def __init__(self, device: StandIn) -> None:
        self._device = device

    def replay(self) -> None:
        if self._device.meter:
            self._device.meter.replay(self.recorded)


class StandIn(TorchDispatchMode):
    """While it is active, ``cuda:0`` exists.

    Attributes:
        meter: counts the operations; None counts nothing.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and leaving the compiler out at every operation takes time

    def __init__(self) -> None:
        super().__init__()
        self.meter: Meter | None = None
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self._values: Any = WeakIdKeyDictionary()  # of integer and boolean tensors on the device
        self._pinned: dict[int, Tensor] = {}  # by storage; keeps them, so that no address is used twice
        self._is_recording = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(isinstance(x, FakeTensor) for x in given)
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten.record_stream.default:
            return None
        if func in (aten._to_copy.default, aten.copy_.default) and self._crosses(func, args, kwargs):
            return self._copy(func, args, kwargs)
        if not on_device and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return self._on_host(func, args, kwargs)
        if func.namespace == NAMESPACE and (body := OPDEFS.get(func._schema.name)):
            with self:
                return body._init_fn(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE.name):
            with self:  # under inference mode, composite operations come whole; this runs their parts
                return func._op_dk(COMPOSITE, *args, **kwargs)
        return self._on_device(func, args, kwargs, given)

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._overloadpacket.__name__
        if name == "_pin_memory":
            pinned = args[0].clone()
            self._pinned[pinned.untyped_storage()._cdata] = pinned
            return pinned
        if name == "is_pinned":
            return args[0].untyped_storage()._cdata in self._pinned
        if name in RANDOM:
            return args[0] if name.endswith("_") else aten.empty.memory_format(args[0], dtype=kwargs.get("dtype"))
        return func(*args, **kwargs)

    def _on_device(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        name = func._overloadpacket.__name__
        values = self._computed(func, args, kwargs, given)
        if name in READS:
            self._wait(f"aten.{name}")
            return 1 if values is None else values
        if name in ("index", "index_put_") and any(map(_is_mask, args[1])):
            places = [self._places(i) if _is_mask(i) else [i] for i in args[1]]
            args = (args[0], [i for of_dimension in places for i in of_dimension], *args[2:])
        elif name in SIZED_BY_VALUES and kwargs.get("output_size") is None:
            self._wait(f"aten.{name}")
            if values is None:
                raise NotImplementedError(f"{func} has a size that depends on floats")
            with self._shapes:
                out = tree_map_only(Tensor, lambda x: torch.empty_like(x, device=DEVICE), values)
            return self._tell(func, args, kwargs, out, values)
        with self._shapes:
            out = _SHAPES.get(func, func)(*args, **kwargs)
        return self._tell(func, args, kwargs, out, values)

    def _tell(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, values: Any) -> Any:
        for made, value in zip(tree_leaves(out), tree_leaves(values), strict=False):
            if isinstance(made, Tensor) and isinstance(value, Tensor) and not value.dtype.is_floating_point:
                self._values[made] = value
        if self.meter:
            self.meter.operation(func, args, kwargs, out)
        return out

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """The result of an operation on integers and booleans whose values are all known, else None."""
        dtype = kwargs.get("dtype") or (torch.int64 if func._overloadpacket is aten.arange else None)
        whole = not dtype.is_floating_point if dtype is not None else bool(given)
        if not (whole and all(x in self._values if isinstance(x, FakeTensor) else x.numel() == 1 for x in given)):
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    self._values.pop(value, None)
            return None
        args, kwargs = tree_map_only(FakeTensor, lambda x: self._values[x], (args, kwargs))
        return func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))

    def _places(self, mask: Tensor) -> list[Tensor]:
        """The positions that a mask selects, one tensor per dimension."""
        self._wait("aten.nonzero")
        if mask not in self._values:
            raise NotImplementedError("a mask of floats selects a number of values that is not known")
        places = self._values[mask].nonzero().unbind(1)
        out = []
        for place in places:
            with self._shapes:
                out.append(torch.empty(place.shape, dtype=place.dtype, device=DEVICE))
            self._values[out[-1]] = place
        return out

    def _crosses(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        source = isinstance(args[0] if func is aten._to_copy.default else args[1], FakeTensor)
        if func is aten.copy_.default:
            return source != isinstance(args[0], FakeTensor)
        device = kwargs.get("device")
        return device is not None and source != (torch.device(device).type == "cuda")

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy between host and device. Unless it is asynchronous and its host memory is pinned, the host waits."""
        is_new = func is aten._to_copy.default
        source = args[0] if is_new else args[1]
        to_device = not isinstance(source, FakeTensor)
        asynchronous = kwargs.get("non_blocking") or (not is_new and len(args) > 2 and args[2])
        host = source if to_device else None if is_new else args[0]
        # `to("cpu", non_blocking=True)` allocates pinned memory.
        pinned = bool(asynchronous) if host is None else host.untyped_storage()._cdata in self._pinned
        self._refuse_in_recordings()
        if self.meter:
            copy = Copy(source.numel() * source.itemsize, to_device, pinned, not (asynchronous and pinned), place())
            self.meter.copy(copy)
        dtype = kwargs.get("dtype") or source.dtype
        if not is_new:
            if to_device and args[0] in self._values:
                self._values[args[0]].copy_(source)
            return args[0]
        if not to_device:
            value = self._values.get(source)
            return torch.ones(source.shape, dtype=dtype) if value is None else value.to(dtype)
        like = torch.empty_like(source, device="meta", memory_format=kwargs.get("memory_format", torch.preserve_format))
        with self._shapes:
            out = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=DEVICE)
        if not dtype.is_floating_point:
            self._values[out] = source.to(dtype)
        return self._tell(aten.empty_strided.default, (), {}, out, None)

    def _wait(self, what: str) -> None:
        self._refuse_in_recordings()
        if self.meter:
            self.meter.wait(what, place())

    def _refuse_in_recordings(self) -> None:
        if self._is_recording:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing, at {place()}")

    @contextmanager
    def record(self, graph: Graph, *, stream: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        """`torch.cuda.graph`."""
        self._is_recording = True
        try:
            with torch.cuda.stream(stream), self.meter.record() if self.meter else nullcontext() as graph.recorded:
                yield
        finally:
            self._is_recording = False

    @contextmanager
    def launches(self) -> Iterator[None]:
        """Let Triton kernels be launched: they are counted and do nothing."""
        from triton.runtime.jit import JITFunction

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            if self.meter:
                self.meter.kernel(kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)) | kwargs)

        with mock.patch.object(JITFunction, "run", launch):
            yield


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """``cuda:0`` within the body, in a process that `run` has started."""
    check_torch()
    device = StandIn()
    patches = (
        mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=PROPERTIES),
        mock.patch.object(torch.cuda, "CUDAGraph", partial(Graph, device)),
        mock.patch.object(torch.cuda, "graph", device.record),
        mock.patch.object(torch.cuda, "graph_pool_handle", return_value=(0, 0)),
        mock.patch.object(fake_tensor, "init_gpu_context", return_value=None),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", [Tensor, FakeTensor]),
        mock.patch.object(backends, "cuda_error", return_value=None),  # the library's CUDA ops are needed by shape only
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then copies where the mode sees it
        stack.enter_context(device.launches())
        stack.enter_context(device)
        yield device


def _resized(x: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *size).contiguous(memory_format=suggest_memory_format(x))


# Shapes of results where torch does not know them, or takes long to derive them.
_SHAPES: dict[Any, Callable[..., Any]] = {
    aten._fused_sgd_.default: lambda *_, **__: None,
    aten.upsample_bilinear2d.default: _resized,
    aten.cudnn_grid_sampler.default: lambda images, grid: images.new_empty(*images.shape[:2], *grid.shape[1:3]),
    aten.cudnn_grid_sampler_backward.default: lambda *args: tuple(map(torch.empty_like, args[:2])),
}


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def place() -> str:
    """The innermost line of the project that led here, such as ``muse_fast/pretraining/trainer.py:274``.

    torch runs a backward on a thread of its own. If it detects anomalies, it knows where the forward was called.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_of_project(frame.f_code.co_filename):
            return _named(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    node: Any = torch._C._current_autograd_node()
    kept = "".join(node.metadata.get("traceback_", ())) if node else ""
    lines = [(path, line) for path, line in re.findall(r'File "(.*?)", line (\d+)', kept) if _is_of_project(path)]
    return f"backward of {_named(*lines[-1])}" if lines else "torch"


def _named(path: str, line: object) -> str:
    return f"{Path(path).relative_to(ROOT)}:{line}"


@functools.cache
def _is_of_project(path: str) -> bool:
    within = Path(path)
    return within.is_relative_to(ROOT) and within.parent != Path(__file__).parent and ".venv" not in within.parts
