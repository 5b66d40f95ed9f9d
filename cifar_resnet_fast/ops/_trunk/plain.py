"""The trunk's kernels in plain PyTorch, nothing fused: ``eager`` of ``bench.trunk``.

They follow ``ops._trunk.schedule`` as the package's own do, on any device in any floating dtype:
convolutions run in the activations' dtype, normalisation in float32, or float64 where the
activations are. In float64 they show that the schedule, apart from any kernel, is the network.

============  ======================================================================
sums of a y   [2, K]: its mean and its variance
sums of a dz  [2, K]: the sum of dz and that of dz * (y - mean)
mask          [N, K, H, W] bool
weights       one tensor a unit, channels-last
============  ======================================================================
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._trunk.schedule import Kept, stride_of
from cifar_resnet_fast.reference import Unit


def pictures_for_kernels(pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, 3, H, W] channels-last of ``dtype``."""
    return pictures.to(dtype).contiguous(memory_format=torch.channels_last)


def per_channel(vector: Tensor) -> Tensor:
    """[K] beside [N, K, H, W]."""
    return vector[:, None, None]


def widened(t: Tensor) -> Tensor:
    """In the dtype that normalisation is computed in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def sums_of(y: Tensor) -> Tensor:
    variance, mean = torch.var_mean(widened(y), (0, 2, 3), correction=0)
    return torch.stack((mean, variance))


def gradient_sums_of(dz: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    wide = widened(dz)
    deviation = widened(y) - per_channel(norm[0])
    return torch.stack((wide.sum((0, 2, 3)), (wide * deviation).sum((0, 2, 3))))


def before_relu(y: Tensor, norm: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """norm(y) [+ shortcut], not rounded. A shortcut with fewer channels is option A's input."""
    z = per_channel(norm[2]) * widened(y) + per_channel(norm[3])
    if shortcut is None:
        return z
    K = y.shape[1]
    return z + (shortcut if shortcut.shape[1] == K else reference.shortcut_a(shortcut, K, 2))


def activation(y: Tensor, norm: Tensor, shortcut: Tensor | None = None) -> Tensor:
    return F.relu(before_relu(y, norm, shortcut)).to(y.dtype)


def positive(mask: Tensor) -> Tensor:
    """[N, K, H, W] bool from the mask of any implementation: bits, the activation, or that."""
    if mask.dtype == torch.uint8:
        bits = mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
        mask = bits.flatten(3).permute(0, 3, 1, 2)
    return mask > 0


class Kernels:
    """One pass; see ``schedule.Kernels``.

    Args:
        units: of the trunk
        pictures: as ``pictures_for_kernels`` leaves them
        kept: of the forward pass, for a backward pass

    Attributes:
        weights: one tensor a unit
        gradients: of weight, bn_weight and bn_bias of each unit
    """

    def __init__(self, units: Sequence[Unit], pictures: Tensor, kept: Kept | None = None):
        self._units = units
        self.weights: Sequence[Tensor]
        if kept is None:
            self.weights = [
                unit.weight.to(pictures.dtype, memory_format=torch.channels_last) for unit in units
            ]
        else:
            self.weights = kept.weights
        self.gradients: list[tuple[Tensor, ...]] = [()] * len(units)

    def stem_forward(self, pictures):
        return self._convolve(0, pictures)

    def f1(self, i, y, sums, shortcut):
        norm = self._norm(i - 1, y, sums)
        x = activation(y, norm, shortcut)
        return x, norm, *self._convolve(i, x)

    def f2(self, i, y, sums):
        norm = self._norm(i - 1, y, sums)
        return norm, *self._convolve(i, activation(y, norm))

    def head_forward(self, y, sums, shortcut):
        norm = self._norm(-1, y, sums)
        x = activation(y, norm, shortcut)
        return norm, widened(x).mean((2, 3)), x > 0

    def head_backward(self, dpooled, mask, y, norm):
        dx = (dpooled / y[0, 0].numel()).to(y.dtype)[:, :, None, None]
        return self._masked(dx, mask, y, norm)

    def b2(self, i, dz, sums, y, norm, y_before, norm_before):
        a1 = activation(y_before, norm_before)
        da1 = self._convolve_backward(i, dz, sums, y, norm, a1)
        return self._masked(da1, a1 > 0, y_before, norm_before)

    def b1(self, i, dz, sums, y, norm, y_before, norm_before, x, residual):
        dx = self._convolve_backward(i, dz, sums, y, norm, x)
        if residual.shape == x.shape:
            dx += residual
        else:
            C = x.shape[1]
            dx[:, :, ::2, ::2] += residual[:, C // 2 : C // 2 + C]
        return self._masked(dx, x > 0, y_before, norm_before)

    def stem_backward(self, dz, sums, y, norm, pictures):
        self._convolve_backward(0, dz, sums, y, norm, pictures)

    def _convolve(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, self.weights[i], stride=stride_of(i, self.weights[i]), padding=1)
        return y, sums_of(y)

    def _norm(self, i: int, y: Tensor, sums: Tensor) -> Tensor:
        """[4, K] of unit i, whose running statistics it updates."""
        unit, (mean, variance) = self._units[i], sums
        values = y.numel() // y.shape[1]
        for running, new in (
            (unit.running_mean, mean),
            (unit.running_var, variance * values / (values - 1)),
        ):
            running += unit.momentum * (new - running)
        invstd = (variance + unit.eps).rsqrt()
        scale = unit.bn_weight * invstd
        return torch.stack((mean, invstd, scale, unit.bn_bias - mean * scale))

    def _masked(self, dx, mask, y, norm):
        dz = dx * mask
        return dz, gradient_sums_of(dz, y, norm)

    def _convolve_backward(self, i, dz, sums, y, norm, x):
        """The gradient of x, which for the stem's pictures is None; leaves those of unit i."""
        mean, invstd, scale, _ = norm
        dbn_weight, dbn_bias = sums[1] * invstd, sums[0]
        values = y.numel() // y.shape[1]
        yhat = (widened(y) - per_channel(mean)) * per_channel(invstd)
        centred = widened(dz) - per_channel(dbn_bias / values)
        dy = per_channel(scale) * (centred - yhat * per_channel(dbn_weight / values))
        stride, wanted = [stride_of(i, self.weights[i])] * 2, [i > 0, True, False]
        form = (None, stride, [1, 1], [1, 1], False, [0, 0], 1)  # no bias; padding 1
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy.to(dz.dtype), x, self.weights[i], *form, wanted
        )
        weight = self._units[i].weight
        self.gradients[i] = (torch.empty_like(weight).copy_(dweight), dbn_weight, dbn_bias)
        return dx
