"""Bytes, operations and floors of the whole step: ``python -m bench.roofline``.

Needs no GPU and measures nothing. ``--card`` names a data sheet; ``--predict`` adds a prediction
of the step's time there, made from measurements on another card (``bench/prediction.py``), and one
made from counts of the compiled kernels (``bench/counted.py``), whose error it shows.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench import counted, prediction
from bench import traffic as kernels
from bench.cards import CARDS, Card
from bench.traffic import SIDES, Sizes, Work, place
from cifar_resnet_fast.resnet import STAGE_CHANNELS, check_depth
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.verification.trunk import convolutions

RECIPE_STEPS = 160 * (50_000 // 1024)  # epochs times full batches


def blocks(depth: int) -> list[tuple[int, int]]:
    """(stage of its input, stage) of every block, stages counted from 0."""
    check_depth(depth)
    n = (depth - 2) // 6
    return [
        (stage - 1 if stage and block == 0 else stage, stage)
        for stage in range(3)
        for block in range(n)
    ]


def parameters(depth: int, num_classes: int = 10) -> int:
    """Trained numbers of ResNet-``depth``."""
    linear = (STAGE_CHANNELS[-1] + 1) * num_classes
    return sum(9 * C * K + 2 * K for C, K in convolutions(depth)) + linear


def trunk(depth: int, batch: int, dtype: str) -> tuple[list[Work], list[Work]]:
    """The launches of the network's body by the raw dataflow, forward and backward, each in the
    order of ``ops._trunk.schedule``; arguments as ``training_step``'s."""
    s, shortcut = Sizes(batch, dtype), 0
    forward, backward = [kernels.stem_forward(s)], [kernels.head_backward(s)]
    for source, stage in blocks(depth):
        forward += [kernels.forward_1(s, source, stage, shortcut), kernels.forward_2(s, stage)]
        shortcut = s.shortcut(source, stage)
    for source, stage in reversed(blocks(depth)):
        backward += [kernels.backward_2(s, stage), kernels.backward_1(s, source, stage)]
    forward.append(kernels.head_forward(s, shortcut))
    return forward, [*backward, kernels.stem_backward(s)]


def training_step(depth: int, batch: int, dtype: str, num_classes: int = 10) -> list[Work]:
    """Every launch of a training step by the raw dataflow, in order.

    Args:
        depth: 6n + 2
        batch: pictures a step
        dtype: of the activations: fp16, bf16 or fp32
        num_classes: of the last layer
    """
    s, (forward, backward) = Sizes(batch, dtype), trunk(depth, batch, dtype)
    linear = [kernels.linear_forward(s, num_classes), kernels.linear_backward(s, num_classes)]
    optimizer = kernels.optimizer(s, parameters(depth, num_classes))
    return [kernels.loader(s), *forward, *linear, *backward, optimizer]


def inference(depth: int, batch: int, dtype: str, num_classes: int = 10) -> list[Work]:
    """Every launch of a forward pass in evaluation: normalisation is part of the weights, so a
    convolution reads one finished activation and writes another; the last adds the shortcut."""
    s = Sizes(batch, dtype)
    steps = [kernels.stem_forward(s)]
    for source, stage in blocks(depth):
        C, K, A = STAGE_CHANNELS[source], STAGE_CHANNELS[stage], s.stage(stage)
        one = (("x", s.stage(source)), ("weight", s.weight(C, K)))
        two = (("a", A), ("x", s.shortcut(source, stage)), ("weight", s.weight(K, K)))
        for name, reads, inputs in (("conv1", one, C), ("conv2", two, K)):
            flops = kernels.conv_flops(batch, inputs, K, SIDES[stage])
            steps.append(Work(name, place(stage), reads, (("out", A),), flops))
    C = STAGE_CHANNELS[-1]
    reads = (("x", s.stage(2)), ("weight", C * num_classes * s.item))
    writes = (("logits", batch * num_classes * 4),)
    return [*steps, Work("head", place(2), reads, writes, 2 * batch * C * num_classes)]


def nominal_bytes(depth: int, batch: int, dtype: str) -> int:
    """The short formula: 16 A a block, and nothing else."""
    s = Sizes(batch, dtype)
    return sum(16 * s.stage(stage) for _, stage in blocks(depth))


