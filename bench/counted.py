"""A kernel's time from what its compiled code costs and the card's data sheet.

``kernel_counts.json`` has the costs, counted without a GPU by tests/ptx/counts.py. A launch has
one block a multiprocessor, as the package has it, and takes the longest of

* memory: its tensors once, at the share of the data sheet's bandwidth that a copy reaches;
* tensor: its matrix instructions, at the rate that mma.sync reaches;
* shared: its wavefronts of shared memory, one a cycle;
* issue: its instructions but moves, four a cycle;

each for the block with the most images. Latencies, the wait at barriers and the start of a launch
are not in it: at small batches they decide, and the model is too low. Launches that are not
counted (the loader, the last layer, the optimizer) take their floor.
"""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cards import Card
from bench.prediction import COPY_SHARE, MMA_RATE
from bench.traffic import Work

COUNTS = Path(__file__).with_name("kernel_counts.json")
MMA_FLOPS = 2 * 16 * 8 * 16  # of one mma.sync m16n8k16
ISSUED = 4  # instructions a cycle and multiprocessor
# of the pipes of tests/ptx all but the moves, which the assembler mostly removes
PIPES = ("tensor", "float", "integer", "convert", "shared", "global", "control")
# measured: milliseconds a training step on an H200, fp16, 2026-11-26; see
# results/2026-11-26-h200/README.md
STEPS_ON_H200 = {(56, 1024): 3.70, (20, 1024): 1.382, (20, 128): 0.680}


@dataclass(frozen=True)
class Times:
    """Seconds that a launch takes at least, by what limits it."""

    memory: float
    tensor: float
    shared: float
    issue: float

    @property
    def longest(self) -> float:
        return max(vars(self).values())

    @property
    def limit(self) -> str:
        return max(vars(self), key=vars(self).get)


@functools.cache
def counts() -> dict[str, dict]:
    """Kernel and dtype to what tests/ptx/counts.py kept of it."""
    return json.loads(COUNTS.read_text())["kernels"]


def reached(card: Card) -> Card:
    """What kernels reach of a data sheet: as a copy and mma.sync do on an H100. There mma.sync is
    not the native instruction of the tensor cores; on older cards it is."""
    tensor = min(card.tensor, MMA_RATE) if card.architecture == 90 else card.tensor
    return replace(card, bandwidth=card.bandwidth * COPY_SHARE, tensor=tensor)


def times(work: Work, batch: int, card: Card, dtype: str) -> Times | None:
    """Of one launch on ``card``; None: its kernel is not counted.

    Args:
        work: as ``roofline.training_step`` lists it
        batch: images
        card: limits by its data sheet
        dtype: fp16 or bf16
    """
    made = counts().get(f"{work.kernel} at {work.place}, {dtype}")
    if made is None:
        return None
    limits = reached(card)
    # blocks that share their images, and the images of those with the most
    sharing, together = made["blocks"], made["images_together"]
    groups = -(-batch // together)
    images = -(-groups // (card.multiprocessors // sharing)) * together

    def of_a_block(*fields: str) -> float:
        """Sum over the roles of the warps."""
        return (
            sum(
                images * role["image"][field] + role["block"][field]
                for role in made["roles"].values()
                for field in fields
            )
            / sharing
        )

    return Times(
        memory=work.bytes / limits.bandwidth,
        tensor=of_a_block("tensor") * MMA_FLOPS * card.multiprocessors / limits.tensor,
        shared=of_a_block("wavefronts") / card.clock,
        issue=of_a_block(*PIPES) / ISSUED / card.clock,
    )


def step(steps: Iterable[Work], batch: int, card: Card, dtype: str) -> float:
    """Seconds of all launches, one after another; arguments as ``times``'s."""
    total = 0.0
    for work in steps:
        made = times(work, batch, card, dtype)
        total += work.floor(reached(card), dtype) if made is None else made.longest
    return total
