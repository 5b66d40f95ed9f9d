"""All CUDA kernels of a training step, one after the other: a ResNet-8 without its last layer.

A straight-line program, in the order of a step, in which each kernel merges the sums and adds up
the slabs that the one before left; against the plain network in float64. Run on a CPU.
"""

import emulation
import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from emulation.checks import (
    DTYPES,
    EPS,
    MOMENTUM,
    flat,
    fragments,
    norm_params,
    poisoned,
    poisoned_image,
)

from cifar_resnet_fast import reference

BLOCKS = 2  # of every launch
N = 6
# [K, C] of the stem and of each stage's two convolutions
SHAPES = [(16, 3), (16, 16), (16, 16), (32, 16), (32, 32), (64, 32), (64, 64)]
STRIDE = [1, 1, 1, 2, 1, 2, 1]


class MaskedReLU:
    """ReLU whose gradient goes by given masks, one a call, or by its own; keeps those it used.

    ReLU's gradient is a discontinuity: where rounding decides a sign, a reference has to follow.
    """

    def __init__(self, masks=None):
        self.given, self.used = masks, []

    def __call__(self, z):
        mask = z > 0 if self.given is None else self.given[len(self.used)]
        self.used.append(mask)
        through = z * mask
        return through + (F.relu(z) - through).detach()