def memory(depth: int, batch: int, dtype: str, num_classes: int = 10) -> dict[str, int]:
    """Bytes that a training step by the raw dataflow holds at its peak, at least.

    saved: x, y1, y2 of every block, y0 and the pictures, from forward to backward
    gradients: dz2 and dz1, which are read, and the dz that is written, of the largest stage
    parameters: float32 master, momentum and gradient, and the copy for the kernels
    """
    s = Sizes(batch, dtype)
    saved = s.pictures() + s.stage(0)
    saved += sum(s.stage(source) + 2 * s.stage(stage) for source, stage in blocks(depth))
    copy = s.item if s.item != 4 else 0
    numbers = parameters(depth, num_classes)
    return {"saved": saved, "gradients": 3 * s.stage(0), "parameters": (12 + copy) * numbers}


# --- floors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floors:
    """Shortest times of several launches on one card, in seconds.

    traffic: all bytes at the full bandwidth
    arithmetic: all operations at the full rate
    kernels: launch after launch, each at the slower of its two limits
    """

    traffic: float
    arithmetic: float
    kernels: float


def floors(steps: Iterable[Work], card: Card, dtype: str) -> Floors:
    """The floors of ``steps`` on ``card`` with activations of ``dtype``."""
    steps = list(steps)
    return Floors(
        sum(work.bytes for work in steps) / card.bandwidth,
        sum(work.flops for work in steps) / card.arithmetic(dtype),
        sum(work.floor(card, dtype) for work in steps),
    )


# --- the command line -------------------------------------------------------------------------


def kernel_lines(steps: list[Work], card: Card, dtype: str) -> list[str]:
    """One line for each kind of launch: how many, bytes, operations, floor, tensors."""
    lines = [f"{'kernel':19} {'at':10} {'times':>5} {'MB':>7} {'GFLOP':>6} {'us':>7}  tensors"]
    for work, times in Counter(steps).items():
        reads, writes = (", ".join(name for name, _ in t) for t in (work.reads, work.writes))
        lines.append(
            f"{work.kernel:19} {work.place:10} {times:5} {work.bytes / 1e6:7.1f} "
            f"{work.flops / 1e9:6.1f} {1e6 * work.floor(card, dtype):7.1f}  {reads} -> {writes}"
        )
    return lines


def floor_lines(depth: int, batch: int, dtype: str, card: Card) -> list[str]:
    """Totals of the training step and of inference, and memory."""
    steps = training_step(depth, batch, dtype)
    step, forward = floors(steps, card, dtype), floors(inference(depth, batch, dtype), card, dtype)
    nominal = nominal_bytes(depth, batch, dtype)
    held = memory(depth, batch, dtype)
    return [
        f"training step: {sum(w.bytes for w in steps) / 1e9:.2f} GB (16 A a block alone: "
        f"{nominal / 1e9:.2f} GB, {1e3 * nominal / card.bandwidth:.2f} ms), "
        f"{sum(w.flops for w in steps) / 1e12:.3f} TFLOP",
        f"  floor: traffic {1e3 * step.traffic:.2f} ms, arithmetic "
        f"{1e3 * step.arithmetic:.2f} ms; kernel after kernel "
        f"{1e3 * step.kernels:.2f} ms, {batch / step.kernels:,.0f} images/s",
        f"inference: kernel after kernel {1e3 * forward.kernels:.2f} ms, "
        f"{batch / forward.kernels:,.0f} images/s",
        f"memory of a training step: {held['saved'] / batch / 1e3:,.0f} KB an image saved for the "
        f"backward pass; {sum(held.values()) / 1e9:.2f} GB at batch {batch}",
    ]


def prediction_lines(depth: int, batch: int, dtype: str, card: Card) -> list[str]:
    """What the step would take on a card of which there is only the data sheet."""
    best, worst = prediction.predict(training_step(depth, batch, dtype), card, dtype)
    epochs = ""
    if batch == 1024:
        recipe = f"{best * RECIPE_STEPS:.0f} to {worst * RECIPE_STEPS:.0f} s"
        epochs = f"; the recipe's 160 epochs in {recipe}"
    return [
        f"PREDICTION, not a measurement: {1e3 * best:.1f} to {1e3 * worst:.1f} ms a training "
        f"step, {batch / worst:,.0f} to {batch / best:,.0f} images/s{epochs}",
        *(f"  assumed: {line}" for line in prediction.assumptions(card)),
    ]


