"""The trunk's kernels in Triton (layer 1).

Kernels: kernels/conv3x3_*.py, kernels/bn.py and kernels/shortcut_a.py. Any picture size, channels
in multiples of 16, float16, bfloat16 and float32. Statistics are merged by small kernels of their
own, and option A's shortcut is made as a tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cifar_resnet_fast.kernels import bn
from cifar_resnet_fast.kernels.conv3x3_bwd import conv3x3_bwd
from cifar_resnet_fast.kernels.conv3x3_fwd import conv3x3_fwd
from cifar_resnet_fast.kernels.shortcut_a import shortcut_a_bwd, shortcut_a_fwd
from cifar_resnet_fast.ops._trunk.schedule import Kept, stride_of
from cifar_resnet_fast.reference import Unit


def pictures_for_kernels(pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, 3, H, W] channels-last of ``dtype``."""
    return pictures.to(dtype).contiguous(memory_format=torch.channels_last)


def packed_weights(units: Sequence[Unit], dtype: torch.dtype) -> list[Tensor]:
    """As the kernels read them: [K, 9, C] row-major, which is channels-last, of ``dtype``."""
    weights = [unit.weight for unit in units]
    packed = [
        torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)
        for weight in weights
    ]
    torch._foreach_copy_(packed, weights)
    return packed


def like_mask_and_weights(y: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Tensors like those that a forward pass keeps; y is the last."""
    form = torch.channels_last
    return torch.empty_like(y), [
        torch.empty_like(weight, dtype=y.dtype, memory_format=form) for weight in weights
    ]


def _matching(shortcut: Tensor | None, y: Tensor) -> Tensor | None:
    """The shortcut in the shape of y: as it is, or option A's."""
    if shortcut is None or shortcut.shape[1] == y.shape[1]:
        return shortcut
    return shortcut_a_fwd(shortcut, y.shape[1], 2)


class Kernels:
    """One pass; see ``schedule.Kernels``.

    Args:
        units: of the trunk
        pictures: as ``pictures_for_kernels`` leaves them
        kept: of the forward pass, for a backward pass
        places: of each unit, where the gradient of the weight goes; None for new tensors

    Attributes:
        weights: one tensor a unit
        gradients: of weight, bn_weight and bn_bias of each unit
    """

    def __init__(
        self,
        units: Sequence[Unit],
        pictures: Tensor,
        kept: Kept | None = None,
        places: Sequence[Tensor | None] | None = None,
    ):
        self._units = units
        self.weights = packed_weights(units, pictures.dtype) if kept is None else kept.weights
        self.gradients: list[tuple[Tensor, ...]] = [()] * len(units)
        self._places = [None] * len(units) if places is None else places

    def _norm(self, i: int, sums: Tensor) -> Tensor:
        return bn.bn_merge_fwd(sums, *self._units[i][1:])

    def stem_forward(self, pictures):
        y, sums, _ = conv3x3_fwd(pictures, self.weights[0], stride=1, sums=True)
        return y, sums

    def f1(self, i, y, sums, shortcut):
        norm = self._norm(i - 1, sums)
        out, out_sums, x = conv3x3_fwd(
            y,
            self.weights[i],
            stride=stride_of(i, self._units[i].weight),
            sums=True,
            x_affine=norm,
            x_shortcut=_matching(shortcut, y),
            keep=True,
        )
        return x, norm, out, out_sums

    def f2(self, i, y, sums):
        norm = self._norm(i - 1, sums)
        out, out_sums, _ = conv3x3_fwd(y, self.weights[i], stride=1, sums=True, x_affine=norm)
        return norm, out, out_sums

    def head_forward(self, y, sums, shortcut):
        norm = self._norm(-1, sums)
        x = bn.bn_apply_fwd(y, norm, _matching(shortcut, y), relu=True)
        return norm, x.mean((2, 3), dtype=torch.float32), x

    def head_backward(self, dpooled, mask, y, norm):
        dx = (dpooled / mask[0, 0].numel()).to(y.dtype)[:, :, None, None].expand_as(y)
        dx = dx.contiguous(memory_format=torch.channels_last)
        return bn.bn_reduce_bwd(dx, y, norm, mask, relu=True, write_dz=True)

    def b2(self, i, dz, sums, y, norm, y_before, norm_before):
        return self._backward(
            i,
            dz,
            sums,
            y,
            norm,
            x=y_before,
            x_affine=norm_before,
            raw=y_before,
            raw_affine=norm_before,
        )

    def b1(self, i, dz, sums, y, norm, y_before, norm_before, x, residual):
        if stride_of(i, self._units[i].weight) == 2:
            _, C, H, W = x.shape
            residual = shortcut_a_bwd(residual, C, H, W, 2)
        return self._backward(
            i, dz, sums, y, norm, x=x, raw=y_before, raw_affine=norm_before, residual=residual
        )

    def stem_backward(self, dz, sums, y, norm, pictures):
        self._backward(0, dz, sums, y, norm, x=pictures)

    def _backward(self, i, dz, sums, y, norm, x, **neighbours):
        """dz of what x was made from and its sums; the pictures were made from nothing."""
        unit = self._units[i]
        pixels = y.numel() // y.shape[1]
        coef, dbn_weight, dbn_bias = bn.bn_merge_bwd(
            sums, norm, pixels, True, unit.bn_weight.dtype
        )
        place = self._places[i]
        dweight = torch.empty_like(unit.weight) if place is None else place
        self.gradients[i] = (dweight, dbn_weight, dbn_bias)
        return conv3x3_bwd(
            dz,
            y,
            coef,
            x,
            self.weights[i],
            stride=stride_of(i, unit.weight),
            relu=False,
            dx=i > 0,
            dweight=dweight,
            **neighbours,
        )


def evaluate(units: Sequence[Unit], pictures: Tensor) -> Tensor:
    """[N, K] float32. The trunk with the running statistics, one launch a layer."""
    weights = packed_weights(units, pictures.dtype)

    def apply(x: Tensor, i: int, shortcut: Tensor | None = None) -> Tensor:
        unit = units[i]
        running = (unit.bn_weight, unit.bn_bias, unit.running_mean, unit.running_var, unit.eps)
        stride = stride_of(i, unit.weight)
        a, _, _ = conv3x3_fwd(
            x, weights[i], stride=stride, running=running, shortcut=shortcut, relu=True
        )
        return a

    x = apply(pictures, 0)
    for first in range(1, len(units), 2):
        a = apply(x, first)
        x = apply(a, first + 1, _matching(x, a))
    return x.mean((2, 3), dtype=torch.float32)
