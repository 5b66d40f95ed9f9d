"""The CUDA convolutions' own source, run on a CPU (tests/emulation), against float64.

Error budget: at most twice the error that eager PyTorch makes in the same dtype, in norm and in
maximum. Inputs have a mean far from zero (a variance that cancels would show); outputs and shared
memory start as NaN; every access outside a tensor is an error of the emulator.
"""

import emulation
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs a C++ compiler")

SIZE = {16: 32, 32: 16, 64: 8}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MOMENTUM, EPS = 0.1, 1e-5


@pytest.fixture(scope="session")
def kernels():
    return emulation.load()


def image(generator, N, C, dtype, scale=0.5, offset=-2.3) -> Tensor:
    """[N, C, H, W], channels-last, of the stage with C channels."""
    values = scale * torch.randn(N, C, SIZE[C], SIZE[C], generator=generator) + offset
    return values.to(dtype).to(memory_format=torch.channels_last)


def flat(x: Tensor) -> Tensor:
    """The memory of a channels-last tensor, as the kernels see it."""
    return x.permute(0, 2, 3, 1)


def poisoned(*shape, dtype=torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def poisoned_image(N, C, dtype) -> Tensor:
    return poisoned(N, SIZE[C], SIZE[C], C, dtype=dtype).permute(0, 3, 1, 2)


def assert_within_twice_eager(ours: Tensor, eager: Tensor, exact: Tensor, name: str) -> None:
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error = ours.double() - exact
    budget = eager.double() - exact
    for order in (2, float("inf")):
        mine, allowed, size = (
            torch.linalg.vector_norm(e, order).item() for e in (error, budget, exact)
        )
        # an error of float32's own rounding is always allowed
        limit = 2 * allowed + 1e-7 * size
        assert mine <= limit, f"{name}, norm {order}: error {mine:.3e}, allowed {limit:.3e}"


def partial_sums(first: Tensor, second: Tensor, rows: int) -> Tensor:
    """[rows, 2, C] float32 sums of first and second, as blocks of a kernel leave them."""
    parts = [
        torch.stack([part.float().sum(0) for part in pair])
        for pair in zip(
            flat(first).flatten(0, 2).tensor_split(rows),
            (flat(first).float() * flat(second).float()).flatten(0, 2).tensor_split(rows),
            strict=True,
        )
    ]
    return torch.stack(parts)


def fragments(kernels, weight: Tensor, dtype: str) -> dict[str, Tensor]:
    """Forward and backward fragments of a [K, C, 3, 3] weight, made by the kernel."""
    K, C = weight.shape[:2]
    made = {
        "forward": poisoned(K * 9 * C if C > 3 else 3 * 256, dtype=DTYPES[dtype]),
        "backward": poisoned(K * 9 * C, dtype=DTYPES[dtype]) if C > 3 else None,
    }
    layer = emulation.params(kernels.LayerWeights, weight=weight, C=C, K=K, **made)
    assert kernels.prepare_weights([layer], getattr(kernels.Dtype, dtype)) == 0
    return made


def norm_params(C: int, generator) -> dict[str, Tensor]:
    return {
        "weight": 1 + 0.3 * torch.randn(C, generator=generator),
        "bias": 0.3 * torch.randn(C, generator=generator),
        "running_mean": torch.randn(C, generator=generator),
        "running_var": 1 + torch.rand(C, generator=generator),
    }


def batch_norm(y: Tensor, norm: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised y and the updated running values, in y's dtype (the running ones in float32 at
    least, as eager PyTorch keeps them)."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    mean, var = norm["running_mean"].to(dtype).clone(), norm["running_var"].to(dtype).clone()
    weight, bias = norm["weight"].to(dtype), norm["bias"].to(dtype)
    return F.batch_norm(y, mean, var, weight, bias, True, MOMENTUM, EPS), mean, var


def option_a(x: Tensor, channels: int) -> Tensor:
    new = (channels - x.shape[1]) // 2
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new, new))


def forward_plain(y, norm, shortcut, weight, stride):
    """x, out, sums and running values of F1 or F2 in plain PyTorch, in y's dtype."""
    z, mean, var = batch_norm(y, norm)
    if shortcut is not None:
        z = z + (option_a(shortcut, z.shape[1]) if shortcut.shape != z.shape else shortcut)
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


def run_forward(kernels, dtype, y, norm, shortcut, weight, stride, blocks, finishes, sums=None):
    """The same by the kernel, and the coefficients that it saves."""
    N, C = y.shape[:2]
    K = weight.shape[0]
    kind = kernels.Shortcut.none
    if shortcut is not None:
        same = shortcut.shape == y.shape
        kind = kernels.Shortcut.identity if same else kernels.Shortcut.option_a
    sums = partial_sums(y, y, 7) if sums is None else sums
    made = {
        "x": poisoned_image(N, C, y.dtype) if finishes else None,
        "out": poisoned_image(N, K, y.dtype),
        "sums": poisoned(blocks, 2, K),
        "saved": poisoned(4, C),
        "running_mean": norm["running_mean"].clone(),
        "running_var": norm["running_var"].clone(),
    }
    params = emulation.params(
        kernels.ForwardParams,
        y=flat(y),
        norm={
            "sums": sums,
            "rows": sums.shape[0],
            "weight": norm["weight"],
            "bias": norm["bias"],
            "running_mean": made["running_mean"],
            "running_var": made["running_var"],
            "saved": made["saved"],
            "momentum": MOMENTUM,
            "eps": EPS,
        },
        shortcut=None if shortcut is None else flat(shortcut),
        shortcut_kind=kind,
        x=flat(made["x"]) if finishes else None,
        weight=fragments(kernels, weight, dtype)["forward"],
        out=flat(made["out"]),
        out_sums=made["sums"],
        images=N,
    )
    # fragments() ended with nothing allowed, so it must come before the struct is filled
    status = kernels.conv3x3_forward(params, getattr(kernels.Dtype, dtype), C, stride, blocks)
    assert status == 0
    made["partial"] = made["sums"]
    made["sums"] = made["sums"].double().sum(0)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "stride", "kind", "N", "blocks", "order"), FORWARD)
def test_forward(kernels, C, stride, kind, N, blocks, order, dtype):
    generator = torch.Generator().manual_seed(C * 100 + N)
    y = image(generator, N, C, DTYPES[dtype])
    shortcut = None
    if kind in ("identity", "option_a"):
        channels = C if kind == "identity" else C // 2
        shortcut = image(generator, N, channels, DTYPES[dtype], 1.0, 0.0).relu()
    weight = torch.randn(C * stride, C, 3, 3, generator=generator) / (3 * C**0.5)
    norm = norm_params(C, generator)
    kernels.set_order(getattr(kernels.Order, order))
    ours = run_forward(
        kernels, dtype, y, norm, shortcut, weight, stride, blocks, finishes=kind is not None
    )
    wide = None if shortcut is None else shortcut.double()
    exact = forward_plain(y.double(), norm, wide, weight, stride)
    eager = forward_plain(y, norm, shortcut, weight, stride)
    if kind is None:
        del exact["x"]
    for name, value in exact.items():
        assert_within_twice_eager(ours[name], eager[name], value, name)
