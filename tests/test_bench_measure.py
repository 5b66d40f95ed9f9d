"""What must be right before a time is taken, and the time itself, on a CPU."""

import time
from types import SimpleNamespace

import pytest
import torch

from cifar_resnet_fast.verification import measure
from cifar_resnet_fast.verification.budget import WrongResult, check
from cifar_resnet_fast.verification.measure import (
    copy_bandwidth,
    matmul_rate,
    quantiles,
    time_calls,
)

CPU = torch.device("cpu")


def results(dtype):
    """The same sums in ``dtype`` and in float64."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    a, b = a.to(dtype), b.to(dtype)
    return {"out": a @ b}, {"out": a.double() @ b.double()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_results_pass(dtype):
    eager, exact = results(dtype)
    check(eager, eager, exact, maximum=True)
    nearby = {"out": exact["out"].to(dtype)}
    check(nearby, eager, exact, maximum=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t * 1.03, "out: norm of the error"),
        (lambda t: t.index_fill(0, torch.tensor(3), float("nan")), "out must be finite"),
        (lambda t: t[:-1], "out must have shape"),
        (lambda t: torch.zeros_like(t), "out: norm of the error"),
    ],
    ids=["3 % off", "a NaN", "a row short", "nothing computed"],
)
def test_wrong_results_do_not(spoil, words):
    eager, exact = results(torch.bfloat16)
    with pytest.raises(WrongResult, match=words):
        check({"out": spoil(eager["out"])}, eager, exact, maximum=True)


def test_one_wrong_number_is_seen_in_the_maximum():
    eager, exact = results(torch.bfloat16)
    off = {"out": eager["out"].clone()}
    off["out"][5, 5] += 1
    check(off, eager, exact, maximum=False)
    with pytest.raises(WrongResult, match="out: maximum of the error"):
        check(off, eager, exact, maximum=True)


def test_time_is_the_calls():
    timing = time_calls(lambda _: lambda: time.sleep(0.01), CPU, input_bytes=1, seconds=0.05)
    assert 0.01 <= timing.low <= timing.median <= timing.high
    assert timing.median < 0.1  # of a sleep of 0.01, on a machine that is busy with others
    assert (timing.method, timing.peak_mib) == ("clock", None)
    assert timing.samples >= 2


def test_quantiles():
    assert quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (2.0, 5.0)


def test_ceilings_are_plausible():
    """More than a thousandth, less than a thousand times of what any CPU core does."""
    assert 1e8 < copy_bandwidth(CPU, 0.01, size=2**22) < 1e13
    assert 1e8 < matmul_rate(CPU, torch.float32, 128, 0.01) < 1e14


@pytest.mark.parametrize(("gib", "expected"), [(10, 2.5), (139, 4)])
def test_a_copy_fits_into_memory(gib, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib * 2**30, 0))
    assert measure._copied_bytes(torch.device("cuda")) == expected * 2**30


def test_many_copies_are_between_two_events(monkeypatch):
    """Of 2 ms each, with launches that cost as much again for each pair of events."""
    calls, pairs = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.calls = len(calls)

        def elapsed_time(self, end):
            pairs.append(end.calls - self.calls)
            return 2.0 * pairs[-1] + 2.0

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    found = measure._seconds_each(lambda: calls.append(0), torch.device("cuda"), 0.5)
    assert min(pairs[1:]) >= 40
    assert found == pytest.approx(0.002, rel=0.03)


def test_a_wrong_copy_has_no_bandwidth(monkeypatch):
    monkeypatch.setattr(torch, "add", lambda source, _, out: out.copy_(source).neg_())
    with pytest.raises(WrongResult, match="copy, a kernel's: what arrived differs"):
        copy_bandwidth(CPU, 0.01, size=2**12)


@pytest.mark.gpu
def test_time_on_a_gpu_is_of_the_graph_and_beyond_the_cache():
    """Adding one to 64 MB: no faster than a copy of it, with inputs too small for the cache."""
    device = torch.device("cuda")

    def prepare(copy):
        x = torch.full((2**20,), float(copy), device=device)
        return lambda: x.add_(1)

    timing = time_calls(prepare, device, input_bytes=2**23, seconds=0.05)
    assert timing.method == "graph"
    assert timing.peak_mib is not None
    assert 2**23 / timing.median < 1.3 * copy_bandwidth(device, 0.05)
