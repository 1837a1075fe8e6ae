"""CUDA graphs: the part of a step whose shapes never change is recorded once, with its backward, and then replayed.

A step launches thousands of kernels, and the host may need longer to launch them than a GPU to run them. A replay is a
single launch. It reads and writes the memory of the recording: inputs are copied into it, and outputs stay valid until
the next replay. Gradients of parameters are put into ``grad`` as autograd would, so optimisers, clipping and
micro-batches need not know. The same kernels run in the same order, so results do not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from muse_fast.errors import UserError
from muse_fast.runtime.distributed import world_size
from muse_fast.runtime.options import AUTO, Switch

Work = Callable[[], list[Tensor]]
Key = tuple[Any, ...]


def why_not(device: torch.device) -> str | None:
    """Why this run cannot replay CUDA graphs, or None if it can."""
    if device.type != "cuda":
        return f"they need a CUDA GPU, and the run is on {device.type}"
    if world_size() > 1:
        return f"{world_size()} ranks exchange BatchNorm's statistics in the middle of what would be recorded"
    return None


class Choice(NamedTuple):
    """How ``train.cuda_graph`` was decided."""

    on: bool
    required: bool  # a recording that fails ends the run
    reason: str = ""  # of ``auto``

    def __str__(self) -> str:
        return f"CUDA graphs {'on' if self.on else 'off'}" + (f": {self.reason}" if self.reason else "")


def choose(asked: Switch, device: torch.device) -> Choice:
    """Decide about CUDA graphs.

    Raises:
        UserError: they are asked for and cannot run.
    """
    reason = why_not(device) if asked else None
    if asked == AUTO:
        return Choice(reason is None, False, reason or "")
    if reason is not None:
        raise UserError(f"train.cuda_graph=true cannot run: {reason}; use auto or false")
    return Choice(bool(asked), bool(asked))


class Recorder(Protocol):
    """Records work on a device."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Run ``work`` as it will be recorded, so that libraries are ready."""

    def record(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        """Run ``work`` and record it; return its results, and a function that computes them again in place from the
        current values of its inputs."""


class CudaRecorder:
    """Records on a stream of its own. All recordings share their memory, so they must be replayed in the order in which
    they were recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Any]) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            # The loader's threads may allocate pinned memory meanwhile, hence not "global".
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = work()
        except RuntimeError:
            # torch does not undo these if a recording fails.
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)
            raise
        return results, graph.replay


class Graphed:
    """A function that is recorded once it has been called with inputs of the same shapes, and then replayed.

    The first call shows in which memory order gradients come. Inputs of other shapes are computed as usual.

    Args:
        function: of tensors, None, and sequences of these, to the same. The shapes of its results must follow from
            those of its inputs, and everything that changes between calls must be an input, a parameter or a buffer of
            ``module``. Inputs get no gradients.
        module: whose parameters get gradients, in the mode in which it is always called.
        after: calls that are computed as usual first. At the one after them, nothing may still refer to the autograd
            graph of an earlier one, whose nodes belong to another stream.
        required: whether a recording that fails is an error; otherwise calls are computed as usual from then on.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        recorder: Recorder,
        *,
        after: int = 1,
        required: bool = False,
    ) -> None:
        self.function, self.after, self.required = function, after, required
        self._recorder: Recorder | None = recorder
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._buffers = list(module.buffers())
        self.reset()

    def reset(self) -> None:
        """Forget the recording, for example because other parameters will get gradients."""
        self._key: Key | None = None
        self._calls = 0
        self._recording: _Recording | None = None
        self._orders: dict[int, tuple[int, ...]] = {}  # strides of the gradients of the results

    @property
    def is_recorded(self) -> bool:
        return self._recording is not None

    def __call__(self, *inputs: Any) -> Any:
        leaves, spec = tree_flatten(inputs)
        key = (torch.is_grad_enabled(), *map(_describe, leaves))
        if self._recorder is None or (self._key is not None and key != self._key):
            return self.function(*inputs)
        self._key, self._calls = key, self._calls + 1
        if self._calls <= self.after:
            return self._noting_orders(self.function(*inputs))
        if self._recording is None and not self._record(leaves, spec):
            return self.function(*inputs)
        assert self._recording is not None
        return self._recording(leaves)

    def _noting_orders(self, results: Any) -> Any:
        for number, tensor in enumerate(tree_flatten(results)[0]):
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(partial(self._note_order, number))
        return results

    def _note_order(self, number: int, gradient: Tensor) -> None:
        self._orders[number] = gradient.stride()

    def _record(self, leaves: list[Any], spec: Any) -> bool:
        assert self._recorder is not None
        before = [buffer.clone() for buffer in self._buffers]
        try:
            self._recording = _Recording(self.function, leaves, spec, self._parameters, self._orders, self._recorder)
        except RuntimeError as error:
            why = str(error).strip().partition("\n")[0]
            if self.required:
                raise UserError(f"train.cuda_graph=true: recording failed ({why}); use auto or false") from error
            print(f"  note   CUDA graphs off: recording failed ({why})")
            self._recorder = None
        finally:
            with torch.no_grad():
                copy(self._buffers, before)
        return self._recording is not None


