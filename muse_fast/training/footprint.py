"""The memory of a training step, counted before it runs.

The step itself runs on tensors that have shapes, dtypes and devices but no data (torch's FakeTensor). So the count
knows which kernels torch chooses, what autograd keeps and for how long, and what is computed again. It does not know
what kernels take besides their results, such as workspaces of convolutions, nor fragmentation.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from muse_fast.models.backbone import WithBackbone
from muse_fast.runtime import kept
from muse_fast.runtime.device import available_memory
from muse_fast.runtime.distributed import alone, local_world_size

WEIGHTS, GRADIENTS, OPTIMISER, GATHERED = "weights", "gradients", "optimiser", "gathered weights"
LOSSES, BACKWARD = "losses and inputs", "backward"
BLOCK = 512  # bytes; torch's allocator on a GPU rounds up to it
PER_PIXEL = 16 << 10  # bytes

# Kinds of modules by their names in a network, the first that fits: those of timm, and of the decoder.
_KINDS = (
    ("decoder", r"^backbone\.decoder\b"),
    ("heads", r"^(?!backbone\b)"),
    ("patch embedding", r"\.patch_embed\b"),
    ("attention", r"\.attn\b"),
    ("MLP", r"\.mlp\b"),
    ("norms", r"\.norm\w*$"),
    ("encoder, other", ""),
)

_Network = TypeVar("_Network", bound=nn.Module)


class Footprint(NamedTuple):
    """Bytes of a step at its peak, by kind: what modules made in the forward (also again, in the backward), the state,
    and the rest."""

    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        ranked = sorted(self.kinds.items(), key=lambda item: -item[1])
        return ", ".join(f"{kind} {gib(size)}" for kind, size in ranked if 100 * size >= self.total)


class LiveBytes:
    """Counts the bytes of living storages, by kind.

    Attributes:
        now: bytes by kind.
        peak: the same, when their sum was largest since it was last `reset`.
    """

    def __init__(self) -> None:
        self.now, self.peak = Counter[str](), Counter[str]()
        self._total = self._most = 0
        self._added = self._added_at_peak = 0  # storages so far
        self._held: Any = WeakIdKeyDictionary()

    def hold(self, tensor: Tensor, kind: str = "") -> None:
        """Count the storage of ``tensor`` until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage in self._held:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._added += 1
        self._held[storage] = _Held(self, self._added, size, kind)
        self.now[kind] += size
        self._total += size
        if self._total > self._most:
            self.reset()

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Count the storage of ``tensor`` as ``kind``, also in the peak if it was there."""
        self.hold(tensor, kind)
        held = self._held[tensor.untyped_storage()]
        for counter in (self.now, self.peak) if held.number <= self._added_at_peak else (self.now,):
            counter[held.kind] -= held.size
            counter[kind] += held.size
        held.kind = kind

    def reset(self) -> None:
        self.peak, self._most, self._added_at_peak = Counter(self.now), self._total, self._added

    def free(self, size: int, kind: str) -> None:
        self.now[kind] -= size
        self._total -= size


class _Held:
    """Lives as long as a storage."""

    def __init__(self, live: LiveBytes, number: int, size: int, kind: str) -> None:
        self.live, self.number, self.size, self.kind = live, number, size, kind

    def __del__(self) -> None:
        self.live.free(self.size, self.kind)


class Meter(TorchDispatchMode):
    """Counts the tensors that operations make on a device, by the kind of the module that runs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and leaving the compiler out at every operation takes time

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.live, self._device = LiveBytes(), device.type
        self._running: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # most calls, and the answer is at hand
            return args[0].device
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == self._device:
                self.live.hold(tensor, self._kind())
        return out

    def _kind(self) -> str:
        if self._running:
            return self._running[-1]
        return LOSSES if torch._C._current_graph_task_id() == -1 else BACKWARD

    def watch(self, network: nn.Module) -> None:
        """Know the weights, gradients and modules of ``network``."""
        for tensor in (*network.parameters(), *network.buffers()):
            self.live.rename(tensor, WEIGHTS)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._keep_gradient)
        for name, module in network.named_modules():
            kind = kind_of(name)
            module.register_forward_pre_hook(lambda *_, kind=kind: self._running.append(kind))
            module.register_forward_hook(self._leave, always_call=True)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def _keep_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.live.rename(parameter.grad, GRADIENTS)


