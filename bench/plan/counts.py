"""Count the operations of a step on the stand-in, and predict the least time of each from its bytes and FLOPs.

- *Bytes*: every input read once, every result written once, at dense sizes; what a broadcast or a gather skips is not
  counted. No reuse in a cache across operations.
- *FLOPs*: torch's registry of `torch.utils.flop_counter`, what it lacks, and `KERNELS` for our own.
- *Launches*: by the host. Of those that a CUDA graph repeats, only the graph's own is one; the others are *replayed*.
  Kernels per operation as torch 2.11 launches them on sm_90 (`LAUNCHES`, else one), for multi-tensor
  operations by torch's rule for splitting lists, for our Triton kernels as launched.
- *Time*: ``max(FLOPs / rate, bytes / bandwidth, launches * 2.5 us)``, a roofline: a prediction of the least time, in
  which nothing overlaps and no kernel is imperfect.
- *Peak*: bytes of live tensors on the device, in blocks of 512 as torch's allocator counts them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from bench.plan.standin import Copy, place

SMALL_KERNEL = 2.5e-6  # seconds: no kernel is shorter, however little it does


class Rates(NamedTuple):
    """Sustained rates of a GPU: FLOP/s of dense bfloat16 and of float32, bytes per second read plus written."""

    bf16: float
    fp32: float
    copy: float


# From data sheets times what large products and copies reach on an H100: 80 % of 989 TFLOP/s, 90 % of 3.35 TB/s.
RATES = {
    "H100": Rates(790e12, 50e12, 3.0e12),
    "H200": Rates(790e12, 50e12, 4.3e12),
    "H20": Rates(118e12, 33e12, 3.6e12),
}

# Operations that launch nothing, besides views: they create, name or inspect tensors.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "record_stream",
    "_unsafe_view", "resize_", "set_", "is_pinned", "_local_scalar_dense", "_assert_async", "_reshape_alias", "alias",
    "is_same_size", "_has_compatible_shallow_copy_type", "_fused_sdp_choice", "sym_size", "equal",
}  # fmt: skip
WRITES_ONLY = {"copy_", "fill_", "zero_", "resize_", "uniform_", "normal_"}  # do not read the tensor that they change
GATHERS = {"index", "gather", "index_select", "embedding"}
SCATTERS = {"index_put_", "index_put", "_index_put_impl_", "index_add_", "index_add", "scatter_add_"}

# Kernels per operation where it is not one, as torch 2.11 launches them. A reduction over many values also clears its
# semaphores. cuDNN's own helpers are not known and not counted.
LAUNCHES = {
    "convolution_backward": 2,
    "native_layer_norm_backward": 2,
    "native_batch_norm": 4,
    "native_batch_norm_backward": 3,
    "repeat_interleave": 3,
    "slice_backward": 2,
    "select_backward": 2,
    "masked_fill": 2,
    "segment_reduce": 2,
    "match_nuclei_padded": 8,
    "upsample_bilinear2d_backward": 2,
    "cumsum": 2,
    "nonzero": 3,
}
SMALL_SORT = 4096  # values along a dimension that one kernel sorts, after two that fill its results
# Tensors and chunks of 64 Ki values that one launch of a multi-tensor kernel takes, by the number of lists.
TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNKS_OF_A_LAUNCH, CHUNK = 320, 65536


def multi_tensor_launches(sizes: Sequence[int], lists: int) -> int:
    """Launches of a ``_foreach`` or fused operation over tensors of these sizes, by torch's ``multi_tensor_apply``."""
    launches = tensors = chunks = 0
    for size in sizes:
        tensors += 1
        of_tensor = math.ceil(size / CHUNK)
        for chunk in range(1, of_tensor + 1):
            chunks += 1
            last = chunk == of_tensor
            if chunks == CHUNKS_OF_A_LAUNCH or (last and tensors == TENSORS_OF_A_LAUNCH[lists]):
                launches, chunks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (chunks > 0)


