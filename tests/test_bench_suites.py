"""The suites on a CPU: what they write, and what they say without a GPU and of bad input."""

import json
import types

import pytest
import torch

from bench import kernels, loader, step, train, trunk
from bench.cases import CASES
from bench.kernels import compiled, draw
from bench.traffic import Sizes
from cifar_resnet_fast import FastResNet, ops
from cifar_resnet_fast.ops import _dispatch as choice
from cifar_resnet_fast.training.optimizers import FlatSGD
from cifar_resnet_fast.verification import networks
from cifar_resnet_fast.verification.budget import Unavailable, WrongResult

CPU = torch.device("cpu")
SUITES = {"kernels": kernels, "trunk": trunk, "step": step, "loader": loader, "train": train}
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
    """Every case, one implementation, all phases; rows agree with each other."""
    assert kernels.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    card, *rows = rows_of(tmp_path)
    check_rows([card, *rows])
    assert card["suite"] == "card"
    measured = {(r["operation"], r["place"], r["phase"]) for r in rows}
    assert measured == {(c.operation, c.place, p) for c in CASES for p in c.phases}
    for row in rows:
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3, rel=0.02, abs=0.1)
        traffic = row["bytes"] / card["copy_gb_s"] / 1e3
        arithmetic = row["flops"] / card["fp32_tflop_s"] / 1e6
        assert row["floor_us"] == pytest.approx(max(traffic, arithmetic), rel=0.1)
    assert "us (" in capsys.readouterr().out


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


def test_every_operation_is_measured():
    elsewhere = {
        "trunk": "kernel by kernel in bench.trunk, whole in bench.step",
        "linear_cross_entropy": "within the step of bench.step",
        "record_step": "within the step of bench.step",
    }
    cases = {case.operation for case in CASES}
    assert cases | elsewhere.keys() >= set(ops.OPERATIONS)
    assert cases <= set(ops.OPERATIONS)
    assert not cases & elsewhere.keys()


def one_of_each():
    """The last case of every operation."""
    return {case.operation: case for case in CASES}.values()


@pytest.mark.parametrize("case", one_of_each(), ids=lambda c: c.operation)
def test_cases_compile_whole(case):
    """torch.compile takes the operation without a graph break: what would be timed is compiled."""
    run = compiled(lambda tensors: case.call(tensors, "reference"), backend="eager")
    tensors, dout = draw(case, 2, torch.float32, CPU, seed=0)
    kernels.verify(case, run, tensors, dout)


def test_each_name_of_a_compiled_one_has_its_mode(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: modes.append(options["mode"]))
    gpu = types.SimpleNamespace(on_gpu=True, device=CPU)
    for name in ("compile", "compile max-autotune"):
        kernels.runner(CASES[0], name, gpu)
    assert modes == ["default", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("case", one_of_each(), ids=lambda c: c.operation)
def test_a_wrong_result_of_any_case_is_seen(case):
    """Each result of each operation by itself: half a percent off, or an integer by one."""
    tensors, dout = draw(case, 2, torch.float32, CPU, seed=0)
    kernels.verify(case, lambda tensors: case.call(tensors, "reference"), tensors, dout)
    for name in case.call({n: t.clone() for n, t in tensors.items()}, "reference"):

        def spoil(tensors, name=name):
            results = case.call(tensors, "reference")
            right = results[name]
            return {**results, name: right * 1.005 if right.is_floating_point() else right + 1}

        with pytest.raises(WrongResult, match=f"{name}: norm of the error"):
            kernels.verify(case, spoil, tensors, dout)


@pytest.mark.parametrize("depth", [20, 56])
def test_sgd_is_of_the_networks_parameters(depth):
    """Flat as the optimiser has them; the floor is of what is no gap. PyTorch's own agrees."""
    (case,) = (c for c in CASES if (c.operation, c.place) == ("sgd", f"ResNet-{depth}"))
    model = FastResNet(depth)
    numbers = sum(p.numel() for p in model.parameters())
    flat = FlatSGD(model, momentum=0.9, weight_decay=1e-4).parameters
    tensors, dout = draw(case, None, torch.float32, CPU, seed=0)
    assert dout is None
    assert tensors["parameters"].shape == flat.shape
    assert tensors["gradients"].count_nonzero() == numbers
    assert case.phases == ("call",)
    assert case.work("call", Sizes(1, "fp32")) == (5 * 4 * numbers, 0)
    kernels.verify(case, case.others["torch.optim"], tensors, dout)
    assert case.call(tensors, "auto").keys() == {"parameters", "momenta", "skipped"}


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
@pytest.mark.parametrize("place", ["8x8x64 to 64, shortcut", "32x32x3", "ResNet-20"])
def test_kernels_of_the_package_pass_the_check(place):
    """What is timed on a GPU, interpreted: float16 within twice eager's error."""
    case = next(case for case in CASES if case.place == place)
    dtype = torch.float16 if case.batched else torch.float32
    tensors, dout = draw(case, 2, dtype, CPU, seed=0)
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
        (
            "trunk",
            "--implementation compile",
            "must be of cuda, cudnn, eager, triton",
        ),
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


def test_what_an_implementation_does_not_serve_is_unavailable(monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda *_: None)
    problem = networks.Problem(8, 4, "fp32", CPU)
    for prepare in (networks.package_step, networks.package_inference):
        with pytest.raises(Unavailable, match="torch.float16 .* for implementation .cuda."):
            prepare(problem, "cuda")
