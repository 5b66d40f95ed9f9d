"""The CUDA convolutions' own source, run on a CPU (tests/emulation), against float64.

Error budget and inputs: tests/emulation/checks.py; what the emulator finds: emulator.h.
"""

import emulation
import pytest
import torch
import torch.nn.functional as F
from emulation.checks import (
    DTYPES,
    EPS,
    MOMENTUM,
    batch_norm,
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

from cifar_resnet_fast import reference
from cifar_resnet_fast.verification.budget import assert_within_budget


def forward_plain(y, norm, shortcut, weight, stride):
    """x, out, sums and running values of F1 or F2 in plain PyTorch, in y's dtype."""
    z, mean, var = batch_norm(y, norm)
    if shortcut is not None:
        same = shortcut.shape == z.shape
        z = z + (shortcut if same else reference.shortcut_a(shortcut, z.shape[1]))
    x = F.relu(z)
    out = F.conv2d(x, weight.to(y.dtype), stride=stride, padding=1)
    wide = out.double()
    return {
        "x": x,
        "out": out,
        "sums": torch.stack([wide.sum((0, 2, 3)), (wide * wide).sum((0, 2, 3))]),
        "running_mean": mean,
        "running_var": var,
    }


def run_forward(kernels, y, norm, shortcut, weight, stride, blocks, finishes, sums=None):
    """The same by the kernel, and the coefficients that it saves."""
    N, C = y.shape[:2]
    K = weight.shape[0]
    kind = "none"
    if shortcut is not None:
        kind = "identity" if shortcut.shape == y.shape else "option_a"
    sums = partial_sums(y, y, 7) if sums is None else sums
    made = {
        "x": poisoned_image(N, C, y.dtype) if finishes else None,
        "out": poisoned_image(N, K, y.dtype),
        "sums": poisoned(blocks, 2, K),
        "norm": poisoned(4, C),
        "running_mean": norm["running_mean"].clone(),
        "running_var": norm["running_var"].clone(),
    }
    params = kernels.params(
        "ForwardParams",
        y=flat(y),
        bn={
            "sums": sums,
            "rows": sums.shape[0],
            "weight": norm["weight"],
            "bias": norm["bias"],
            "running_mean": made["running_mean"],
            "running_var": made["running_var"],
            "norm": made["norm"],
            "momentum": MOMENTUM,
            "eps": EPS,
        },
        shortcut=None if shortcut is None else flat(shortcut),
        shortcut_kind=emulation.SHORTCUTS.index(kind),
        x=flat(made["x"]) if finishes else None,
        fragments=fragments(kernels, weight, y.dtype)["forward"],
        out=flat(made["out"]),
        out_sums=made["sums"],
        batch=N,
    )
    assert kernels.call("conv3x3_forward", params, y.dtype, C, stride, blocks) == 0
    made["partial"] = made["sums"]
    made["sums"] = made["sums"].double().sum(0).float()
    return made


FORWARD = [  # C, stride, shortcut, N, blocks, order
    pytest.param(16, 1, "identity", 3, 1, "round_robin", id="F1-16-ragged-3"),
    pytest.param(16, 1, "no", 1, 2, "last_warp_first", id="F1-16-after-the-stem-1"),
    pytest.param(16, 1, None, 11, 1, "first_warp_first", id="F2-16-prime-more-than-groups"),
    pytest.param(32, 1, "identity", 3, 2, "last_warp_first", id="F1-32-ragged-3"),
    pytest.param(32, 1, "option_a", 5, 1, "first_warp_first", id="F1-32-option-a-prime-5"),
    pytest.param(32, 1, None, 1, 3, "round_robin", id="F2-32-one-image-idle-blocks"),
    pytest.param(64, 1, "identity", 7, 1, "first_warp_first", id="F1-64-part-unit-prime-7"),
    pytest.param(64, 1, "option_a", 3, 2, "last_warp_first", id="F1-64-option-a-part-unit-3"),
    pytest.param(64, 1, None, 1, 1, "round_robin", id="F2-64-one-of-four-images"),
    pytest.param(64, 1, None, 8, 2, "last_warp_first", id="F2-64-whole-units"),
    pytest.param(16, 2, "identity", 5, 1, "last_warp_first", id="F1-16-to-32-prime-5"),
    pytest.param(16, 2, "no", 1, 1, "round_robin", id="F1-16-to-32-no-shortcut-1"),
    pytest.param(32, 2, "identity", 3, 1, "first_warp_first", id="F1-32-to-64-part-unit-3"),
    pytest.param(32, 2, "option_a", 1, 2, "last_warp_first", id="F1-32-to-64-option-a-1"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("C", "stride", "kind", "N", "blocks", "order"), FORWARD)
def test_forward(kernels, C, stride, kind, N, blocks, order, dtype):
    generator = torch.Generator().manual_seed(C * 100 + N)
    y = image(generator, N, C, dtype)
    shortcut = None
    if kind in ("identity", "option_a"):
        channels = C if kind == "identity" else C // 2
        shortcut = image(generator, N, channels, dtype, 1.0, 0.0).relu()
    weight = torch.randn(C * stride, C, 3, 3, generator=generator) / (3 * C**0.5)
    norm = norm_params(C, generator)
    kernels.set_order(order)
    ours = run_forward(
        kernels, y, norm, shortcut, weight, stride, blocks, finishes=kind is not None
    )
    wide = None if shortcut is None else shortcut.double()
    exact = forward_plain(y.double(), norm, wide, weight, stride)
    eager = forward_plain(y, norm, shortcut, weight, stride)
    if kind is None:
        del exact["x"]
    for name, value in exact.items():
        assert_within_budget(name, ours[name], eager[name].to(ours[name].dtype), value)


def backward_plain(dz, y, norm, saved, a, mask, residual, before, weight, stride):
    """out, sums and the gradients of B1 or B2 in plain PyTorch, in y's dtype; the sums are of out
    and of out * before."""
    statistics = torch.float64 if y.dtype == torch.float64 else torch.float32
    dy, dbn_weight, dbn_bias = torch.ops.aten.native_batch_norm_backward(
        dz, y, norm["weight"].to(statistics), None, None, saved[0].to(statistics),
        saved[1].to(statistics), True, EPS, [True, True, True],
    )  # fmt: skip
    out, dweight, _ = torch.ops.aten.convolution_backward(
        dy, a, weight.to(y.dtype), None, [stride, stride], [1, 1], [1, 1], False, [0, 0], 1,
        [True, True, False],
    )  # fmt: skip
    if residual is not None:
        if stride == 2:
            spread = torch.zeros_like(out)
            C = out.shape[1]
            spread[:, :, ::2, ::2] = residual[:, C // 2 : C // 2 + C]
            residual = spread
        out = out + residual
    out = out * mask
    wide = out.double()
    return {
        "out": out,
        "sums": torch.stack([wide.sum((0, 2, 3)), (wide * before).sum((0, 2, 3))]),
        "dweight": dweight,
        "dbn_weight": dbn_weight,
        "dbn_bias": dbn_bias,
    }


BACKWARD = [  # C, stride, B1, N, blocks, order
    pytest.param(16, 1, False, 3, 1, "round_robin", id="B2-16-ragged-3"),
    pytest.param(16, 1, True, 5, 1, "last_warp_first", id="B1-16-prime-more-than-groups"),
    pytest.param(16, 1, True, 1, 2, "first_warp_first", id="B1-16-one-image-idle-block"),
    pytest.param(32, 1, False, 3, 2, "last_warp_first", id="B2-32-part-unit-3"),
    pytest.param(32, 1, True, 5, 1, "first_warp_first", id="B1-32-prime-5"),
    pytest.param(32, 1, True, 1, 3, "round_robin", id="B1-32-half-a-unit"),
    pytest.param(64, 1, False, 7, 2, "last_warp_first", id="B2-64-part-unit-7"),
    pytest.param(64, 1, True, 1, 1, "round_robin", id="B1-64-one-of-four-images"),
    pytest.param(64, 1, True, 11, 4, "first_warp_first", id="B1-64-prime-11-two-pairs"),
    pytest.param(64, 1, False, 5, 8, "round_robin", id="B2-64-two-idle-pairs"),
    pytest.param(16, 2, True, 3, 1, "last_warp_first", id="B1-16-to-32-ragged-3"),
    pytest.param(16, 2, True, 1, 2, "first_warp_first", id="B1-16-to-32-one-image"),
    pytest.param(32, 2, True, 5, 1, "round_robin", id="B1-32-to-64-prime-5"),
    pytest.param(32, 2, True, 1, 2, "last_warp_first", id="B1-32-to-64-half-a-unit"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("C", "stride", "b1", "N", "blocks", "order"), BACKWARD)
def test_backward(kernels, C, stride, b1, N, blocks, order, dtype):
    generator = torch.Generator().manual_seed(C * 100 + N)
    K = C * stride
    y = image(generator, N, K, dtype)
    dz = image(generator, N, K, dtype, 1.0, 0.0)
    dz[dz < -0.5] = 0
    norm = norm_params(K, generator)
    saved = saved_of(y, norm)
    weight = torch.randn(K, C, 3, 3, generator=generator) / (3 * C**0.5)
    raw = image(generator, N, C, dtype)
    residual = None
    saved_before = saved_of(raw, norm_params(C, generator))
    mean_before, _, scale, shift = (v.double()[:, None, None] for v in saved_before)
    if b1:
        a = image(generator, N, C, dtype, 1.0, 0.0).relu()
        mask = a > 0
        residual = image(generator, N, K, dtype, 1.0, 0.0)
        wide_a = a.double()
    else:
        wide_a = (raw.double() * scale + shift).relu()
        mask = wide_a > 0
        a = wide_a.to(dtype)
    rows = kernels.library.emulated_conv3x3_backward_rows(C, stride, blocks, N)
    # blocks without images leave none: the emulator refuses a write behind the slabs
    units = -(-N // {16: 1, 32: 2, 64: 4}[C])
    assert rows == min(-(-blocks // (2 if C == 64 else 1)), units)
    before = torch.randn(11, 9, 32, 16, generator=generator)
    sums = partial_sums(dz, y.double() - saved[0].double()[:, None, None], 7)
    made = {
        "out": poisoned_image(N, C, dtype),
        "partial": poisoned(rows, 2, C),
        "slabs": poisoned(rows, 9, C, K),
        "dbn_weight": poisoned(K),
        "dbn_bias": poisoned(K),
        "before": poisoned(16, 32, 3, 3),
    }
    fragment = fragments(kernels, weight, dtype)["backward"]
    kernels.set_order(order)
    params = kernels.params(
        "BackwardParams",
        dz=flat(dz),
        y=flat(y),
        bn={
            "sums": sums,
            "rows": 7,
            "weight": norm["weight"],
            "norm": saved,
            "dweight": made["dbn_weight"],
            "dbias": made["dbn_bias"],
        },
        input=flat(a if b1 else raw),
        residual=None if residual is None else flat(residual),
        y_before=flat(raw) if b1 else None,
        norm_before=saved_before,
        fragments=fragment,
        out=flat(made["out"]),
        out_sums=made["partial"],
        slabs=made["slabs"],
        before={
            "slabs": before,
            "count": 11,
            "C": 32,
            "K": 16,
            "C_kept": 32,
            "dweight": made["before"],
        },
        batch=N,
    )
    assert kernels.call("conv3x3_backward", params, dtype, C, stride, blocks) == 0
    made["sums"] = made["partial"].double().sum(0).float()
    made["dweight"] = in_torch_order(made["slabs"].double().sum(0).float())

    wide = [None if t is None else t.double() for t in (dz, y, residual)]
    centred = raw.double() - mean_before
    exact = backward_plain(
        wide[0], wide[1], norm, saved, wide_a, mask, wide[2], centred, weight.double(), stride
    )
    eager = backward_plain(dz, y, norm, saved, a, mask, residual, centred, weight, stride)
    for name, value in exact.items():
        assert_within_budget(name, made[name], eager[name].to(made[name].dtype), value)
    torch.testing.assert_close(made["before"], in_torch_order(before.sum(0)), rtol=1e-5, atol=1e-5)


def test_order_of_warps_changes_nothing(kernels):
    """The same bits whatever the order in which warps advance: nothing depends on timing."""
    generator = torch.Generator().manual_seed(1)
    y = image(generator, 9, 16, torch.bfloat16)
    weight = torch.randn(16, 16, 3, 3, generator=generator) / 12
    norm = norm_params(16, generator)
    results = []
    for order in emulation.ORDERS:
        kernels.set_order(order)
        results.append(run_forward(kernels, y, norm, y.relu(), weight, 1, 1, finishes=True))
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [16, 64])
def test_sums_feed_the_next_kernel(kernels, C, dtype):
    """Two convolutions with the kernels' own sums, of values with a mean far from zero."""
    generator = torch.Generator().manual_seed(C)
    N = 5
    y = image(generator, N, C, dtype)
    shortcut = image(generator, N, C, dtype, 1.0, 0.0).relu()
    norms = [norm_params(C, generator) for _ in range(2)]
    # weights of one sign: the raw outputs' mean is several times their standard deviation
    weights = [torch.rand(C, C, 3, 3, generator=generator) / (3 * C) for _ in range(2)]

    def plain(kind):
        inner = forward_plain(y.to(kind), norms[0], shortcut.to(kind), weights[0], 1)
        return forward_plain(inner["out"], norms[1], None, weights[1], 1)

    first = run_forward(kernels, y, norms[0], shortcut, weights[0], 1, 3, finishes=True)
    second = run_forward(
        kernels, first["out"], norms[1], None, weights[1], 1, 3, False, sums=first["partial"]
    )
    exact, eager = plain(torch.float64), plain(dtype)
    del exact["x"]
    for name, value in exact.items():
        assert_within_budget(name, second[name], eager[name].to(second[name].dtype), value)