class Work(NamedTuple):
    bytes: float
    flops: float


def _attention(a: dict[str, Any]) -> Work:
    """``attend_kernel``: logits of all rows, and the mean of the values."""
    keys = a["keys"]
    return Work(_dense(a["queries"], keys, a["sums"]), 4.0 * len(a["queries"]) * keys.numel())


def _prototype_gradient(a: dict[str, Any]) -> Work:
    rows = len(a["student_z"]) + len(a["teacher_z"])
    tensors = a["student_z"], a["student_W"], a["teacher_z"], a["teacher_W"], a["gradient"]
    return Work(_dense(*tensors), 4.0 * rows * a["student_W"].numel())


def _projection(products: int) -> Callable[[dict[str, Any]], Work]:
    def work(a: dict[str, Any]) -> Work:
        x, weight = a["x"], a["weight"]
        written = _dense(a["x_gradient"]) if "x_gradient" in a else 0
        return Work(_dense(x) + written, 2.0 * products * x.numel() * len(weight))

    return work


def _sampling(a: dict[str, Any]) -> Work:
    """``sample_kernel``: on average 6 of a level's pixels per point."""
    return Work(7 * _dense(a["rows"]), 0.0)


FORMULAS = flop_registry | {torch.ops.aten._addmm_activation: flop_registry[torch.ops.aten.addmm]}
KERNELS: dict[str, Callable[[dict[str, Any]], Work]] = {
    "attend_kernel": _attention,
    "prototype_gradient_kernel": _prototype_gradient,
    "run_stats_kernel": _projection(1),
    "x_gradient_kernel": _projection(2),
    "weight_gradient_kernel": _projection(2),
    "sample_kernel": _sampling,
}


@dataclass
class Row:
    """All operations of a kind."""

    calls: int = 0
    launches: int = 0
    replayed: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RATES, 0.0))


Rows = dict[str, Row]


