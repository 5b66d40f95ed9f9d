"""Bytes and operations against tensors and counters of the real network; floors; prediction."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import counted, prediction, roofline, traffic
from bench.cards import CARDS, Card
from bench.traffic import Sizes
from cifar_resnet_fast import FastResNet
from cifar_resnet_fast.modules import BasicBlock
from cifar_resnet_fast.training.engine import DTYPES
from tools import ptxas_report

DEPTHS = (8, 20, 56)
MEASURED = Card("H100", 3.0e12, 600e12, 60e12, 90, "measured 2026-11-22")


class Convolutions(TorchDispatchMode):
    """Bytes of what every convolution of a forward pass reads and writes, in order."""

    def __init__(self):
        super().__init__()
        self.inputs, self.outputs = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            self.inputs.append(args[0])
            self.outputs.append(result)
        return result


def real_tensors(depth, batch, dtype):
    """Tensors of a FastResNet in training, without their data: the blocks' inputs x, the raw y."""
    x = []
    with FakeTensorMode():
        model = FastResNet(depth, implementation="reference")
        for module in model.modules():
            if isinstance(module, BasicBlock):
                module.register_forward_pre_hook(lambda _, arguments: x.append(arguments[0]))
        autocast = torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32")
        with autocast, Convolutions() as convolutions:
            model(torch.empty(batch, 3, 32, 32))
    y = convolutions.outputs
    return x, y[0], y[1::2], y[2::2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_step_moves_the_networks_tensors(depth, dtype):
    """DESIGN's dataflow with the real tensors' nbytes: kernel by kernel, forward and backward."""
    batch = 6
    x, y0, y1, y2 = real_tensors(depth, batch, dtype)
    steps = roofline.training_step(depth, batch, dtype)

    def shortcut(source, target):
        """nbytes of ``source`` that a shortcut to ``target`` uses."""
        stride = source.shape[-1] // target.shape[-1]
        return source[:, :, ::stride, ::stride].contiguous().nbytes

    forward, backward, before, added = [], [], y0, 0
    for k in range(len(x)):
        forward.append(before.nbytes + added + x[k].nbytes + y1[k].nbytes)
        forward.append(y1[k].nbytes + y2[k].nbytes)
        dz2 = shortcut(x[k], y2[k])
        backward.append(2 * y1[k].nbytes + x[k].nbytes + dz2 + before.nbytes + before.nbytes)
        backward.append(2 * y2[k].nbytes + 2 * y1[k].nbytes)
        before, added = y2[k], dz2
    convs = [w for w in steps if w.kernel[:2] in ("F1", "F2")]
    assert [w.activation_bytes for w in convs] == forward
    convs = [w for w in steps if w.kernel[:2] in ("B1", "B2")]
    assert [w.activation_bytes for w in convs] == backward[::-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_holds_the_networks_tensors(dtype):
    x, y0, y1, y2 = real_tensors(20, 6, dtype)
    pictures = torch.empty(6, 4, 32, 32, dtype=DTYPES[dtype])
    held = roofline.memory(20, 6, dtype)
    assert held["saved"] == sum(t.nbytes for t in (pictures, y0, *x, *y1, *y2))
    assert held["gradients"] == 3 * y0.nbytes
    numbers = sum(p.numel() for p in FastResNet(20).parameters())
    assert held["parameters"] == numbers * (12 if dtype == "fp32" else 14)


@pytest.mark.parametrize("depth", DEPTHS)
def test_operations_are_pytorchs_count(depth):
    """Forward and backward of the real network under torch's own counter."""
    batch = 2
    with FakeTensorMode():
        model = FastResNet(depth, implementation="reference")
        pictures = torch.empty(batch, 3, 32, 32)
        with FlopCounterMode(display=False) as counter:
            logits = model(pictures)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            logits.sum().backward()
    assert sum(w.flops for w in roofline.inference(depth, batch, "fp16")) == forward
    steps = roofline.training_step(depth, batch, "fp16")
    assert sum(w.flops for w in steps) == forward + counter.get_total_flops()


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters(depth):
    model = FastResNet(depth, num_classes=100)
    assert roofline.parameters(depth, 100) == sum(p.numel() for p in model.parameters())


def test_a_block_moves_16_activations():
    for dtype in DTYPES:
        s = Sizes(7, dtype)
        for stage in range(3):
            A = s.stage(stage)
            F1 = traffic.forward_1(s, stage, stage, A)
            works = (F1, traffic.forward_2(s, stage), traffic.backward_2(s, stage))
            works += (traffic.backward_1(s, stage, stage),)
            assert [w.activation_bytes // A for w in works] == [4, 2, 4, 6]


def test_resnet56_at_batch_1024():
    """8.5 GB, 2.8 ms at the 3.0 TB/s measured on an H100, 12.9 ms of arithmetic on an RTX 3080."""
    nominal = roofline.nominal_bytes(56, 1024, "bf16")
    assert round(nominal / 1e9, 1) == 8.5
    assert round(1e3 * nominal / MEASURED.bandwidth, 1) == 2.8
    steps = roofline.training_step(56, 1024, "bf16")
    assert nominal < sum(w.bytes for w in steps) < 1.05 * nominal
    floors = roofline.floors(steps, CARDS["RTX 3080"], "bf16")
    assert floors.arithmetic == pytest.approx(12.9e-3, abs=0.05e-3)
    assert floors.kernels >= max(floors.traffic, floors.arithmetic)


def test_units_move_their_tensors():
    """The public operations' bytes, from tensors of their shapes."""
    N, C, K, side = 5, 16, 32, 32
    s = Sizes(N, "bf16")
    x = torch.empty(N, C, side, side, dtype=torch.bfloat16)
    out = torch.empty(N, K, side // 2, side // 2, dtype=torch.bfloat16)
    taken = x[:, :, ::2, ::2].contiguous().nbytes
    work = traffic.unit_forward(s, C, K, side, 2, shortcut=True)
    assert work.activation_bytes == x.nbytes + 4 * out.nbytes  # y twice, shortcut, a
    work = traffic.unit_backward(s, C, K, side, 2, shortcut=False)
    assert work.activation_bytes == 4 * out.nbytes + 2 * x.nbytes  # da, y twice; x, dx
    work = traffic.unit_backward(s, C, K, side, 2, shortcut=True)
    assert work.activation_bytes == 6 * out.nbytes + 2 * x.nbytes  # da, y twice, a, dz twice
    assert traffic.shortcut_a_forward(s, C, K, side).bytes == taken + out.nbytes
    assert traffic.shortcut_a_backward(s, C, K, side).bytes == taken + x.nbytes


def test_prediction_gives_back_what_it_was_made_from():
    """On the card that was measured, best and worst agree on the sum of the layers."""
    card = dataclasses.replace(
        CARDS["H100"],
        bandwidth=prediction.COPY_BANDWIDTH / prediction.COPY_SHARE,
        tensor=prediction.MMA_RATE,
    )
    s = Sizes(prediction.BATCH, prediction.DTYPE)
    steps, measured = [], 0.0
    for stage in range(3):
        A = s.stage(stage)
        steps += [traffic.forward_1(s, stage, stage, A), traffic.forward_2(s, stage)]
        steps += [traffic.backward_1(s, stage, stage), traffic.backward_2(s, stage)]
        measured += 2e-6 * (prediction.FORWARD_US[stage] + prediction.BACKWARD_US[stage])
    best, worst = prediction.predict(steps, card, prediction.DTYPE)
    assert best == pytest.approx(measured, rel=1e-9)
    # the factor is of a pair's mean: F1 and F2 are not limited alike in every stage
    assert worst == pytest.approx(measured, rel=0.05)


def test_prediction_is_above_the_floor():
    steps = roofline.training_step(56, 1024, "fp16")
    card = CARDS["RTX 3080"]
    best, worst = prediction.predict(steps, card, "fp16")
    assert roofline.floors(steps, card, "fp16").kernels < best < worst


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_kernel_of_the_trunk_is_counted(depth, dtype):
    """In the counts of the compiled code; what is left are the kernels around the trunk."""
    card = CARDS["RTX 3080"]
    steps = roofline.training_step(depth, 128, dtype)
    left = {w.kernel for w in steps if counted.times(w, 128, card, dtype) is None}
    assert left == {"loader", "linear", "linear backward", "optimizer"}


def test_counted_matrix_instructions_are_the_networks():
    """A multiprocessor's share of a whole number of images needs the time of its operations."""
    card = CARDS["H100"]
    batch = 4 * card.multiprocessors
    for work in roofline.training_step(56, batch, "bf16"):
        times = counted.times(work, batch, card, "bf16")
        if times is None or not work.flops or work.kernel.startswith("stem"):
            continue
        exact = work.flops / counted.reached(card).tensor
        # at stride 2 a border's products with padding are left out
        assert 0.97 * exact <= times.tensor <= exact * (1 + 1e-9), work.kernel


def test_model_is_below_what_was_measured():
    """It has no latencies, so that a time above a measurement would be a mistake of its counts."""
    lines = "\n".join(roofline.counted_lines(56, 1024, "fp16", CARDS["RTX 3080"]))
    errors = re.findall(r"measured +[\d.]+: +([+-]\d+)%", lines)
    assert len(errors) == len(prediction.PROTOTYPE_US) + len(counted.STEPS_ON_H200)
    assert all(int(error) < 0 for error in errors)
    assert "PREDICTION by the counts, not a measurement" in lines


def test_command_line(capsys):
    assert roofline.main(["--card", "RTX 3080", "--predict"]) == 0
    out = capsys.readouterr().out
    assert "PREDICTION, not a measurement" in out
    assert "16 A a block alone: 8.46 GB" in out
    assert roofline.main(["--card", "H100", "--bandwidth", "3000"]) == 0
    out = capsys.readouterr().out
    assert "as given" in out
    assert "2.82 ms" in out
    assert "PREDICTION" not in out


@pytest.mark.parametrize(
    ("spilled", "status", "words"),
    [
        (0, 0, "compiled for sm_86: holds, 2 kernels without spills, at most 200 registers"),
        (8, 1, "compiled for sm_86: does not hold, 1 kernels spill: B2"),
    ],
)
def test_prediction_depends_on_the_resources(spilled, status, words, monkeypatch, capsys):
    def compiled(source, nvcc, architectures):
        assert tuple(architectures) == (86,)  # the card's alone
        return [
            ptxas_report.Kernel("F2", 86, 120, 0, 0),
            ptxas_report.Kernel("B2", 86, 200, spilled, 0),
        ]

    monkeypatch.setattr(ptxas_report, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(ptxas_report, "sources", lambda: [Path("conv3x3/a.cu"), Path("b.cu")])
    monkeypatch.setattr(ptxas_report, "report", compiled)
    assert roofline.main(["--predict", "--resources"]) == status
    assert words in capsys.readouterr().out


def test_unchecked_resources_are_said(monkeypatch, capsys):
    monkeypatch.setattr(ptxas_report, "find_nvcc", lambda: None)
    assert roofline.main(["--predict", "--resources"]) == 1
    assert "unchecked, there is no nvcc" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--depth", "57"],
        ["--batch-size", "0"],
        ["--card", "GTX 480"],
        ["--predict", "--bandwidth", "700"],
        ["--predict", "--dtype", "fp32"],
        ["--resources"],
    ],
)
def test_bad_input(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        roofline.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
