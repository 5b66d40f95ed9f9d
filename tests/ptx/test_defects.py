"""Mistakes planted in the compiled code of the kernels, each of which the interpreter or the error
budget finds. In PTX they are what the same mistakes in inline-assembly statements compile to."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_conv3x3_emulated as convolutions
import test_stem_emulated as stem
import torch

from cifar_resnet_fast.verification.budget import WrongResult
from ptx import build, cuda

half = torch.float16
NUMBERS = "of the error must be at most|must be finite"  # the error budget's words


def forward(kernels):
    """F1 with 16 channels: rings of copies, haloed rows, three warps a group."""
    convolutions.test_forward(kernels, 16, 1, "identity", 3, 1, "every", half)


def forward_64(kernels):
    """One image of the four that lie side by side."""
    convolutions.test_forward(kernels, 64, 1, "identity", 1, 1, "every", half)


def backward(kernels):
    convolutions.test_backward(kernels, 32, 1, True, 3, 1, "every", half)


def backward_16(kernels):
    convolutions.test_backward(kernels, 16, 1, True, 3, 1, "every", half)


def stem_backward(kernels):
    stem.test_stem_backward(kernels, 3, 1, "every", half)


@dataclass(frozen=True)
class Defect:
    """``wrong`` in place of every ``right``, a regular expression, in one of the kernels that
    ``case`` runs: the one whose mangled name contains ``kernel``."""

    case: Callable
    kernel: str
    right: str
    wrong: str
    found: str  # a regular expression, in the message
    architecture: int = 80

    def plant(self, text: str) -> str:
        start = re.search(rf"\.entry \w*{self.kernel}\w*\(", text).start()
        end = text.find("\n}\n", start)
        changed, count = re.subn(self.right, self.wrong, text[start:end])
        assert count > 0, f"there is no {self.right}"
        return text[:start] + changed + text[end:]


F1 = "conv3x3_forward_kernelINS_7Float16ELi16ELi1ELb1E"
F1_64 = "conv3x3_forward_kernelINS_7Float16ELi64ELi1ELb1E"
B1 = "conv3x3_backward_kernelINS_16BackwardGeometryINS_7Float16ELi32ELi1ELb1E"
B1_16 = "conv3x3_backward_kernelINS_16BackwardGeometryINS_7Float16ELi16ELi1ELb1E"
MMA = r"(mma\S+ \{[^}]*\},)"  # and d
RACE = "no barrier|nothing has written"

DEFECTS = {
    "operands-of-a-swapped": Defect(
        forward, F1, MMA + r"\{(\S+?),(\S+?),(\S+?),", r"\1{\2,\4,\3,", NUMBERS
    ),
    "operands-of-b-swapped": Defect(
        forward, F1, MMA + r"(\{[^}]*\}),\{(\S+?),(\S+?)\}", r"\1\2,{\4,\3}", NUMBERS
    ),
    "halves-of-a-pair-swapped": Defect(
        forward, F1, r"(cvt.rn.f16x2.f32 %\w+),(%\w+),(%\w+);", r"\1,\3,\2;", NUMBERS
    ),
    "trans-forgotten": Defect(backward, B1, r"\.x4\.trans", ".x4", NUMBERS),
    "trans-too-many": Defect(forward, F1, r"m8n8\.x4\.shared", "m8n8.x4.trans.shared", NUMBERS),
    "no-wait-for-copies": Defect(
        forward, F1, r"cp\.async\.wait_group \d+;", "", "before the wait for the copy"
    ),
    "wait-for-one-copy-too-few": Defect(
        forward, F1, r"wait_group 3;", "wait_group 4;", "before the wait for the copy"
    ),
    "no-commit-of-copies": Defect(
        backward, B1, r"cp\.async\.commit_group;", "", "before the wait for the copy"
    ),
    "copy-reads-what-is-not-there": Defect(
        forward_64, F1_64, r"(cp\.async\.cg\S+ \[%\w+\],\[%\w+\],16),%\w+", r"\1",
        "outside of every",
    ),
    "no-block-barrier": Defect(forward, F1, r"bar\.sync\s+0;", "", RACE),
    "no-group-barrier": Defect(forward, F1, r"bar\.sync %\w+,\d+;", "", RACE),
    "barrier-with-a-warp-too-few": Defect(
        forward, F1, r"(bar\.sync %\w+),64;", r"\1,32;", f"{RACE}|barrier|deadlock"
    ),
    "barrier-with-a-warp-too-many": Defect(
        forward, F1, r"(bar\.sync %\w+),64;", r"\1,96;", "deadlock"
    ),
    "barrier-of-another-group": Defect(
        backward_16, B1_16, r"bar\.sync %\w+,", "bar.sync 1,", f"{RACE}|barrier|deadlock"
    ),
    "no-warp-barrier": Defect(
        stem_backward, "stem_backward_kernelINS_7Float16E", r"bar\.warp\.sync\s+-?\w+;", "", RACE
    ),
    "shared-store-one-unit-further": Defect(
        forward, F1, r"(st\.shared\.v4\.u32 \[%\w+)\]", r"\1+16]", f"{NUMBERS}|{RACE}|bounds"
    ),
    "shared-load-one-byte-further": Defect(
        backward, B1, r"(ldmatrix\S+ \{[^}]*\},\[%\w+)\]", r"\1+1]", "misaligned"
    ),
    "store-past-the-end": Defect(
        forward, F1, r"(st\.global\.v4\.u32\s+\[%\w+)\]", r"\1+16]", "outside of every|two blocks"
    ),
    "shuffle-of-another-kind": Defect(
        forward, F1, r"shfl\.sync\.bfly", "shfl.sync.idx", NUMBERS
    ),
    "relu-forgotten": Defect(
        forward, F1, r"max\.NaN\.f32 (%\w+),(%\w+),\S+;", r"mov.f32 \1,\2;", NUMBERS
    ),
    "no-wait-for-the-kernel-before": Defect(
        forward, F1, r"griddepcontrol\.wait;", "", "griddepcontrol.wait", 90
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_defect_is_found(defect, request):
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    kernels = cuda.kernels(defect.architecture)
    unit = next(
        text
        for path in kernels.folder.glob("*.ptx")
        if re.search(rf"\.entry \w*{defect.kernel}", text := path.read_text())
    )
    kernels.machine.load(defect.plant(unit))
    try:
        with pytest.raises((WrongResult, cuda.WrongLaunch), match=defect.found):
            defect.case(kernels)
    finally:
        kernels.machine.load(unit)
        kernels.machine.take_findings()
        kernels.library.emulated_forbid_all()
