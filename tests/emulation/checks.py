"""What the tests of the emulated kernels share: inputs that bite, and poisoned outputs.

Inputs have a mean far from zero, so that a variance that cancels shows. Outputs start as NaN. The
error budget is that of verification/budget.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emulation import WEIGHT_LAYOUTS

SIZE = {16: 32, 32: 16, 64: 8}
DTYPES = [torch.float16, torch.bfloat16]
MOMENTUM, EPS = 0.1, 1e-5


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


def partial_sums(factor: Tensor, other: Tensor, rows: int) -> Tensor:
    """[rows, 2, C] float32 sums of factor and factor * other, as blocks of a kernel leave them."""
    pair = [flat(t.double()).flatten(0, 2) for t in (factor, factor.double() * other.double())]
    parts = [torch.stack([p.sum(0) for p in t.tensor_split(rows)]) for t in pair]
    return torch.stack(parts, 1).float()


def fragments(kernels, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward and backward fragments of a [K, C, 3, 3] weight, made by the kernel."""
    K, C = weight.shape[:2]
    made = {
        "forward": poisoned(K * 9 * C if C > 3 else 3 * 256, dtype=dtype),
        "backward": poisoned(K * 9 * C, dtype=dtype) if C > 3 else None,
    }
    last = not weight.is_contiguous()
    layer = kernels.params(
        "LayerWeights",
        weight=flat(weight) if last else weight,
        layout=WEIGHT_LAYOUTS.index("channels_last" if last else "contiguous"),
        C=C,
        K=K,
        **made,
    )
    assert kernels.call("prepare_weights", layer, dtype) == 0
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


def saved_of(y: Tensor, norm: dict[str, Tensor]) -> Tensor:
    """[4, C] mean, invstd, scale and shift of y, as the forward pass saves them."""
    wide = flat(y.double()).flatten(0, 2)
    mean, invstd = wide.mean(0), (wide.var(0, unbiased=False) + EPS).rsqrt()
    scale = norm["weight"] * invstd
    return torch.stack([mean, invstd, scale, norm["bias"] - mean * scale]).float()


def in_torch_order(slabs: Tensor) -> Tensor:
    """[9, C, K] to [K, C, 3, 3]."""
    return slabs.permute(2, 1, 0).unflatten(2, (3, 3))