def counted_lines(depth: int, batch: int, dtype: str, card: Card) -> list[str]:
    """What the counts of the compiled kernels say of each launch and of the step, beside what was
    measured."""
    lines = [
        f"COUNTED from the compiled kernels, us a launch on {card.name}: the longest "
        "of the four is the model's time",
        f"{'kernel':24} {'at':10} {'times':>5} {'memory':>7} {'tensor':>7} {'shared':>7} "
        f"{'issue':>7}  limit",
    ]
    steps = training_step(depth, batch, dtype)
    for work, times in Counter(steps).items():
        made = counted.times(work, batch, card, dtype)
        if made is not None:
            limits = " ".join(f"{1e6 * seconds:7.1f}" for seconds in vars(made).values())
            lines.append(f"{work.kernel:24} {work.place:10} {times:5} {limits}  {made.limit}")
    errors, ratios = [], []
    prototypes = {
        (work.kernel, work.place): work
        for work in training_step(56, prediction.BATCH, prediction.DTYPE)
    }
    for name, us in prediction.PROTOTYPE_US.items():
        work = prototypes[name]
        made = counted.times(work, prediction.BATCH, CARDS["H100"], prediction.DTYPE)
        what = f"{work.kernel} at {work.place}, {prediction.PROTOTYPE}"
        errors.append(_error(what, made.longest, us, "us"))
        ratios.append(us / (1e6 * made.longest))
    for (measured_depth, images), ms in counted.STEPS_ON_H200.items():
        measured = training_step(measured_depth, images, "fp16")
        seconds = counted.step(measured, images, CARDS["H200"], "fp16")
        what = f"step of ResNet-{measured_depth}, H200, batch {images}, fp16"
        errors.append(_error(what, seconds, ms, "ms"))
    seconds = counted.step(steps, batch, card, dtype)
    mean = statistics.geometric_mean(ratios)
    return [
        *lines,
        "  the error of this model, where there are measurements:",
        *errors,
        f"PREDICTION by the counts, not a measurement: {1e3 * seconds:.1f} ms a training step on "
        f"{card.name}, {1e3 * seconds * mean:.1f} ms if it is {mean:.2f} times the model as the "
        "kernels on the H100 are on average",
    ]


def _error(what: str, seconds: float, measured: float, unit: str) -> str:
    """A line: model, measurement, and by how much the model misses it."""
    model = seconds * (1e6 if unit == "us" else 1e3)
    return (
        f"    {what:62} model {model:7.2f} {unit}, measured {measured:7.2f}: "
        f"{model / measured - 1:+4.0%}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument(
        "--card", choices=CARDS, default="RTX 3080", help="card (default: RTX 3080)"
    )
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/S", help="bandwidth measured on the card"
    )
    parser.add_argument(
        "--tflops", type=float, metavar="TFLOP/S", help="tensor-core rate measured on the card"
    )
    parser.add_argument(
        "--depth", type=int, default=56, metavar="N", help="number of layers (default: 56)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1024, metavar="N", help="batch size (default: 1024)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="data type (default: fp16)"
    )
    parser.add_argument("--predict", action="store_true", help="also predict the step's time")
    parser.add_argument(
        "--resources",
        action="store_true",
        help="with --predict: compile the convolutions with nvcc (a minute) and "
        "say whether the prediction's condition on them holds; exit status 1 if not",
    )
    options = parser.parse_args(arguments)
    card = CARDS[options.card]
    if options.bandwidth is not None:
        card = replace(card, bandwidth=options.bandwidth * 1e9, source="as given")
    if options.tflops is not None:
        rate = options.tflops * 1e12
        card = replace(card, tensor=rate, fp32=rate, source="as given")
    if options.predict and (card.source != "data sheet" or options.dtype == "fp32"):
        parser.error("--predict must go with a data sheet's limits and a 16-bit dtype")
    problem = (options.depth, options.batch_size, options.dtype)
    if options.resources and not options.predict:
        parser.error("--resources must go with --predict")
    try:
        lines = floor_lines(*problem, card)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"ResNet-{options.depth}, batch {options.batch_size}, {options.dtype}; {card.name} "
        f"({card.source}): {card.bandwidth / 1e9:.0f} GB/s, "
        f"{card.arithmetic(options.dtype) / 1e12:.1f} TFLOP/s"
    )
    print("\n".join(kernel_lines(training_step(*problem), card, options.dtype) + lines))
    if options.predict:
        print("\n".join(prediction_lines(*problem, card) + counted_lines(*problem, card)))
    if options.resources:
        holds, words = prediction.check_resources(card.architecture)
        print(f"  resources, compiled for sm_{card.architecture}: {words}")
        return 0 if holds else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
