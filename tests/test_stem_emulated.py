"""The stem's CUDA kernels and the sum of slabs, run on a CPU, against float64."""

import emulation
import pytest
import torch
import torch.nn.functional as F
from emulation.checks import (
    DTYPES,
    flat,
    fragments,
    image,
    in_torch_order,
    norm_params,
    partial_sums,
    poisoned,
    poisoned_image,
    saved_of,
)
from torch import Tensor

from cifar_resnet_fast.verification.budget import assert_within_budget

BATCHES = [  # N, blocks, order
    pytest.param(3, 1, "last_warp_first", id="ragged-3"),
    pytest.param(1, 2, "round_robin", id="one-picture-idle-warps"),
    pytest.param(5, 1, "first_warp_first", id="prime-5"),
]


def pictures(generator, N: int, dtype: torch.dtype) -> Tensor:
    """[N, 4, 32, 32], channels-last; the fourth channel is to be ignored."""
    values = 0.5 * torch.randn(N, 4, 32, 32, generator=generator) - 2.3
    values[:, 3] = float("nan")
    return values.to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "blocks", "order"), BATCHES)
def test_stem_forward(kernels, N, blocks, order, dtype):
    generator = torch.Generator().manual_seed(N)
    x = pictures(generator, N, dtype)
    weight = torch.randn(16, 3, 3, 3, generator=generator) / 5
    y, sums = poisoned_image(N, 16, dtype), poisoned(blocks, 2, 16)
    kernels.set_order(order)
    params = kernels.params(
        "StemForwardParams",
        images=flat(x),
        fragments=fragments(kernels, weight, dtype)["forward"],
        y=flat(y),
        y_sums=sums,
        batch=N,
    )
    assert kernels.call("stem_forward", params, dtype, blocks) == 0

    exact = F.conv2d(x[:, :3].double(), weight.double(), padding=1)
    eager = F.conv2d(x[:, :3], weight.to(dtype), padding=1)
    assert_within_budget("y", y, eager.to(y.dtype), exact)
    exact_sums, eager_sums = (
        torch.stack([v.sum((0, 2, 3)), (v * v).sum((0, 2, 3))]) for v in (exact, eager.double())
    )
    assert_within_budget("sums", sums.double().sum(0).float(), eager_sums.float(), exact_sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "blocks", "order"), BATCHES)
def test_stem_backward(kernels, N, blocks, order, dtype):
    generator = torch.Generator().manual_seed(N)
    x = pictures(generator, N, dtype)
    y = image(generator, N, 16, dtype)
    dz = image(generator, N, 16, dtype, 1.0, 0.0)
    norm = norm_params(16, generator)
    saved = saved_of(y, norm)
    slabs, dweight = poisoned(blocks, 9, 4, 16), poisoned(16, 3, 3, 3)
    dbn_weight, dbn_bias = poisoned(16), poisoned(16)
    kernels.set_order(order)
    params = kernels.params(
        "StemBackwardParams",
        dz=flat(dz),
        y=flat(y),
        bn={
            "sums": partial_sums(dz, y.double() - saved[0].double()[:, None, None], 5),
            "rows": 5,
            "weight": norm["weight"],
            "norm": saved,
            "dweight": dbn_weight,
            "dbias": dbn_bias,
        },
        images=flat(x),
        slabs=slabs,
        batch=N,
    )
    assert kernels.call("stem_backward", params, dtype, blocks) == 0
    rest = kernels.params(
        "SlabSum", slabs=slabs, count=blocks, C=4, K=16, C_kept=3, dweight=dweight
    )
    assert kernels.call("sum_slabs", rest, dtype, 2) == 0

    def plain(kind):
        statistics = torch.float64 if kind == torch.float64 else torch.float32
        mean, invstd = saved[0].to(statistics), saved[1].to(statistics)
        dy, dbn_weight, dbn_bias = torch.ops.aten.native_batch_norm_backward(
            dz.to(kind), y.to(kind), norm["weight"].to(statistics), None, None, mean, invstd,
            True, 1e-5, [True, True, True],
        )  # fmt: skip
        dweight = torch.nn.grad.conv2d_weight(x[:, :3].to(kind), (16, 3, 3, 3), dy, padding=1)
        return {"dweight": dweight, "dbn_weight": dbn_weight, "dbn_bias": dbn_bias}

    exact, eager = plain(torch.float64), plain(dtype)
    ours = {"dweight": dweight, "dbn_weight": dbn_weight, "dbn_bias": dbn_bias}
    for name, value in exact.items():
        assert_within_budget(name, ours[name], eager[name].to(ours[name].dtype), value)


@pytest.mark.parametrize(
    ("C", "K", "count", "blocks", "layout"),
    [
        pytest.param(64, 64, 66, 5, "contiguous", id="64-many-slabs"),
        pytest.param(16, 32, 1, 3, "channels_last", id="one-slab-channels-last"),
        pytest.param(16, 16, 300, 1, "contiguous", id="more-slabs-than-one-round"),
    ],
)
def test_sum_slabs(kernels, C, K, count, blocks, layout):
    slabs = torch.randn(count, 9, C, K, generator=torch.Generator().manual_seed(C))
    dweight = poisoned(K, C, 3, 3)
    if layout == "channels_last":
        dweight = dweight.to(memory_format=torch.channels_last)
    params = kernels.params(
        "SlabSum",
        slabs=slabs,
        count=count,
        C=C,
        K=K,
        C_kept=C,
        dweight=flat(dweight) if layout == "channels_last" else dweight,
        layout=emulation.WEIGHT_LAYOUTS.index(layout),
    )
    assert kernels.call("sum_slabs", params, torch.float16, blocks) == 0
    exact = in_torch_order(slabs.double().sum(0))
    assert_within_budget("dweight", dweight, in_torch_order(slabs.sum(0)).to(dweight.dtype), exact)


@pytest.mark.parametrize(("K", "C"), [(32, 16), (16, 3)], ids=["border", "stem"])
def test_weights_of_either_layout_give_the_same_fragments(kernels, K, C):
    weight = torch.randn(K, C, 3, 3, generator=torch.Generator().manual_seed(K))
    one = fragments(kernels, weight, torch.float16)
    other = fragments(kernels, weight.to(memory_format=torch.channels_last), torch.float16)
    assert torch.equal(one["forward"], other["forward"])
    if C > 3:
        assert torch.equal(one["backward"], other["backward"])
