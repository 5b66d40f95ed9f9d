"""The compiled CUDA kernels against float64, in every order of warps, for batches of 1, 3 and 5.

The cases are those of the emulated tests, whose functions run here on the interpreter.
"""

import pytest
import test_conv3x3_emulated as convolutions
import test_evaluate_emulated as evaluation
import test_pool_emulated as pool
import test_shortcut_a_emulated as shortcuts
import test_stem_emulated as stem
import torch
from emulation.checks import DTYPES, fragments

from ptx import cuda

BATCHES = {1: 2, 3: 1, 5: 2}  # batch: blocks
FORWARD = [  # C, stride, shortcut ("no" shortcut; None: F2)
    *[(16, 1, kind) for kind in ("identity", "no", None)],
    *[(C, 1, kind) for C in (32, 64) for kind in ("identity", "option_a", None)],
    *[(16, 2, kind) for kind in ("identity", "no")],
    *[(32, 2, kind) for kind in ("identity", "option_a")],
]
BACKWARD = [  # C, stride, B1
    *[(C, 1, b1) for C in (16, 32, 64) for b1 in (False, True)],
    *[(C, 2, True) for C in (16, 32)],
]
EVALUATE = [  # C, stride, shortcut
    *[(16, 1, kind) for kind in ("none", "identity")],
    *[(C, 1, kind) for C in (32, 64) for kind in ("none", "identity", "option_a")],
    *[(C, 2, "none") for C in (16, 32)],
]
ORDER = "every"  # of the warps: cuda.Kernels runs them all

in_both_types = pytest.mark.parametrize("dtype", DTYPES, ids=str)
in_batches = pytest.mark.parametrize("N", BATCHES, ids=lambda N: f"batch-{N}")


def words(case) -> str:
    return "-".join(str(value) for value in case)


@pytest.fixture
def kernels(architecture, all_cases, request):
    batch = request.node.callspec.params.get("N")
    if architecture != 80 and batch in (1, 5) and not all_cases:
        pytest.skip("needs --all-compiled")
    return cuda.kernels(architecture)


@in_both_types
@in_batches
@pytest.mark.parametrize("case", FORWARD, ids=words)
def test_forward(kernels, case, N, dtype):
    convolutions.test_forward(kernels, *case, N, BATCHES[N], ORDER, dtype)


@in_both_types
@in_batches
@pytest.mark.parametrize("case", BACKWARD, ids=words)
def test_backward(kernels, case, N, dtype):
    convolutions.test_backward(kernels, *case, N, BATCHES[N], ORDER, dtype)


@in_both_types
@in_batches
@pytest.mark.parametrize("case", EVALUATE, ids=words)
def test_evaluate(kernels, case, N, dtype):
    evaluation.test_evaluate(kernels, *case, N, BATCHES[N], ORDER, dtype)


@in_both_types
@pytest.mark.parametrize("C", [16, 64])
def test_sums_feed_the_next_kernel(kernels, C, dtype):
    convolutions.test_sums_feed_the_next_kernel(kernels, C, dtype)


@in_both_types
@in_batches
def test_stem(kernels, N, dtype):
    stem.test_stem_forward(kernels, N, BATCHES[N], ORDER, dtype)
    stem.test_stem_backward(kernels, N, BATCHES[N], ORDER, dtype)


@in_both_types
def test_evaluate_stem(kernels, dtype):
    evaluation.test_evaluate_stem(kernels, dtype)


@in_both_types
@in_batches
@pytest.mark.parametrize("kind", ["identity", "option_a"])
def test_pool(kernels, kind, N, dtype):
    pool.test_pool(kernels, kind, N, BATCHES[N], ORDER, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("count", [1, 66, 300])
def test_sum_slabs(kernels, count, layout):
    stem.test_sum_slabs(kernels, 16, 32, count, 3, layout)


def lane_weights(weight):
    """The fragments of a [K, C, 3, 3] weight, element by element as weights.h has them."""
    K, C = weight.shape[:2]
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    made = []
    for h in range(K // 16):
        out = 16 * h + 4 * (g // 2) + g % 2
        for tap in weight.flatten(2).unbind(2):
            for s in range(C // 16):
                into = 16 * s + 2 * t
                made += [tap[out + 2 * p, into + d] for p in (0, 1) for d in (0, 1, 8, 9)]
    return torch.stack(made).view(-1, 8, 32).transpose(1, 2).flatten()


@in_both_types
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("K", "C"), [(16, 3), (16, 16), (32, 16), (32, 32), (64, 32), (64, 64)])
def test_weights(kernels, K, C, last, dtype):
    weight = torch.randn(K, C, 3, 3, generator=torch.Generator().manual_seed(K + C))
    layout = torch.channels_last if last else torch.contiguous_format
    made = fragments(kernels, weight.contiguous(memory_format=layout), dtype)
    rounded = weight.to(dtype)
    if C == 3:  # 16 "input channels" of row ky: 4 pixels kx times 4 channels
        padded = torch.zeros(K, 4, 4, 3, dtype=dtype)  # [K, kx, c, ky]
        padded[:, :3, :3] = rounded.permute(0, 3, 1, 2)
        assert torch.equal(made["forward"], lane_weights(padded.view(K, 16, 3, 1)))
        return
    assert torch.equal(made["forward"], lane_weights(rounded))
    mirrored = rounded.flip(2, 3).transpose(0, 1)
    assert torch.equal(made["backward"], lane_weights(mirrored))


@pytest.mark.parametrize("dtype", shortcuts.DTYPES, ids=str)
@pytest.mark.parametrize("shape", shortcuts.SHAPES.values(), ids=shortcuts.SHAPES)
def test_shortcut_a(kernels, shape, dtype):
    shortcuts.test_shortcut_a(kernels, shape, ORDER, dtype)