def plain(pictures, weights, norms, dpooled, dtype, relu):
    """Gradients of sum(pooled * dpooled), pooled and running values in plain PyTorch."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [w.clone().to(statistics).requires_grad_() for w in weights]
    norms = [{k: v.to(statistics).clone() for k, v in norm.items()} for norm in norms]
    for norm in norms:
        norm["weight"].requires_grad_()
        norm["bias"].requires_grad_()

    def unit(x, i):
        y = F.conv2d(x, weights[i].to(dtype), stride=STRIDE[i], padding=1)
        n = norms[i]
        return F.batch_norm(
            y, n["running_mean"], n["running_var"], n["weight"], n["bias"], True, MOMENTUM, EPS
        )

    x = relu(unit(pictures[:, :3].to(dtype), 0))
    for first in (1, 3, 5):
        shortcut = x if STRIDE[first] == 1 else reference.shortcut_a(x, SHAPES[first][0])
        x = relu(unit(relu(unit(x, first)), first + 1) + shortcut)
    pooled = x.mean((2, 3))
    (pooled.to(statistics) * dpooled.to(statistics)).sum().backward()
    results = {"pooled": pooled.detach()}
    for i, (weight, norm) in enumerate(zip(weights, norms, strict=True)):
        results |= {f"dweight {i}": weight.grad}
        results |= {f"dbn_weight {i}": norm["weight"].grad, f"dbn_bias {i}": norm["bias"].grad}
        results |= {f"running_{v} {i}": norm[f"running_{v}"] for v in ("mean", "var")}
    return results


class Step:
    """The kernels' step, and what it leaves."""

    def __init__(self, kernels, pictures, weights, norms, dtype):
        self.kernels, self.pictures, self.dtype = kernels, pictures, dtype
        self.norms = [{k: v.clone() for k, v in norm.items()} for norm in norms]
        self.fragments = [fragments(kernels, weight, dtype) for weight in weights]
        self.y = [poisoned_image(N, K, dtype) for K, _ in SHAPES]
        self.saved = [poisoned(4, K) for K, _ in SHAPES]
        self.dweight = [torch.full_like(weight, float("nan")) for weight in weights]
        self.dbn = [{"dweight": poisoned(K), "dbias": poisoned(K)} for K, _ in SHAPES]
        self.x = {i: poisoned_image(N, SHAPES[i][1], dtype) for i in (1, 3, 5)}
        self.before = None  # slabs to be added up

    def call(self, function, params, *sizes):
        assert self.kernels.call(function, params, self.dtype, *sizes, BLOCKS) == 0

    def forward_norm(self, i) -> dict:
        names = ("weight", "bias", "running_mean", "running_var")
        norm = {name: self.norms[i][name] for name in names}
        sums = {"sums": self.sums, "rows": self.sums.shape[0], "saved": self.saved[i]}
        return norm | sums | {"momentum": MOMENTUM, "eps": EPS}

    def backward_norm(self, i) -> dict:
        sums = {"sums": self.sums, "rows": self.sums.shape[0], "saved": self.saved[i]}
        return sums | {"weight": self.norms[i]["weight"]} | self.dbn[i]

    def stem(self):
        self.sums = poisoned(BLOCKS, 2, 16)
        params = self.kernels.params(
            "StemForwardParams",
            pictures=flat(self.pictures),
            weight=self.fragments[0]["forward"],
            y=flat(self.y[0]),
            y_sums=self.sums,
            images=N,
        )
        self.call("stem_forward", params)

    def conv(self, i, shortcut=None, kind="none"):
        """F1 where the activation before layer i is kept, else F2."""
        K, C = SHAPES[i]
        x = self.x.get(i)
        sums = poisoned(BLOCKS, 2, K)
        params = self.kernels.params(
            "ForwardParams",
            y=flat(self.y[i - 1]),
            norm=self.forward_norm(i - 1),
            shortcut=None if shortcut is None else flat(shortcut),
            shortcut_kind=emulation.SHORTCUTS.index(kind),
            x=None if x is None else flat(x),
            weight=self.fragments[i]["forward"],
            out=flat(self.y[i]),
            out_sums=sums,
            images=N,
        )
        self.call("conv3x3_forward", params, C, STRIDE[i])
        self.sums = sums

    def head(self, dpooled):
        last = len(SHAPES) - 1
        self.positive = positive = torch.full((N, 8, 8, 8), 0xAA, dtype=torch.uint8)
        self.pooled = poisoned(N, 64)
        params = self.kernels.params(
            "HeadForwardParams",
            y=flat(self.y[last]),
            norm=self.forward_norm(last),
            shortcut=flat(self.x[5]),
            shortcut_kind=emulation.SHORTCUTS.index("option_a"),
            positive=positive,
            pooled=self.pooled,
            images=N,
        )
        self.call("head_forward", params)
        dz, self.sums = poisoned_image(N, 64, self.dtype), poisoned(BLOCKS, 2, 64)
        params = self.kernels.params(
            "HeadBackwardParams",
            dpooled=dpooled,
            positive=positive,
            y=flat(self.y[last]),
            saved=self.saved[last],
            dz=flat(dz),
            dz_sums=self.sums,
            images=N,
        )
        self.call("head_backward", params)
        return dz

    def leave(self, i, slabs):
        """The slabs of layer i are added up by the next kernel."""
        K, C = SHAPES[i]
        self.before = {"slabs": slabs, "count": slabs.shape[0], "C": slabs.shape[2], "K": K}
        self.before |= {"C_kept": C, "dweight": self.dweight[i]}

    def conv_gradient(self, i, dz, residual=None):
        """B1 where the shortcut's gradient is given, else B2; the gradient before layer i."""
        K, C = SHAPES[i]
        rows = self.kernels.library.emulated_conv3x3_backward_rows(C, STRIDE[i], BLOCKS)
        out, sums = poisoned_image(N, C, self.dtype), poisoned(rows, 2, C)
        slabs = poisoned(rows, 9, C, K)
        b1 = residual is not None
        params = self.kernels.params(
            "BackwardParams",
            dz=flat(dz),
            y=flat(self.y[i]),
            norm=self.backward_norm(i),
            input=flat(self.x[i] if b1 else self.y[i - 1]),
            residual=flat(residual) if b1 else None,
            y_before=flat(self.y[i - 1]) if b1 else None,
            saved_before=self.saved[i - 1],
            weight=self.fragments[i]["backward"],
            out=flat(out),
            out_sums=sums,
            slabs=slabs,
            **({} if self.before is None else {"before": self.before}),
            images=N,
        )
        self.call("conv3x3_backward", params, C, STRIDE[i])
        self.sums = sums
        self.leave(i, slabs)
        return out

    def stem_gradient(self, dz):
        slabs = poisoned(BLOCKS, 9, 4, 16)
        params = self.kernels.params(
            "StemBackwardParams",
            dz=flat(dz),
            y=flat(self.y[0]),
            norm=self.backward_norm(0),
            pictures=flat(self.pictures),
            slabs=slabs,
            before=self.before,
            images=N,
        )
        self.call("stem_backward", params)
        self.leave(0, slabs)
        self.call("sum_slabs", self.kernels.params("SlabSum", **self.before))

    def masks(self) -> list:
        """Of the network's ReLUs, in their order."""
        masks = []
        for i in (1, 3, 5):
            scale, shift = self.saved[i][2:].double()[:, :, None, None]
            masks += [self.x[i] > 0, self.y[i].double() * scale + shift > 0]
        bits = self.positive[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
        return [*masks, bits.flatten(3).permute(0, 3, 1, 2).bool()]

    def results(self) -> dict:
        results = {"pooled": self.pooled}
        for i, norm in enumerate(self.norms):
            results |= {f"dweight {i}": self.dweight[i]}
            results |= {f"dbn_{name[1:]} {i}": value for name, value in self.dbn[i].items()}
            results |= {f"running_{v} {i}": norm[f"running_{v}"] for v in ("mean", "var")}
        return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step(kernels, dtype):
    generator = torch.Generator().manual_seed(8)
    pictures = (0.5 * torch.randn(N, 4, 32, 32, generator=generator) - 2.3).to(dtype)
    pictures[:, 3] = 0
    pictures = pictures.to(memory_format=torch.channels_last)
    weights = [torch.randn(K, C, 3, 3, generator=generator) / (2 * C**0.5) for K, C in SHAPES]
    norms = [norm_params(K, generator) for K, _ in SHAPES]
    dpooled = torch.randn(N, 64, generator=generator)

    def run(order):
        kernels.set_order(order)
        step = Step(kernels, pictures, weights, norms, dtype)
        step.stem()
        step.conv(1)
        step.conv(2)
        step.conv(3, step.x[1], "identity")
        step.conv(4)
        step.conv(5, step.x[3], "option_a")
        step.conv(6)
        dz3 = step.head(dpooled)
        dz2 = step.conv_gradient(5, step.conv_gradient(6, dz3), dz3)
        dz1 = step.conv_gradient(3, step.conv_gradient(4, dz2), dz2)
        dz0 = step.conv_gradient(1, step.conv_gradient(2, dz1), dz1)
        step.stem_gradient(dz0)
        return step

    step = run("last_warp_first")
    # the same bits whatever the order in which warps advance: nothing depends on timing
    again = run("first_warp_first").results()
    for name, value in step.results().items():
        assert torch.equal(value, again[name]), name

    relu = MaskedReLU()
    network = (pictures, weights, norms, dpooled)
    eager = plain(*network, dtype, relu)
    exact = plain(*network, torch.float64, MaskedReLU(relu.used))
    own_exact = plain(*network, torch.float64, MaskedReLU(step.masks()))
    for name, value in step.results().items():
        eager_value = eager[name].to(value.dtype)
        assert_within_budget(name, value, eager_value, exact[name], own_exact[name])