def kind_of(name: str) -> str:
    """The kind of a module, by its name in a network with a ``backbone``; the network's own is ``heads``."""
    return next(kind for kind, pattern in _KINDS if re.search(pattern, name))


@contextmanager
def dry(device: torch.device) -> Iterator[Meter]:
    """In the body, torch computes shapes and no values, of tensors that may be too large for this machine.

    No rank exchanges anything with another. Reading a value on the host, such as an item of a tensor, is an error.
    """
    meter = Meter(device)
    try:
        with alone(), FakeTensorMode(allow_non_fake_inputs=True), meter:
            yield meter
    finally:
        kept.forget()


def copy_of(network: _Network, device: torch.device, dtype: torch.dtype) -> _Network:
    """Inside `dry`, copy ``network`` to a device and a floating dtype, without its values."""
    copies: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        own = dtype if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=own, device=device)
        is_weight = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
    copied: Any = copy.deepcopy(network, copies)
    copied.to = lambda *_: copied  # torch cannot move weights without values, which are where they should be
    return copied


def count(meter: Meter, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> Footprint:
    """Count a ``step``, as if the optimiser, which creates its state in the first one, had it already."""
    before_update: list[Mapping[str, int]] = []
    optimizer.register_step_pre_hook(lambda *_: before_update.append(meter.live.peak))
    meter.live.reset()
    step()
    for tensor in tree_leaves([*optimizer.state.values()]):
        if isinstance(tensor, FakeTensor):
            meter.live.rename(tensor, OPTIMISER)
    state = {OPTIMISER: meter.live.now[OPTIMISER]}
    # The update itself makes nothing else.
    both = [Footprint({**+Counter(kinds), **state}) for kinds in (before_update[0], meter.live.now)]
    return max(both, key=lambda one: one.total)


def on_a_rank(one: Footprint, engine: str, ranks: int, network: WithBackbone) -> Footprint:
    """What `count` found for ``one`` rank by itself, on one of several.

    DDP keeps buckets for all gradients. FSDP keeps a share of the state; besides, the weights of the unit that runs and
    of the next are gathered, and the gradient of one is whole.
    """
    if ranks == 1:
        return one
    weights = _bytes_of(network)
    if engine == "ddp":
        return Footprint({**one.kinds, GRADIENTS: weights})
    backbone = network.backbone
    units = [_bytes_of(unit) for unit in (*backbone.encoder.layers, backbone.decoder, *network.heads.values())]
    largest = max(*units, weights - sum(units))
    state = {kind: -(-one.kinds.get(kind, 0) // ranks) for kind in (WEIGHTS, OPTIMISER)}
    return Footprint({**one.kinds, **state, GRADIENTS: -(-weights // ranks), GATHERED: 3 * largest})


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def at_most(network: nn.Module, pixels: int) -> int:
    """A generous bound for what a step takes, which costs no time: weights, gradients and state in float32, and what no
    network here needs per pixel of its images (a ViT-B and a ResNet-50 keep 4 KiB).
    """
    return 16 * sum(parameter.numel() for parameter in network.parameters()) + pixels * PER_PIXEL


def room_on(device: torch.device) -> int:
    """Bytes that a rank can take on ``device``: all of a GPU, a rank's share of the host's available memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return available_memory() // local_world_size()


def refusal(own: Footprint, room: int, device: torch.device, changes: Iterable[tuple[str, Footprint]]) -> str:
    """Why a step cannot run, and the first of ``changes`` of the settings with which it can.

    Args:
        room: bytes that a rank can take on ``device``.
        changes: settings, and what a step needs with them.
    """
    said = f"a step needs {gib(own.total)} GiB at its peak ({own}), and {device} has {gib(room)} GiB"
    tried = ""
    for settings, needed in changes:
        if needed.total <= room:
            return f"{said}; it fits with {settings} ({gib(needed.total)} GiB)"
        tried = f"; even {settings} needs {gib(needed.total)} GiB"
    return f"{said}{tried}; train on smaller images or a smaller network"


def gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
