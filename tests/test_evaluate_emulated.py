"""The CUDA kernels of evaluation, the normalisation folded in, run on a CPU, against float64."""

import emulation
import pytest
import torch
import torch.nn.functional as F
from emulation.checks import (
    DTYPES,
    EPS,
    flat,
    image,
    norm_params,
    poisoned,
    poisoned_image,
)

from cifar_resnet_fast import reference
from cifar_resnet_fast.verification.budget import assert_within_budget


def folded(kernels, weight, norm, dtype):
    """Fragments and bias of a convolution with its normalisation folded in, by the kernel."""
    K, C = weight.shape[:2]
    made = {
        "forward": poisoned(K * 9 * C if C > 3 else 3 * 256, dtype=dtype),
        "bias": poisoned(K),
    }
    layer = kernels.params(
        "LayerWeights",
        weight=weight,
        bn_weight=norm["weight"],
        bn_bias=norm["bias"],
        running_mean=norm["running_mean"],
        running_var=norm["running_var"],
        eps=EPS,
        C=C,
        K=K,
        **made,
    )
    assert kernels.call("prepare_weights", layer, dtype) == 0
    return {"fragments": made["forward"], "bias": made["bias"]}


def plain(x, weight, norm, shortcut, stride, dtype):
    """relu(batch_norm(conv(x)) + shortcut) with the running values, in dtype."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var, scale, bias = (
        norm[name].to(statistics) for name in ("running_mean", "running_var", "weight", "bias")
    )
    y = F.conv2d(x.to(dtype), weight.to(dtype), stride=stride, padding=1)
    z = F.batch_norm(y, mean, var, scale, bias, False, 0.0, EPS)
    return F.relu(z if shortcut is None else z + shortcut.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("C", "stride", "kind", "N", "blocks", "order"),
    [
        pytest.param(16, 1, "none", 11, 1, "last_warp_first", id="16-prime-more-than-groups"),
        pytest.param(16, 1, "identity", 1, 2, "first_warp_first", id="16-one-image-idle-block"),
        pytest.param(32, 1, "identity", 3, 1, "round_robin", id="32-ragged-3"),
        pytest.param(32, 1, "option_a", 2, 1, "last_warp_first", id="32-option-a"),
        pytest.param(64, 1, "identity", 7, 1, "last_warp_first", id="64-part-unit-7"),
        pytest.param(64, 1, "option_a", 1, 1, "first_warp_first", id="64-option-a-one-of-four"),
        pytest.param(16, 2, "none", 3, 2, "round_robin", id="16-to-32-ragged-3"),
        pytest.param(32, 2, "none", 5, 1, "last_warp_first", id="32-to-64-prime-5"),
    ],
)
def test_evaluate(kernels, C, stride, kind, N, blocks, order, dtype):
    generator = torch.Generator().manual_seed(C * 100 + N)
    K = C * stride
    x = image(generator, N, C, dtype, 1.0, 0.0).relu()
    weight = torch.randn(K, C, 3, 3, generator=generator) / (3 * C**0.5)
    norm = norm_params(K, generator)
    shortcut = matching = None
    if kind == "identity":
        shortcut = matching = image(generator, N, K, dtype, 1.0, 0.0).relu()
    if kind == "option_a":
        shortcut = image(generator, N, K // 2, dtype, 1.0, 0.0).relu()
        matching = reference.shortcut_a(shortcut, K)
    out = poisoned_image(N, K, dtype)
    kernels.set_order(order)
    params = kernels.params(
        "EvaluateParams",
        x=flat(x),
        **folded(kernels, weight, norm, dtype),
        shortcut=None if shortcut is None else flat(shortcut),
        shortcut_kind=emulation.SHORTCUTS.index(kind),
        out=flat(out),
        batch=N,
    )
    assert kernels.call("conv3x3_evaluate", params, dtype, C, stride, blocks) == 0
    exact = plain(x, weight, norm, matching, stride, torch.float64)
    eager = plain(x, weight, norm, matching, stride, dtype)
    assert_within_budget("out", out, eager.to(out.dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluate_stem(kernels, dtype):
    generator = torch.Generator().manual_seed(3)
    N = 3
    x = (0.5 * torch.randn(N, 4, 32, 32, generator=generator) - 2.3).to(dtype)
    x[:, 3] = 0
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(16, 3, 3, 3, generator=generator) / 5
    norm = norm_params(16, generator)
    out = poisoned_image(N, 16, dtype)
    fold = folded(kernels, weight, norm, dtype)
    params = kernels.params("StemForwardParams", images=flat(x), y=flat(out), batch=N, **fold)
    assert kernels.call("stem_forward", params, dtype, 1) == 0
    exact = plain(x[:, :3], weight, norm, None, 1, torch.float64)
    eager = plain(x[:, :3], weight, norm, None, 1, dtype)
    assert_within_budget("out", out, eager.to(out.dtype), exact)
