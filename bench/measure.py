"""Measure the results of a version, their error, its time and its memory."""

from __future__ import annotations

import functools
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

REPEATS = 20
MIN_REPEATS = 3
SECONDS_PER_VERSION = 1.5  # a version stops after this time if it has MIN_REPEATS
CACHE_BYTES = 256 * 2**20  # more than the cache of any supported GPU
HEAD_START_CYCLES = 20_000_000  # about 10 ms of any supported GPU, more than launching one op takes the host

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler logs an error if there is no GPU

Call = Callable[..., Any]


def evaluate(call: Call, arguments: Sequence[Any]) -> list[Tensor]:
    """Return the results, then the gradients of all arguments that require one, given fixed output gradients."""
    result = call(*arguments)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    leaves = [tensor for tensor in tensors_of(arguments) if tensor.requires_grad]
    if not leaves:
        return outputs
    differentiable = [output for output in outputs if output.requires_grad]
    given = [output_gradient(output.shape, output.dtype, output.device) for output in differentiable]
    return [output.detach() for output in outputs] + list(torch.autograd.grad(differentiable, leaves, given))


@functools.lru_cache(maxsize=8)
def output_gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return multiples of 1/64 from 0.5 to 1.5, exact in every dtype. Cached, so that creating it is not timed."""
    return (torch.arange(math.prod(shape), device=device) % 65 / 64 + 0.5).to(dtype).view(shape)


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative L2 distance; infinite for NaN, or if shapes, integers or the result count differ."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in expected]:
        return math.inf
    return max((distance(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)


def distance(got: Tensor, expected: Tensor) -> float:
    if not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(got.long(), expected.long()) else math.inf
    exact = expected.double()
    relative = (got.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    return relative.nan_to_num(nan=math.inf).item()


def interleaved(calls: dict[str, Call], arguments: Sequence[Any], device: str) -> dict[str, list[float]]:
    """Time forward and backward in milliseconds, alternating the versions so that drift affects them equally."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            if len(times[name]) < MIN_REPEATS or sum(times[name]) < SECONDS_PER_VERSION * 1e3:
                times[name].append(milliseconds(functools.partial(evaluate, call, arguments), device))
    return times


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """Time one call. On CUDA with events and a cold cache.

    The GPU first waits about 10 ms, in which the host queues all launches, so that the events bound the time of the GPU
    alone. Without that, an op of many small kernels would take as long as the host needs to launch them.
    """
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(CACHE_BYTES, dtype=torch.int8, device=device).zero_()
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def spent_milliseconds(call: Callable[[], object], on_gpu: bool) -> float:
    """Return the CPU time of this process, or wall time for a call on the GPU."""
    if not on_gpu:
        begin = time.process_time()
        call()
        return (time.process_time() - begin) * 1e3
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return the report's summary of times in milliseconds."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    p20, median, p80 = (deciles[place] for place in (1, 4, 7))
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "repeats": len(times)}


def extra_memory(call: Call, arguments: Sequence[Any], device: str) -> int:
    """Return the peak of one warm run above what is allocated after it, in bytes, excluding inputs and results.

    Memory that is freed before the gradients are allocated may not show. On the CPU this counts all allocations through
    torch, including those of C++ ops, but not direct calls of malloc, nor the workspaces of MKL and oneDNN.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        results = evaluate(call, arguments)
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    else:
        with profiled_memory() as profile:
            results = evaluate(call, arguments)
        held = peak = 0
        for _, change in sorted(allocations(profile)):
            held += change
            peak = max(peak, held)
        extra = peak - held
    del results  # alive until here, so that they count as allocated after the run
    return extra


def held_and_peak(prepare: Callable[[], Any], run: Callable[[], Any], device: str) -> tuple[int, int]:
    """Return the bytes allocated after ``prepare()``, and the peak during ``run()`` after it, including those.

    On the CPU this counts all allocations through torch, like `extra_memory`. On CUDA the memory of CUDA graphs counts
    for the peak, though a replay allocates nothing.
    """
    if device == "cuda":
        before, of_others = torch.cuda.memory_allocated(), free_for_replays()
        prepare()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return held - before, torch.cuda.max_memory_allocated() + free_for_replays() - of_others - before
    with profiled_memory() as profile:
        prepare()
        with torch.autograd.profiler.record_function("run"):
            run()
    start = next(event.start_ns() for event in profile.kineto_results.events() if event.name() == "run")
    changes = sorted(allocations(profile))
    held = peak = sum(change for when, change in changes if when < start)
    total = held
    for when, change in changes:
        if when >= start:
            total += change
            peak = max(peak, total)
    return held, peak


def free_for_replays() -> int:
    """Return the bytes in the pools of CUDA graphs that no tensor has, but that their replays write."""
    pools = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in pools)


def profiled_memory() -> torch.autograd.profiler.profile:
    """A profile of allocations on the CPU. Earlier garbage is freed first, as it would count as freed by the work."""
    gc.collect()
    return torch.autograd.profiler.profile(profile_memory=True)


def allocations(profile: torch.autograd.profiler.profile) -> list[tuple[int, int]]:
    """Return the time and bytes of every allocation; negative bytes are freed."""
    events: Any = profile.kineto_results.events()  # type: ignore[union-attr] # there are results after the profile
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among the arguments in order, including those in lists."""
    flat = [argument if isinstance(argument, list) else [argument] for argument in arguments]
    return [item for items in flat for item in items if isinstance(item, Tensor)]
