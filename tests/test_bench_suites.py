"""The suites on a CPU: what they write, and what they say without a GPU and of bad input."""

import argparse
import contextlib
import dataclasses
import json

import pytest
import torch

from bench import kernels, loader, networks, step, train
from bench.cases import CASES
from bench.kernels import compiled, differentiate, draw
from bench.suite import Suite, TritonError, reason_of
from cifar_resnet_fast import ops

CPU = torch.device("cpu")
SUITES = {"kernels": kernels, "step": step, "loader": loader, "train": train}
HEADER = {"suite", "card", "driver", "torch", "triton", "python", "commit", "date", "quick"}


def rows_of(folder):
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_rows(rows):
    for row in rows:
        assert row.keys() >= HEADER
        assert row["torch"] == torch.__version__
        if row["suite"] != "card":
            assert row["us_20"] <= row["us"] <= row["us_80"]


def test_kernels_on_a_cpu(tmp_path, capsys):
    """Every case, one implementation, three phases; rows agree with each other."""
    assert kernels.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    card, *rows = rows_of(tmp_path)
    check_rows([card, *rows])
    assert card["suite"] == "card"
    measured = {(r["operation"], r["place"], r["phase"]) for r in rows}
    assert measured == {(c.operation, c.place, p) for c in CASES for p in kernels.PHASES}
    for row in rows:
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3, rel=0.02, abs=0.1)
        traffic = row["bytes"] / card["copy_gb_s"] / 1e3
        arithmetic = row["flops"] / card["fp32_tflop_s"] / 1e6
        assert row["floor_us"] == pytest.approx(max(traffic, arithmetic), rel=0.1)
    assert "us (" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["result", "gradient"])
