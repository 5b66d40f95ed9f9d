"""The suites when something goes wrong, on a CPU: no time is kept, the reason is, and the others
are measured."""

import argparse
import contextlib
import dataclasses
import json

import pytest
import torch

from bench import kernels, loader, step
from bench.cards import CARDS
from bench.cases import CASES
from bench.suite import Suite, TritonError, reason_of
from cifar_resnet_fast.verification import networks
from cifar_resnet_fast.verification.measure import time_calls

GRADIENT_PHASES = ("forward", "backward", "both")


@pytest.fixture(autouse=True)
def known_card(monkeypatch):
    """Nothing here is about what the machine reaches, and to measure that takes its time."""
    monkeypatch.setattr(Suite, "measured_card", lambda suite: CARDS["H100"])


def rows_of(folder):
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("wrong", ["result", "gradient"])
def test_a_wrong_implementation_has_no_time(wrong, tmp_path, monkeypatch, capsys):
    def runner(case, name, suite):
        def run(tensors):
            out = case.call(tensors, "reference")["out"]
            # times 1.001, but with the right gradient; or the other way round
            off = out * 1.001
            mixed = (out, off) if wrong == "result" else (off, out)
            return {"out": mixed[0] + (mixed[1] - mixed[0]).detach()}

        return run

    monkeypatch.setattr(kernels, "runner", runner)
    arguments = "--device cpu --operation shortcut_a --implementation eager --out".split()
    assert kernels.main([*arguments, str(tmp_path)]) == 1
    rows = [row for row in rows_of(tmp_path) if row["suite"] == "kernels"]
    assert len(rows) == 2 * len(GRADIENT_PHASES)
    name = {"result": "out", "gradient": "dx"}[wrong]
    for row in rows:
        assert "us" not in row
        assert row["no_time"].startswith(f"wrong result: {name}: norm of the error")
    assert "NO TIME: wrong result" in capsys.readouterr().out


# the words of a failed CUDA graph, of a card too small, and of a kernel that asks for too much
CAPTURE = RuntimeError("CUDA error: not permitted when stream is capturing\nFor debugging ...")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
RESOURCES = TritonError("out of resource: shared memory")
FAILED_CAPTURE = "failed: CUDA error: not permitted when stream is capturing"


@pytest.mark.parametrize(
    ("error", "reason", "status"),
    [
        (CAPTURE, FAILED_CAPTURE, 1),
        (MEMORY, "out of memory", 0),
        (RESOURCES, "failed: out of resource: shared memory", 1),
    ],
    ids=["capture", "memory", "resources"],
)
def test_a_failure_is_a_row_and_the_others_go_on(
    error, reason, status, tmp_path, monkeypatch, capsys
):
    """One case fails as it is timed backward: it keeps its time forward, the next has all."""
    calls = iter(range(100))

    def failing(*arguments, **options):
        if next(calls) == 1:
            raise error
        return time_calls(*arguments, **options)

    monkeypatch.setattr("bench.suite.time_calls", failing)
    arguments = ["--device", "cpu", "--operation", "shortcut_a", "--out", str(tmp_path)]
    assert kernels.main(arguments) == status
    rows = [row for row in rows_of(tmp_path) if row["suite"] == "kernels"]
    found = [(row["place"], row["phase"], row.get("no_time")) for row in rows]
    first, second = (case.place for case in CASES if case.operation == "shortcut_a")
    assert found == [
        (first, "forward", None),
        (first, "backward", reason),
        (first, "both", reason),
        *((second, phase, None) for phase in GRADIENT_PHASES),
    ]
    out = capsys.readouterr().out
    assert f"backward/both  NO TIME: {reason}\n" in out
    assert ("1 failed" in out) == (status == 1)


@pytest.mark.parametrize(
    ("error", "reason"), [(CAPTURE, FAILED_CAPTURE), (MEMORY, "out of memory")]
)
def test_a_network_or_loader_that_fails_is_a_row(error, reason, tmp_path, monkeypatch):
    """So it is in the other suites: the first implementation fails, the second is measured."""

    def fail(*_):
        raise error

    make_step = step.make_step
    monkeypatch.setattr(
        step, "make_step", lambda p, name: fail() if name == "eager fp32" else make_step(p, name)
    )
    monkeypatch.setitem(loader.LOADERS, "package", fail)
    failed = reason.startswith("failed")
    arguments = ["--device", "cpu", "--out", str(tmp_path)]
    assert step.main([*arguments, "--phase", "training"]) == failed
    assert loader.main([*arguments, "--quick"]) == failed
    rows = [row for row in rows_of(tmp_path) if row["suite"] != "card"]
    assert [row["implementation"] for row in rows] == [
        "eager fp32",
        "auto",
        "package",
        "torchvision",
    ]
    assert [row.get("no_time") for row in rows] == [reason, None, reason, None]


