"""What the CUDA kernels of a training step cost, counted: ``python -m ptx.counts``, from tests/.

Each kernel runs twice in one block (two, where two share their images), on 8 and on 16 images. The
difference is what an image costs, the rest what a block costs: its prologue and its end. Warps are
told apart by what they do:

    weight gradient   they transpose while they load matrices
    convolution       they use the tensor cores otherwise; in a backward kernel the input gradient
    producer          the others, where there are such
    all               where all warps do the same

``--write`` keeps the counts in bench/kernel_counts.json, to which test_counts.py holds the kernels
and from which bench.roofline predicts.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import test_conv3x3_emulated as convolutions
import test_pool_emulated as pool
import test_stem_emulated as stem
import torch

from ptx import build, cuda
from tools import ptxas_report

KEPT = Path(__file__).parents[2] / "bench" / "kernel_counts.json"
ARCHITECTURE = 80
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FEW, MANY = 8, 16  # images
# columns of the machine's counts of a warp, as in counters.h
PIPES = ("tensor", "float", "integer", "convert", "shared", "global", "move", "control")
FIELDS = (
    *PIPES,
    "sectors",
    "sector_bytes",
    "wavefronts",
    "least_wavefronts",
    "barriers",
    "waited",
)
TRANSPOSED = len(FIELDS)


class Counting(cuda.Kernels):
    """Runs each call once, and keeps what it counted, by the name of the function."""

    def call(self, function, params, dtype, *sizes):
        self.machine.synchronise()
        self.set_order("forward")
        status = super(cuda.Kernels, self).call(function, params, dtype, *sizes)
        self.check(function)
        self.last = getattr(self, "last", {})
        self.last[function] = (
            self.machine.last_kernel,
            self.machine.warp_counts().astype(np.int64),
            self.machine.instruction_counts().astype(np.int64),
        )
        return status


@dataclass(frozen=True)
class Kernel:
    """How one kernel is run.

    function: of the launcher
    run: calls it with kernels, images, blocks and dtype
    blocks: that share their images
    images_together: that a group of warps works on side by side
    """

    function: str
    run: Callable
    blocks: int = 1
    images_together: int = 1


TOGETHER = {16: 1, 32: 2, 64: 4}  # images, by the channels of a convolution's input


def forward(C, stride, kind) -> Kernel:
    def run(kernels, N, blocks, dtype):
        convolutions.test_forward(kernels, C, stride, kind, N, blocks, "forward", dtype)

    return Kernel("conv3x3_forward", run, 1, TOGETHER[C])


def backward(C, stride, b1) -> Kernel:
    def run(kernels, N, blocks, dtype):
        convolutions.test_backward(kernels, C, stride, b1, N, blocks, "forward", dtype)

    return Kernel("conv3x3_backward", run, 2 if C == 64 else 1, TOGETHER[C])


def others(function, test) -> Kernel:
    def run(kernels, N, blocks, dtype):
        test(kernels, N, blocks, "forward", dtype)

    return Kernel(function, run)


def run_pool(kernels, *arguments):
    pool.test_pool(kernels, "identity", *arguments)


# kernel and place, as bench.traffic has them
KERNELS = {
    ("stem", "32x32x16"): others("stem_forward", stem.test_stem_forward),
    ("F1, no shortcut", "32x32x16"): forward(16, 1, "no"),
    ("F1", "32x32x16"): forward(16, 1, "identity"),
    ("F1, stride 2", "16x16x32"): forward(16, 2, "identity"),
    ("F1, option A", "16x16x32"): forward(32, 1, "option_a"),
    ("F1", "16x16x32"): forward(32, 1, "identity"),
    ("F1, stride 2", "8x8x64"): forward(32, 2, "identity"),
    ("F1, stride 2, option A", "8x8x64"): forward(32, 2, "option_a"),
    ("F1, option A", "8x8x64"): forward(64, 1, "option_a"),
    ("F1", "8x8x64"): forward(64, 1, "identity"),
    ("F2", "32x32x16"): forward(16, 1, None),
    ("F2", "16x16x32"): forward(32, 1, None),
    ("F2", "8x8x64"): forward(64, 1, None),
    ("head", "8x8x64"): others("pool_forward", run_pool),
    ("head backward", "8x8x64"): others("pool_backward", run_pool),
    ("B2", "32x32x16"): backward(16, 1, False),
    ("B2", "16x16x32"): backward(32, 1, False),
    ("B2", "8x8x64"): backward(64, 1, False),
    ("B1", "32x32x16"): backward(16, 1, True),
    ("B1", "16x16x32"): backward(32, 1, True),
    ("B1", "8x8x64"): backward(64, 1, True),
    ("B1, stride 2", "16x16x32"): backward(16, 2, True),
    ("B1, stride 2", "8x8x64"): backward(32, 2, True),
    ("stem backward", "32x32x16"): others("stem_backward", stem.test_stem_backward),
}


@functools.cache
def counting() -> Counting:
    return Counting(ARCHITECTURE)


def roles_of(warps: np.ndarray) -> dict[str, np.ndarray]:
    """Role to which warps have it."""
    tensor, transposed = warps[:, PIPES.index("tensor")] > 0, warps[:, TRANSPOSED] > 0
    roles = {
        "weight gradient": transposed,
        "convolution": tensor & ~transposed,
        "producer": ~tensor & ~transposed,
    }
    found = {role: chosen for role, chosen in roles.items() if chosen.any()}
    return found if len(found) > 1 else {"all": np.ones(len(warps), dtype=bool)}


def tidy(value: float) -> float:
    """Without the tail of a division by the number of images."""
    return round(float(value), 2)


def count(name: tuple[str, str], dtype: str) -> dict:
    """Roles and conflicts of one kernel; see the module."""
    one = KERNELS[name]
    kernels, made = counting(), []
    for images in (FEW, MANY):
        one.run(kernels, images, one.blocks, DTYPES[dtype])
        made.append(kernels.last[one.function])
    (kernel, few, few_code), (_, many, many_code) = made
    image = (many - few) / (MANY - FEW)
    block = few - FEW * image
    roles = {}
    for role, chosen in roles_of(many).items():
        roles[role] = {"warps": int(chosen.sum())}
        for what, counts in (("image", image), ("block", block)):
            sums = counts[chosen].sum(0)
            roles[role][what] = {
                field: tidy(total) for field, total in zip(FIELDS, sums, strict=False)
            }
    conflicts = {}
    lines = kernels.machine.instructions(kernel)
    for (_, instruction), a, b in zip(lines, few_code, many_code, strict=True):
        executed, wavefronts, least = (b - a) / (MANY - FEW)
        if wavefronts > least:
            key = (instruction, tidy(wavefronts / executed), tidy(least / executed))
            conflicts[key] = conflicts.get(key, 0) + executed
    return {
        "blocks": one.blocks,
        "images_together": one.images_together,
        "roles": roles,
        "conflicts": [
            {"instruction": key[0], "wavefronts": key[1], "least": key[2], "image": tidy(times)}
            for key, times in sorted(conflicts.items())
        ],
    }


def name_of(kernel: tuple[str, str], dtype: str) -> str:
    return f"{kernel[0]} at {kernel[1]}, {dtype}"


def lines_of(name: str, counts: dict) -> list[str]:
    """For a reader: a line for each role, and for each kind of conflict."""
    lines = []
    for role, made in counts["roles"].items():
        one = made["image"]
        pipes = " ".join(f"{one[pipe]:8.0f}" for pipe in PIPES)
        used = one["sector_bytes"] / (32 * one["sectors"]) if one["sectors"] else 1.0
        lines.append(
            f"{name:38} {role:15} {made['warps']:3} {pipes} {one['sectors']:8.0f} {used:5.0%} "
            f"{one['wavefronts']:8.0f} {one['least_wavefronts']:8.0f} {one['barriers']:5.0f} "
            f"{one['waited']:7.0f}"
        )
    lines += [
        f"    {c['wavefronts']:g} wavefronts for {c['least']:g}, {c['image']:g} times an image: "
        f"{c['instruction']}"
        for c in counts["conflicts"]
    ]
    return lines


def differences(kept: dict, made: dict) -> list[str]:
    """What a reviewer has to know of a kernel, a line each: another number of wavefronts or
    sectors, and a role that has a tenth more or fewer instructions."""
    found = []
    if kept["roles"].keys() != made["roles"].keys():
        return [f"roles: {', '.join(kept['roles'])}; now {', '.join(made['roles'])}"]
    for role, now in made["roles"].items():
        before, now = kept["roles"][role]["image"], now["image"]
        for field in ("sectors", "sector_bytes", "wavefronts", "least_wavefronts"):
            if now[field] != before[field]:
                found.append(f"{role}: {field} of an image: {before[field]:g}, now {now[field]:g}")
        before, now = (sum(counts[pipe] for pipe in PIPES) for counts in (before, now))
        if abs(now - before) > before / 10:
            found.append(f"{role}: instructions of an image: {before:g}, now {now:g}")
    if kept["conflicts"] != made["conflicts"]:
        found.append(f"conflicts: {kept['conflicts']}, now {made['conflicts']}")
    return found


@functools.cache
def compiler() -> str:
    """Release of the nvcc here, such as 13.0: another one makes other instructions."""
    command = [ptxas_report.find_nvcc(), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def kept() -> dict:
    """``{"nvcc": release, "kernels": {name: counts}}``, as ``--write`` left it."""
    return json.loads(KEPT.read_text())


def text_of(counts: dict) -> str:
    """JSON with a line for each role and each conflict, so that a review shows what changed."""

    def block(lines, brackets):
        return brackets[0] + "\n  " + ",\n  ".join(lines) + brackets[1] if lines else brackets

    kernels = []
    for name, made in counts.items():
        roles = [f"{json.dumps(role)}: {json.dumps(one)}" for role, one in made["roles"].items()]
        conflicts = [json.dumps(one) for one in made["conflicts"]]
        kernels.append(
            f'{json.dumps(name)}: {{\n "blocks": {made["blocks"]},'
            f' "images_together": {made["images_together"]},\n "roles": {block(roles, "{}")},\n'
            f' "conflicts": {block(conflicts, "[]")}\n}}'
        )
    return f'{{"nvcc": "{compiler()}", "kernels": {{\n' + ",\n".join(kernels) + "\n}}\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ptx.counts", description=__doc__.split(":")[0]
    )
    parser.add_argument("--write", action="store_true", help=f"keep the counts in {KEPT.name}")
    options = parser.parse_args()
    reason = build.why_not()
    if reason is not None:
        sys.exit(reason)
    torch.set_num_threads(1)
    print(f"compiled for sm_{ARCHITECTURE}, counted for an image; wavefronts are shared memory's")
    print(
        f"{'kernel':38} {'role':15} {'wps':>3} {' '.join(f'{pipe:>8}' for pipe in PIPES)} "
        f"{'sectors':>8} {'used':>5} {'wavefr.':>8} {'least':>8} {'barr.':>5} {'waited':>7}"
    )
    made = {}
    for dtype in DTYPES:
        for kernel in KERNELS:
            name = name_of(kernel, dtype)
            made[name] = count(kernel, dtype)
            print("\n".join(lines_of(name, made[name])), flush=True)
    if options.write:
        KEPT.write_text(text_of(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