def test_a_wrong_implementation_has_no_time(wrong, tmp_path, monkeypatch, capsys):
    def runner(case, name, suite):
        def run(tensors):
            out = case.call(tensors, "reference")
            # times 1.001, but with the right gradient; or the other way round
            off = out * 1.001
            return out + (off - out).detach() if wrong == "result" else off + (out - off).detach()

        return run

    monkeypatch.setattr(kernels, "runner", runner)
    arguments = "--device cpu --operation shortcut_a --implementation eager --out".split()
    assert kernels.main([*arguments, str(tmp_path)]) == 1
    rows = [row for row in rows_of(tmp_path) if row["suite"] == "kernels"]
    assert len(rows) == 2 * len(kernels.PHASES)
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
    time_calls = kernels.time_calls
    calls = iter(range(100))

    def failing(*arguments, **options):
        if next(calls) == 1:
            raise error
        return time_calls(*arguments, **options)

    monkeypatch.setattr(kernels, "time_calls", failing)
    arguments = ["--device", "cpu", "--operation", "shortcut_a", "--out", str(tmp_path)]
    assert kernels.main(arguments) == status
    rows = [row for row in rows_of(tmp_path) if row["suite"] == "kernels"]
    found = [(row["place"], row["phase"], row.get("no_time")) for row in rows]
    first, second = (case.place for case in CASES if case.operation == "shortcut_a")
    assert found == [
        (first, "forward", None),
        (first, "backward", reason),
        (first, "both", reason),
        *((second, phase, None) for phase in kernels.PHASES),
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
    def off(problem, implementation):
        problem = dataclasses.replace(problem, depth=14)
        make = networks.package_step if phase == "training" else networks.package_inference
        return make(problem, implementation)

    monkeypatch.setattr(step, f"package_{'step' if phase == 'training' else phase}", off)
    arguments = ["--device", "cpu", "--phase", phase, "--implementation", "auto"]
    assert step.main([*arguments, "--out", str(tmp_path)]) == 1
    (row,) = (row for row in rows_of(tmp_path) if row["suite"] == "step")
    assert "us" not in row
    assert row["no_time"].startswith("wrong result")


def test_step_on_a_cpu(tmp_path):
    assert step.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    card, *rows = rows_of(tmp_path)
    check_rows([card, *rows])
    measured = {(r["phase"], r["implementation"], r["depth"], r["batch"]) for r in rows}
    assert measured == {
        (phase, name, 8, 4)
        for phase in ("training", "inference")
        for name in ("eager fp32", "auto")
    }
    for row in rows:
        assert row["images_per_second"] == pytest.approx(4e6 / row["us"], rel=0.01, abs=0.1)


def test_loader_on_a_cpu(tmp_path):
    assert loader.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    card, *rows = rows_of(tmp_path)
    check_rows([card, *rows])
    assert [row["implementation"] for row in rows] == ["package", "torchvision"]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(64e6 / row["us"], rel=0.01)


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


def test_train_on_a_cpu(tmp_path):
    arguments = "--device cpu --dataset shapes --runs 2 --target 0.01 --out".split()
    assert train.main([*arguments, str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert row.keys() >= HEADER
        assert (row["depth"], row["dataset"], row["epochs"], row["limit"]) == (8, "shapes", 2, 128)
        assert 0 < row["seconds_to_target"] < row["seconds"]
        assert row["epochs_to_target"] == 1


def test_time_to_an_accuracy_is_the_first_epochs_that_has_it():
    rows = [
        {"epoch": epoch, "test_accuracy": accuracy, "seconds": 10.0 * epoch}
        for epoch, accuracy in enumerate((0.5, 0.9, 0.8, 0.95), 1)
    ]
    assert train.result(rows, 43.5, 0.9) == {
        "accuracy": 0.95,
        "seconds": 40.0,
        "start_seconds": 3.5,
        "target": 0.9,
        "seconds_to_target": 20.0,
        "epochs_to_target": 2,
    }
    assert train.result(rows, 43.5, 0.96)["seconds_to_target"] is None


@pytest.mark.parametrize("case", CASES[1::4], ids=lambda c: f"{c.operation} {c.place}")
def test_cases_compile_whole(case):
    """torch.compile takes the operation without a graph break: what would be timed is compiled."""
    run = compiled(lambda tensors: case.call(tensors, "reference"), backend="eager")
    tensors, dout = draw(case, 2, torch.float32, CPU, seed=0)
    kernels.verify(case, run, tensors, dout)
    out, gradients = differentiate(case, run, tensors, dout)
    assert out.shape == dout.shape
    assert len(gradients) == len(case.differentiated)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_networks_compile_whole(dtype, monkeypatch):
    """The same of the whole network in training, with autocast and without."""
    compile_whole = torch.compile
    monkeypatch.setattr(  # which would take a minute
        torch,
        "compile",
        lambda model, mode, **options: compile_whole(model, backend="eager", **options),
    )
    problem = networks.Problem(8, 4, dtype, CPU)
    ours = networks.plain_step(problem, networks.Plain(compile_mode="default")).first_update()
    eager = networks.plain_step(problem, networks.EAGER).first_update()
    torch.testing.assert_close(ours, eager)


@pytest.mark.skipif(
    ops.why_not("triton", CPU, "conv_bn_relu") is not None, reason="needs Triton's interpreter"
)
def test_kernels_of_the_package_pass_the_check():
    """What is timed on a GPU, interpreted: float16 within twice eager's error."""
    case = next(case for case in CASES if case.place == "8x8x64 to 64, shortcut")
    tensors, dout = draw(case, 2, torch.float16, CPU, seed=0)
    kernels.verify(case, lambda tensors: case.call(tensors, "triton"), tensors, dout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", SUITES)
def test_without_a_gpu_one_line_and_status_2(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        SUITES[name].main(["--out", str(tmp_path / "new")])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1
    assert f"bench.{name} needs a CUDA GPU" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("kernels", "--operation conv5x5", "--operation"),
        ("kernels", "--implementation cudnn", "--implementation must be of"),
        ("kernels", "--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("step", "--depth 57", "--depth must be 6n + 2"),
        ("step", "--batch-size -1", "--batch-size must be at least 1, got -1"),
        ("step", "--device cpu --implementation compile_graph", "--implementation"),
        ("loader", "--batch-size 257", "--batch-size must be in 1 .. 256"),
        ("train", "--target 1.5", "--target more than 0 and at most 1"),
        ("train", "--dataset nowhere.npz", "dataset"),
    ],
)
def test_bad_input(name, arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        SUITES[name].main([*arguments.split(), "--device", "cpu", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_named_implementation_that_cannot_run_is_said(tmp_path, capsys):
    arguments = ["--device", "cpu", "--operation", "shortcut_a", "--out", str(tmp_path)]
    assert kernels.main([*arguments, "--implementation", "cuda"]) == 0
    assert "NO TIME: without a GPU only eager is measured" in capsys.readouterr().out