class _Recording:
    """A function and its backward as they were recorded, over memory of their own."""

    def __init__(
        self,
        function: Callable[..., Any],
        leaves: Sequence[Any],
        spec: Any,
        parameters: Sequence[nn.Parameter],
        orders: dict[int, tuple[int, ...]],
        recorder: Recorder,
    ) -> None:
        self._function, self._input_spec = function, spec
        self._inputs = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        self._live: list[Tensor] = []  # results as computed last, with their autograd graph
        recorder.warm_up(lambda: self._warm_up(parameters, orders))
        self._results, self._replay = recorder.record(self._forward)
        self._replay_backward = recorder.record(self._backward)[1] if self._trained else None
        self._live = []
        self._sums: list[Tensor] = []
        self._anchor = torch.zeros((), device=self._results[0].device, requires_grad=True)

    def __call__(self, leaves: Sequence[Any]) -> Any:
        pairs = [pair for pair in zip(self._inputs, leaves, strict=True) if isinstance(pair[0], Tensor)]
        copy(*map(list, zip(*pairs, strict=True)))
        self._replay()
        results = self._results if self._replay_backward is None else _Replayed.apply(self, self._anchor)
        return tree_unflatten(list(results), self._spec)

    def _warm_up(self, parameters: Sequence[nn.Parameter], orders: dict[int, tuple[int, ...]]) -> None:
        """Run both directions, and find which results and parameters have gradients."""
        self._trained: list[nn.Parameter] = []
        self._gradients: list[Tensor] = []
        self._forward()
        self._has_gradient = [x.requires_grad and torch.is_grad_enabled() for x in self._live]
        self._seeds = [
            _zeros(x, orders.get(number)) for number, x in enumerate(self._live) if self._has_gradient[number]
        ]
        if not self._seeds:
            self._live = []
            return
        found = self._differentiate(parameters)
        self._trained = [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]
        self._gradients = [torch.zeros_like(p) for p in self._trained]
        self._live = []

    def _forward(self) -> list[Tensor]:
        torch.clear_autocast_cache()  # of weights cast outside, whose memory will be used otherwise
        self._live, self._spec = tree_flatten(self._function(*tree_unflatten(self._inputs, self._input_spec)))
        torch.clear_autocast_cache()
        return [x.detach() for x in self._live]

    def _backward(self) -> list[Tensor]:
        gradients = self._differentiate(self._trained)
        with torch.no_grad():
            copy(self._gradients, [gradient for gradient in gradients if gradient is not None])
        return []

    def _differentiate(self, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
        roots = [x for x, has in zip(self._live, self._has_gradient, strict=True) if has]
        with torch.autocast(roots[0].device.type, enabled=False):  # as in a backward, which is called outside of it
            return torch.autograd.grad(roots, list(parameters), self._seeds, allow_unused=True)

    def results(self) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The results as tensors that autograd may attach to, and those of them without a gradient."""
        results = tuple(x.detach() for x in self._results)
        return results, [x for x, has in zip(results, self._has_gradient, strict=True) if not has]

    def backward(self, given: Sequence[Tensor | None]) -> None:
        """Add the gradients of the parameters to their ``grad``, for the gradients of the results."""
        of_roots = [gradient for gradient, has in zip(given, self._has_gradient, strict=True) if has]
        copy(self._seeds, [torch.zeros_like(s) if g is None else g for s, g in zip(self._seeds, of_roots, strict=True)])
        self._keep_sums()
        assert self._replay_backward is not None
        self._replay_backward()
        totals, further = [], []
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                totals.append(parameter.grad)
                further.append(gradient)
        if totals:
            torch._foreach_add_(totals, further)

    def _keep_sums(self) -> None:
        """Move gradients of earlier micro-batches to where a replay does not overwrite them."""
        if not any(p.grad is gradient for p, gradient in zip(self._trained, self._gradients, strict=True)):
            return
        self._sums = self._sums or [torch.empty_like(gradient) for gradient in self._gradients]
        copy(self._sums, self._gradients)
        for parameter, gradient, total in zip(self._trained, self._gradients, self._sums, strict=True):
            if parameter.grad is gradient:
                parameter.grad = total


class _Replayed(torch.autograd.Function):
    """Gives the results of a replay a backward, which is another replay."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.set_materialize_grads(False)
        results, without_gradient = recording.results()
        ctx.mark_non_differentiable(*without_gradient)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        ctx.recording.backward(gradients)
        return None, None


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors in place, in few launches: those of one dtype together."""
    by_dtype = defaultdict[torch.dtype, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        of_dtype = by_dtype[target.dtype]
        of_dtype[0].append(target)
        of_dtype[1].append(source)
    for some, their_sources in by_dtype.values():
        torch._foreach_copy_(some, their_sources)


def _zeros(like: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """Zeros of the shape of ``like``, with the strides ``order`` if they are dense."""
    if order is not None:
        zeros = like.new_empty_strided(like.shape, order).zero_()
        if zeros.untyped_storage().nbytes() == zeros.numel() * zeros.itemsize:
            return zeros
    return torch.zeros_like(like)


def _describe(leaf: Any) -> Any:
    """What a recording depends on, of a tensor: all but its values."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