class Counts:
    """The `bench.plan.standin.Meter` of a step.

    Attributes:
        launched_at: launches by the host, by the project's line that asks for them and by operation.
    """

    def __init__(self) -> None:
        self.rows: Rows = defaultdict(Row)
        self.copies: list[Copy] = []
        self.waits: Counter[str] = Counter()
        self.launched_at: Counter[tuple[str, str]] = Counter()
        self._live = self._peak = self._live_in_graphs = self._peak_in_graphs = 0
        self._recording = False
        self._storages: Any = WeakIdKeyDictionary()

    def clear(self) -> None:
        """Begin a step: forget all but what is live."""
        self.rows.clear()
        self.copies.clear()
        self.waits.clear()
        self.launched_at.clear()
        self._peak = self._live

    @property
    def held(self) -> int:
        """Bytes in use. The memory of graphs, which they share, is theirs for ever."""
        return self._live + self._peak_in_graphs

    @property
    def peak(self) -> int:
        return self._peak + self._peak_in_graphs

    @contextmanager
    def record(self) -> Iterator[Rows]:
        others, self.rows, self._recording = self.rows, defaultdict(Row), True
        try:
            yield self.rows
        finally:
            self.rows, self._recording = others, False

    def replay(self, graph: Rows) -> None:
        self._add("CUDA graph", 1, 0.0, 0.0, single=False)
        for label, of_graph in graph.items():
            row = self.rows[label]
            row.calls += of_graph.calls
            row.replayed += of_graph.launches
            row.bytes += of_graph.bytes
            row.flops += of_graph.flops
            for gpu, seconds in of_graph.seconds.items():
                row.seconds[gpu] += seconds

    def operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        name = func._overloadpacket.__name__
        for tensor in _tensors(out):
            self._hold(tensor)
        if name in FREE or func.is_view:
            return
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if name == "expand_as" or not (inputs or outputs):
            return
        flops = 0.0
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            flops = float(formula(*args, **kwargs, out_val=out))
        first = next((t for t in inputs if t.dim() > 1), None)
        single = first is not None and first.dtype == torch.float32
        label = f"{name} {_dtype(inputs[0] if inputs else outputs[0])}"
        self._add(label, launches_of(name, args, inputs), bytes_of(func, name, args, inputs, outputs), flops, single)

    def kernel(self, name: str, arguments: dict[str, Any]) -> None:
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        work = KERNELS[name](arguments) if name in KERNELS else Work(_dense(*tensors), 0.0)
        self._add(f"{name} (Triton)", 1, work.bytes, work.flops, tensors[0].dtype == torch.float32)

    def copy(self, copy: Copy) -> None:
        self.copies.append(copy)
        if copy.waits:
            self.wait("copy", copy.place)

    def wait(self, what: str, place: str) -> None:
        self.waits[f"{what} at {place}"] += 1

    def _add(self, label: str, launches: int, size: float, flops: float, single: bool) -> None:
        row = self.rows[label]
        row.calls += 1
        row.launches += launches
        row.bytes += size
        row.flops += flops
        if launches and not self._recording:
            self.launched_at[place(), label] += launches
        for gpu, rates in RATES.items():
            ideal = max(flops / (rates.fp32 if single else rates.bf16), size / rates.copy)
            row.seconds[gpu] += max(ideal, launches * SMALL_KERNEL)

    def _hold(self, tensor: Tensor) -> None:
        """Count the memory of a new tensor until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        size = -(-storage.nbytes() // 512) * 512
        self._storages[storage] = _Held(self, size, self._recording)
        self.change(size, self._recording)

    def change(self, size: int, in_graphs: bool) -> None:
        """Take or free memory."""
        if in_graphs:
            self._live_in_graphs += size
            self._peak_in_graphs = max(self._peak_in_graphs, self._live_in_graphs)
        else:
            self._live += size
            self._peak = max(self._peak, self._live)


class _Held:
    """Lives as long as a storage."""

    def __init__(self, counts: Counts, size: int, in_graphs: bool) -> None:
        self.counts, self.size, self.in_graphs = counts, size, in_graphs

    def __del__(self) -> None:
        self.counts.change(-self.size, self.in_graphs)


def bytes_of(func: Any, name: str, args: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Bytes that an operation reads and writes."""
    if name in GATHERS:
        return 2 * _dense(*outputs)
    if name in SCATTERS:
        return 2 * _dense(*_tensors(args[2:])) + _dense(*_tensors(args[1]))
    changed = [
        tensor
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        if argument.name != "grads"  # of fused optimisers, which only unscaling changes
        for tensor in _tensors(value)
    ]
    written = changed or outputs
    return _dense(*inputs) + _dense(*written) - (_dense(*changed) if name in WRITES_ONLY else 0)


def launches_of(name: str, args: Sequence[Any], inputs: Sequence[Tensor]) -> int:
    if name.startswith(("_foreach", "_fused")) and isinstance(args[0], (list, tuple)):
        sizes = [tensor.numel() for tensor in args[0]]
        if name == "_foreach_lerp_" and isinstance(args[2], (list, tuple)):
            return len(sizes)  # weights of another shape: tensor by tensor
        lists = sum(isinstance(a, (list, tuple)) and len(a) == len(sizes) for a in args)
        return multi_tensor_launches(sizes, min(lists, 5)) + 2 * (name == "_foreach_norm")
    if name == "sort":
        return 3 if inputs[0].shape[-1] <= SMALL_SORT else 7 + inputs[0].itemsize  # a pass for each byte of a key
    if name in ("sum", "mean") and inputs[0].numel() > 1 << 16:
        return 2
    return LAUNCHES.get(name, 1)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors on the device."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == "cuda"]


def _dense(*tensors: Tensor) -> float:
    return float(sum(_size(tensor) for tensor in tensors))


def _size(tensor: Tensor) -> int:
    shape = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(shape) * tensor.itemsize


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f").replace("int", "i")
