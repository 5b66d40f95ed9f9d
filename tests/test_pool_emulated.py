"""The CUDA kernels of the last activation and the average pool, run on a CPU, against float64."""

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
    image,
    norm_params,
    partial_sums,
    poisoned,
    poisoned_image,
)

from cifar_resnet_fast import reference
from cifar_resnet_fast.verification.budget import assert_within_budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "N", "blocks", "order"),
    [
        pytest.param("identity", 11, 1, "last_warp_first", id="prime-more-than-warps"),
        pytest.param("identity", 1, 2, "round_robin", id="one-image-idle-block"),
        pytest.param("option_a", 3, 1, "first_warp_first", id="one-block-stage-3"),
        pytest.param("option_a", 3, 3, "last_warp_first", id="one-image-a-block-stage-3"),
    ],
)
def test_pool(kernels, kind, N, blocks, order, dtype):
    generator = torch.Generator().manual_seed(N)
    C = 64
    y = image(generator, N, C, dtype)
    channels = C if kind == "identity" else C // 2
    shortcut = image(generator, N, channels, dtype, 1.0, 0.0).relu()
    dpooled = torch.randn(N, C, generator=generator)
    norm = norm_params(C, generator)
    running = {name: norm[name].clone() for name in ("running_mean", "running_var")}
    mask = torch.full((N, 8, 8, 8), 0xAA, dtype=torch.uint8)
    pooled, saved = poisoned(N, C), poisoned(4, C)
    kernels.set_order(order)
    params = kernels.params(
        "PoolForwardParams",
        y=flat(y),
        bn={
            "sums": partial_sums(y, y, 7),
            "rows": 7,
            "weight": norm["weight"],
            "bias": norm["bias"],
            **running,
            "norm": saved,
            "momentum": MOMENTUM,
            "eps": EPS,
        },
        shortcut=flat(shortcut),
        shortcut_kind=emulation.SHORTCUTS.index(kind),
        mask=mask,
        pooled=pooled,
        batch=N,
    )
    assert kernels.call("pool_forward", params, dtype, blocks) == 0
    dz, sums = poisoned_image(N, C, dtype), poisoned(blocks, 2, C)
    params = kernels.params(
        "PoolBackwardParams",
        dpooled=dpooled,
        mask=mask,
        y=flat(y),
        norm=saved,
        dz=flat(dz),
        dz_sums=sums,
        batch=N,
    )
    assert kernels.call("pool_backward", params, dtype, blocks) == 0

    # the mask of the kernel, from its bits, decides on both sides of the comparison
    bits = mask[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    mask = bits.flatten(3).permute(0, 3, 1, 2).bool()

    def plain(kind_):
        z, mean, var = batch_norm(y.to(kind_), norm)
        wide = shortcut.to(kind_)
        z = z + (wide if kind == "identity" else reference.shortcut_a(wide, C))
        gradient = (dpooled.to(kind_)[..., None, None] / 64).expand(N, C, 8, 8) * mask
        centred = gradient.double() * (y.double() - saved[0].double()[:, None, None])
        return {
            "z": z,
            "pooled": F.relu(z).mean((2, 3)),
            "running_mean": mean,
            "running_var": var,
            "dz": gradient,
            "sums": torch.stack([gradient.double().sum((0, 2, 3)), centred.sum((0, 2, 3))]),
        }

    exact, eager = plain(torch.float64), plain(dtype)
    ours = {"pooled": pooled, "dz": dz, "sums": sums.double().sum(0).float(), **running}
    for name, value in ours.items():
        assert_within_budget(name, value, eager[name].to(value.dtype), exact[name])
    # and it is right wherever z is not so near to zero that rounding decides
    clear = exact["z"].abs() > 1e-4
    assert torch.equal(mask[clear], (exact["z"] > 0)[clear])
    assert clear.float().mean() > 0.99