def test_a_step_that_no_graph_can_hold_is_a_row(tmp_path, monkeypatch):
    """The engine would go on without, slowly; here that is no result."""

    def capture(function, warm_up):
        raise CAPTURE

    monkeypatch.setattr(networks, "capture_for", lambda device: capture)
    arguments = ["--device", "cpu", "--phase", "training", "--implementation", "auto"]
    assert step.main([*arguments, "--out", str(tmp_path)]) == 1
    reason = rows_of(tmp_path)[-1]["no_time"]
    assert reason.startswith("failed: the step cannot be captured: CUDA error: not permitted")


@pytest.mark.gpu
@pytest.mark.own_process
def test_a_capture_that_fails_leaves_a_gpu_that_measures(tmp_path, monkeypatch):
    """The first case asks for a value in its capture; the second has its times from graphs."""
    first, second = (case for case in CASES if case.operation == "shortcut_a")
    runner = kernels.runner

    def asking(case, name, suite):
        run = runner(case, name, suite)

        def ask(tensors):
            results = run(tensors)
            if case is first and torch.cuda.is_current_stream_capturing():
                results["out"].sum().item()
            return results

        return ask

    monkeypatch.setattr(kernels, "runner", asking)
    arguments = "--quick --operation shortcut_a --implementation eager --out".split()
    assert kernels.main([*arguments, str(tmp_path)]) == 1
    rows = [row for row in rows_of(tmp_path) if row["suite"] == "kernels"]
    assert [row["place"] for row in rows] == 3 * [first.place] + 3 * [second.place]
    assert all(row["no_time"].startswith("failed: ") for row in rows[:3])
    assert all(row["method"] == "graph" for row in rows[3:])


def test_plain_pytorch_replays_what_was_captured_last(monkeypatch):
    """By the engine's capture, which warms it up first; a launch gives the captured tensor."""
    calls, launches = [], []

    class Graphs:
        def __call__(self, function, warm_up):
            for run in (warm_up, warm_up, function):
                run()
            return lambda: launches.append("launch")

    def run():
        calls.append(torch.tensor(len(calls)))
        return calls[-1]

    monkeypatch.setattr(networks, "CudaGraphs", Graphs)
    replay = networks._captured(run)
    assert replay() is replay() is calls[2]
    assert launches == ["launch"] * 2


def test_the_reason_is_what_went_wrong_within_a_capture():
    """Ending a capture that failed raises once more, and says less."""

    def capture():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")

    def explain():
        try:
            raise RuntimeError("index out of range")
        except RuntimeError as error:
            raise RuntimeError("the network has no such layer") from error

    with pytest.raises(RuntimeError) as raised:
        capture()
    assert reason_of(raised.value) == "out of memory"
    with pytest.raises(RuntimeError) as raised:
        explain()
    assert reason_of(raised.value) == "failed: the network has no such layer"


@pytest.mark.parametrize("lost", [False, True], ids=["usable", "lost"])
def test_after_a_failure_on_a_gpu(lost, tmp_path, monkeypatch, capsys):
    """The stream is the one of before; a GPU that is lost ends the suite, with what it has."""
    options = argparse.Namespace(device="cpu", quick=True, out=tmp_path)
    suite = Suite("kernels", options)
    suite.on_gpu, streams = True, []

    def synchronize(device):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile ...")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "of before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    stops = pytest.raises(SystemExit, match="1") if lost else contextlib.nullcontext()
    with stops, suite.attempt([{"operation": "sgd"}]):
        raise CAPTURE
    assert streams == ["of before"]
    (row,) = rows_of(tmp_path)
    assert row["no_time"] == FAILED_CAPTURE
    err = capsys.readouterr().err
    assert ("an illegal memory access was encountered): what is missing" in err) == lost


@pytest.mark.parametrize("phase", ["training", "inference"])
def test_a_wrong_network_has_no_time(phase, tmp_path, monkeypatch):
    module, name = {
        "training": (networks, "package_step"),
        "inference": (step, "package_inference"),
    }[phase]
    make = getattr(networks, name)

    def off(problem, implementation):
        return make(dataclasses.replace(problem, depth=14), implementation)

    monkeypatch.setattr(module, name, off)
    arguments = ["--device", "cpu", "--phase", phase, "--implementation", "auto"]
    assert step.main([*arguments, "--out", str(tmp_path)]) == 1
    (row,) = (row for row in rows_of(tmp_path) if row["suite"] == "step")
    assert "us" not in row
    assert row["no_time"].startswith("wrong result")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda images, labels: (images.roll(1, -1), labels),
        lambda images, labels: (images.flip(-2), labels),
        lambda images, labels: (images, labels.roll(1)),
        lambda images, labels: (images.flip(1), labels),
        lambda images, labels: (images[1:], labels[1:]),
    ],
    ids=["rolled", "upside down", "another's label", "colours swapped", "too few"],
)
def test_a_wrong_loader_has_no_time(spoil, tmp_path, monkeypatch):
    def wrong(*arguments):
        right = loader.package(*arguments)
        return lambda epoch: (spoil(*batch) for batch in right(epoch))

    monkeypatch.setitem(loader.LOADERS, "package", wrong)
    arguments = ["--device", "cpu", "--implementation", "package", "--out", str(tmp_path)]
    assert loader.main(arguments) == 1
    assert "us" not in rows_of(tmp_path)[-1]
