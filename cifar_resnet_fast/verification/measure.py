"""How a time is taken, and what the card at hand reaches (layer 4).

On a GPU the calls run inside a CUDA graph, each on its own copy of inputs and results, enough
copies that none is still in the L2 cache when its turn comes again; a sample is one replay, timed
by events and divided by its calls. On a CPU a sample is one call. Reported are median and 20 and
80 % quantiles after a warm-up.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cifar_resnet_fast.verification.budget import MEASURES, WrongResult

Call = Callable[[], object]

_MAX_COPIES = 64
_CALLS_IN_GRAPH = 10  # at least, so that a replay is long beside what an event resolves
_MIN_SAMPLES, _MAX_SAMPLES = 5, 500


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 20 % and 80 % quantile; of how many samples, taken how."""

    median: float
    low: float
    high: float
    samples: int
    method: str
    peak_mib: float | None  # memory allocated above what was there before; None on a CPU


def time_calls(
    prepare: Callable[[int], Call],
    device: torch.device,
    *,
    input_bytes: int,
    seconds: float,
    graph: bool = True,
) -> Timing:
    """Time the calls that ``prepare`` makes.

    Args:
        prepare: makes the call that works on copy i of its inputs; runs on the timed stream
        device: where the calls run
        input_bytes: that a call moves, to know how many copies fill the L2 cache three times; a
            call that moves more itself has one
        seconds: about how long to sample
        graph: False times calls one after the other, for those that cannot be captured or that
            replay a graph of their own
    """
    if device.type != "cuda":
        call = prepare(0)
        call()
        return _summary(_sample_cpu(call, seconds), "clock", None)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(_MAX_COPIES, -(-3 * cache // max(input_bytes, 1)))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls = [prepare(copy) for copy in range(copies)]
        for call in calls[:1] * 2 + calls:  # compiles, chooses algorithms, fills the allocator
            call()
        stream.synchronize()
        with peak_memory(device) as peak:
            calls[0]()
        rounds = max(1, -(-_CALLS_IN_GRAPH // copies)) if graph else 1
        results: list[object] = [None] * copies  # kept, or all would be written to the same place

        def all_calls():
            for _ in range(rounds):
                for copy, call in enumerate(calls):
                    results[copy] = call()

        run, method = all_calls, "events"
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                all_calls()
            run, method = captured.replay, "graph"
        samples = _sample_cuda(run, stream, seconds)
    torch.cuda.current_stream(device).wait_stream(stream)
    each = rounds * copies
    return _summary([sample / each for sample in samples], method, peak.mib)


def _sample_cpu(call: Call, seconds: float) -> list[float]:
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < _MIN_SAMPLES or (
        len(samples) < _MAX_SAMPLES and time.perf_counter() - began < seconds
    ):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def _sample_cuda(run: Call, stream: torch.cuda.Stream, seconds: float) -> list[float]:
    def timed(count: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record(stream)
        for mark in marks[1:]:
            run()
            mark.record(stream)
        stream.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in zip(marks, marks[1:], strict=False)]

    estimate = statistics.median(timed(_MIN_SAMPLES))
    count = int(seconds / max(estimate, 1e-7))
    return timed(min(max(count, _MIN_SAMPLES), _MAX_SAMPLES))


class peak_memory:
    """After it ``mib`` is the most memory that was allocated within, above what was before; None
    on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.mib: float | None = None

    def __enter__(self) -> "peak_memory":
        if self.device.type == "cuda":
            self.before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) - self.before
            self.mib = round(peak / 2**20, 1)


def _summary(samples: list[float], method: str, peak_mib: float | None) -> Timing:
    low, high = quantiles(samples)
    return Timing(statistics.median(samples), low, high, len(samples), method, peak_mib)


def quantiles(samples: list[float]) -> tuple[float, float]:
    """20 % and 80 % quantile of at least two samples."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], fifths[-1]


# --- what the card at hand can do ---------------------------------------------------------------


def copy_bandwidth(device: torch.device, seconds: float, size: int | None = None) -> float:
    """Bytes/s, read plus written, of the faster of two copies: the driver's and a kernel's.

    Copies of 1 GiB in a CUDA graph reached 2.7 TB/s on an H200 where a copy of 8.6 GB in all
    reached 4.3. Warming the card up first changed nothing. Suspected, but not yet measured, is
    that a graph leaves the driver's copies to another engine; so none is in a graph here.

    Args:
        seconds: about how long to sample
        size: bytes to copy; None for 4 GiB, or on a GPU a quarter of the free memory if that is
            less, and on a CPU 64 MiB

    Raises:
        WrongResult: a copy differs
    """
    source = torch.arange((size or _copied_bytes(device)) // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = {
        "the driver's": lambda: target.copy_(source),
        "a kernel's": lambda: torch.add(source, 0, out=target),
    }
    found = []
    for name, copy in ways.items():
        target.zero_()
        copy()
        if not torch.equal(source, target):
            raise WrongResult(f"copy, {name}: what arrived differs from what was sent")
        found.append(_seconds_each(copy, device, seconds))
    return 2 * source.nbytes / min(found)


def _copied_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**26
    free, _ = torch.cuda.mem_get_info(device)
    return min(2**32, free // 4)


def _seconds_each(call: Call, device: torch.device, seconds: float) -> float:
    """Seconds a call, on a GPU of many between two events, so that launches cost nothing."""
    if device.type != "cuda":
        return statistics.median(_sample_cpu(call, seconds))
    stream = torch.cuda.current_stream(device)

    def timed(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        for _ in range(count):
            call()
        end.record(stream)
        stream.synchronize()
        return begin.elapsed_time(end) * 1e-3 / count

    count = int(seconds / _MIN_SAMPLES / timed(_CALLS_IN_GRAPH))
    return statistics.median(timed(max(count, _CALLS_IN_GRAPH)) for _ in range(_MIN_SAMPLES))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """FLOP/s of a ``size`` cubed matrix product: what PyTorch's own library reaches.

    float32 runs without TF32, as the package's own float32 does.

    Raises:
        WrongResult: the product's first rows are off
    """
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    product, exact = (a @ b)[:16].double(), a[:16].double() @ b.double()
    # rounding of the result, and of the sums in float32
    norm = MEASURES["norm"]
    error, allowed = norm(product - exact), (torch.finfo(dtype).eps + 1e-4) * norm(exact)
    if not error <= allowed:
        raise WrongResult(
            f"matmul: norm of the error must be at most {allowed:.3g}, got {error:.3g}"
        )
    timing = time_calls(
        lambda _: lambda: torch.mm(a, b), device, input_bytes=3 * a.nbytes, seconds=seconds
    )
    return 2 * size**3 / timing.median
