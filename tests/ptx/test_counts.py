"""What the kernels cost is what was kept: a conflict of banks, a sector or a tenth of a role's
instructions more is seen here, without a GPU."""

import copy
import math

import pytest

from ptx import build, counts

KEPT = counts.kept()["kernels"]
HINT = "if that is meant: PYTHONPATH=tests:. python -m ptx.counts --write"


@pytest.mark.parametrize("dtype", counts.DTYPES)
@pytest.mark.parametrize("kernel", counts.KERNELS, ids=lambda kernel: " at ".join(kernel))
def test_cost_is_what_was_kept(kernel, dtype, all_cases):
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    if dtype == "bf16" and not all_cases:
        pytest.skip("needs --all-compiled")
    release = counts.kept()["nvcc"]
    if release != counts.compiler():
        pytest.skip(f"was counted with nvcc {release}, here is {counts.compiler()}")
    found = counts.differences(KEPT[counts.name_of(kernel, dtype)], counts.count(kernel, dtype))
    assert not found, "\n".join([*found, HINT])


def test_every_kernel_is_kept():
    names = {counts.name_of(kernel, dtype) for kernel in counts.KERNELS for dtype in counts.DTYPES}
    assert set(KEPT) == names


LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


@pytest.mark.parametrize(
    ("kernel", "instruction", "wavefronts", "least"),
    [
        pytest.param("F1, stride 2 at 16x16x32", LDMATRIX, 8, 4, id="stride-2-fragments-of-16"),
        pytest.param("F1, stride 2 at 8x8x64", LDMATRIX, 8, 4, id="stride-2-fragments-of-32"),
        pytest.param("B1, stride 2 at 16x16x32", TRANSPOSED, 8, 4, id="weight-gradient-of-16"),
        pytest.param("B1, stride 2 at 8x8x64", TRANSPOSED, 8, 4, id="weight-gradient-of-32"),
        pytest.param("B1 at 32x32x16", "ld.shared.v2.u32", 4, 2, id="direct-mask-of-B1"),
        pytest.param("B2 at 32x32x16", "ld.shared.v2.u32", 4, 2, id="direct-mask-of-B2"),
    ],
)
def test_conflicts_that_a_model_of_the_banks_knows(kernel, instruction, wavefronts, least):
    """Found by hand before; test_cost_is_what_was_kept says that the counts still have them. The
    transposed loads of the stride-1 weight gradient with 16 channels had one, too, until they read
    pixels in the order of the forward product."""
    for dtype in counts.DTYPES:
        found = KEPT[f"{kernel}, {dtype}"]["conflicts"]
        assert (instruction, wavefronts, least) in [
            (one["instruction"], one["wavefronts"], one["least"]) for one in found
        ]
    stride_1 = KEPT["B1 at 32x32x16, fp16"]["conflicts"]
    assert TRANSPOSED not in [one["instruction"] for one in stride_1]


def a_sector(image):
    image["sectors"] += 1


def a_wavefront(image):
    image["wavefronts"] += 1


def a_tenth_more_instructions(image):
    image["integer"] += math.ceil(sum(image[pipe] for pipe in counts.PIPES) / 10) + 1


def a_tenth_fewer_instructions(image):
    image["move"] -= math.ceil(sum(image[pipe] for pipe in counts.PIPES) / 10) + 1


@pytest.mark.parametrize(
    "change", [a_sector, a_wavefront, a_tenth_more_instructions, a_tenth_fewer_instructions]
)
def test_a_change_is_seen(change):
    kept = KEPT["F1 at 32x32x16, fp16"]
    made = copy.deepcopy(kept)
    assert counts.differences(kept, made) == []
    change(made["roles"]["producer"]["image"])
    (line,) = counts.differences(kept, made)
    assert line.startswith("producer: ")
