"""A training step's time on a card that nobody has measured, from kernels measured on another.

A prediction, to be called one wherever it is shown. It takes the CUDA prototypes of this package's
convolutions as they were measured on an H100, in chains as a network runs them, and asks what they
exceed their floors by. On the other card a launch then takes

* at best its floor there and the same microseconds on top (latency, prologues, the tail);
* at worst its floor there times the same factor.

Launches without a measurement take their floor at best and twice that at worst.
"""

from collections.abc import Iterable
from dataclasses import replace

from bench.cards import CARDS, Card
from bench.traffic import Sizes, Work, backward_1, backward_2, forward_1, forward_2
from tools import ptxas_report

# H100 80GB HBM3 (SXM), batch 1024, bf16, 2026-11-22: prototypes of the convolutions. Microseconds
# a layer by stage, mean of a block's two; merge of the statistics and slab sum included.
MEASURED_ON, BATCH, DTYPE = "H100 80GB HBM3, batch 1024, bf16, 2026-11-22", 1024, "bf16"
FORWARD_US = (39.7, 21.7, 16.8)
BACKWARD_US = (70.8, 41.8, 42.4)
# the same prototypes, each by itself: (kernel, place) to microseconds
PROTOTYPE = "prototype, H100, batch 1024, bf16"
PROTOTYPE_US = {
    ("F1", "32x32x16"): 52.6,
    ("F1", "16x16x32"): 27.7,
    ("F1", "8x8x64"): 17.4,
    ("F1, stride 2", "16x16x32"): 44.7,
    ("F1, stride 2", "8x8x64"): 24.0,
    ("F2", "32x32x16"): 27.9,
    ("F2", "16x16x32"): 17.3,
    ("F2", "8x8x64"): 15.6,
    ("B1", "32x32x16"): 79.4,
    ("B1", "16x16x32"): 41.5,
    ("B1", "8x8x64"): 38.5,
    ("B2", "32x32x16"): 56.0,
    ("B2", "16x16x32"): 38.0,
    ("B2", "8x8x64"): 38.8,
}
COPY_BANDWIDTH = 3.0e12  # bytes/s, measured there
MMA_RATE = 604e12  # FLOP/s of mma.sync, the upper of two measurements there, 571e12 and 604e12

MEASURED = Card("H100", COPY_BANDWIDTH, MMA_RATE, 0.0, 90, "measured 2026-11-22")
COPY_SHARE = COPY_BANDWIDTH / CARDS["H100"].bandwidth


def _measured_floor(stage: int, backward: bool) -> float:
    """Seconds: the floor of a layer of ``stage`` on the card that was measured."""
    s = Sizes(BATCH, DTYPE)
    pair = (
        (backward_2(s, stage), backward_1(s, stage, stage))
        if backward
        else (forward_1(s, stage, stage, s.stage(stage)), forward_2(s, stage))
    )
    return sum(work.floor(MEASURED, DTYPE) for work in pair) / 2


def measured_excess(work: Work) -> tuple[float, float] | None:
    """By what the prototype of ``work`` exceeds its floor: (seconds, factor); None: unmeasured."""
    times = {"F": FORWARD_US, "B": BACKWARD_US}.get(work.kernel[0])
    if times is None or work.kernel[1] not in "12":
        return None
    stage = ("32x32x16", "16x16x32", "8x8x64").index(work.place)
    floor = _measured_floor(stage, backward=times is BACKWARD_US)
    seconds = times[stage] * 1e-6
    return seconds - floor, seconds / floor


def predict(steps: Iterable[Work], card: Card, dtype: str) -> tuple[float, float]:
    """Seconds of ``steps`` on ``card``, at best and at worst.

    Args:
        steps: launches, as ``roofline.training_step`` lists them
        card: limits by its data sheet
        dtype: fp16 or bf16
    """
    reached = replace(card, bandwidth=card.bandwidth * COPY_SHARE)
    best = worst = 0.0
    for work in steps:
        floor = work.floor(reached, dtype)
        excess, factor = measured_excess(work) or (0.0, 2.0)
        best += floor + excess
        worst += floor * factor
    return best, worst


def check_resources(architecture: int) -> tuple[bool, str]:
    """Whether the convolutions compile for ``architecture`` without spills, and that in words.

    Their shared memory is checked where they are written, by the compiler.
    """
    nvcc, sources = ptxas_report.find_nvcc(), ptxas_report.sources()
    sources = [source for source in sources if source.parent.name == "conv3x3"]
    if nvcc is None or not sources:
        what = "there is no nvcc" if nvcc is None else "csrc/conv3x3 has no *.cu"
        return False, f"unchecked, {what}"
    kernels = [
        kernel
        for source in sources
        for kernel in ptxas_report.report(source, nvcc, (architecture,))
    ]
    spilling = [kernel.name for kernel in kernels if kernel.spilled]
    if spilling:
        return False, f"does not hold, {len(spilling)} kernels spill: {', '.join(spilling)}"
    registers = max(kernel.registers for kernel in kernels)
    return True, f"holds, {len(kernels)} kernels without spills, at most {registers} registers"


def assumptions(card: Card) -> list[str]:
    """What must hold for the prediction to hold, one line each."""
    return [
        "convolutions are as good against their floors as the prototypes that were measured: "
        f"{MEASURED_ON}",
        f"a copy reaches {COPY_SHARE:.0%} of the data sheet's {card.bandwidth / 1e9:.0f} GB/s, "
        "as it does on that H100",
        f"mma.sync reaches the data sheet's {card.tensor / 1e12:.1f} TFLOP/s (on an H100 it "
        "cannot, but there it is not the native instruction)",
        "compiled for this card the kernels do not spill and fit its shared memory with as many "
        "warps a multiprocessor; the ahead-of-time resource reports check that",
        "launches follow each other without gaps, as in a CUDA graph",
        "at best launches keep the microseconds above their floors, at worst the factor; "
        "launches that were not measured take one to two times their floor",
    ]
