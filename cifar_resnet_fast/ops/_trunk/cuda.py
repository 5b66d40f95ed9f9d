"""The trunk's kernels in the compiled extension (layer 1).

Kernels: csrc/{conv3x3,stem,pool,weights}; their bindings: csrc/bindings/trunk.h. 16-bit, 32x32
pictures, 16, 32 and 64 channels. A kernel merges the sums that the one before left, and adds up
its weight gradient's slabs, in its own first microseconds.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_resnet_fast.kernels.launch import multiprocessors
from cifar_resnet_fast.ops._trunk.schedule import Kept, stride_of
from cifar_resnet_fast.reference import Unit

CHANNELS = (16, 32, 64)
MOST_PICTURES = 65535
_PICTURE_STRIDES = (4 * 32 * 32, 1, 4 * 32, 4)


def pictures_for_kernels(pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, 4, 32, 32] channels-last of ``dtype``, whose fourth channel nobody reads.

    A view where ``pictures`` has room for one, as the loader's have.
    """
    N = len(pictures)
    if not torch.compiler.is_compiling():  # which does not know where memory lies
        end = pictures.storage_offset() + N * _PICTURE_STRIDES[0]
        fits = end * pictures.element_size() <= pictures.untyped_storage().nbytes()
        aligned = pictures.data_ptr() % 8 == 0
        if pictures.dtype == dtype and pictures.stride() == _PICTURE_STRIDES and fits and aligned:
            return pictures.as_strided((N, 4, 32, 32), _PICTURE_STRIDES)
    padded = F.pad(pictures.to(dtype), (0, 0, 0, 0, 0, 1))
    return padded.contiguous(memory_format=torch.channels_last)


def fragment_sizes(weights: Sequence[Tensor], both: bool) -> list[int]:
    """Elements of each piece of the prepared weights: forward, and backward where ``both``."""
    pieces = [3 * 256]  # of the stem, which has no backward ones
    for weight in weights[1:]:
        pieces += [weight.numel()] * (1 + both)
    return pieces


def like_mask_and_weights(y: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Tensors like those that a forward pass keeps; y is the last."""
    N, K, H, W = y.shape
    elements = sum(fragment_sizes(weights, both=True))
    return y.new_empty((N, H, W, K // 8), dtype=torch.uint8), [y.new_empty(elements)]


class Kernels:
    """One pass; see ``schedule.Kernels``.

    Args:
        units: of the trunk
        pictures: as ``pictures_for_kernels`` leaves them
        kept: of the forward pass, for a backward pass
        places: of each unit, where the gradient of the weight goes; None for new tensors

    Attributes:
        weights: the prepared weights, one tensor
        gradients: of weight, bn_weight and bn_bias of each unit, whole after ``stem_backward``
    """

    def __init__(
        self,
        units: Sequence[Unit],
        pictures: Tensor,
        kept: Kept | None = None,
        places: Sequence[Tensor | None] | None = None,
    ):
        self._ops = torch.ops.cifar_resnet_fast
        self._units = units
        self._blocks = multiprocessors(pictures.device)  # a block fills one
        weights = [unit.weight for unit in units]
        self.weights: Sequence[Tensor]
        if kept is None:
            self.weights = [self._ops.prepare_weights(weights, pictures)]
        else:
            self.weights = kept.weights
        pieces = self.weights[0].split(fragment_sizes(weights, both=True))
        self._forward = [pieces[0], *pieces[1::2]]
        self._backward = [None, *pieces[2::2]]
        self.gradients: list[tuple[Tensor, ...]] = [()] * len(units)
        self._places = [None] * len(units) if places is None else places
        # slabs, and the gradient that they are to be added up into
        self._left: tuple[Tensor | None, Tensor | None] = (None, None)

    def _norm(self, i: int) -> tuple:
        """The arguments of unit i's normalisation."""
        return self._units[i][1:]

    def stem_forward(self, pictures):
        return self._ops.stem_forward(pictures, self._forward[0], self._blocks)

    def f1(self, i, y, sums, shortcut):
        stride = stride_of(i, self._units[i].weight)
        x, out, out_sums, norm = self._ops.conv3x3_f1(
            y, sums, *self._norm(i - 1), shortcut, self._forward[i], stride, self._blocks
        )
        return x, norm, out, out_sums

    def f2(self, i, y, sums):
        out, out_sums, norm = self._ops.conv3x3_f2(
            y, sums, *self._norm(i - 1), self._forward[i], self._blocks
        )
        return norm, out, out_sums

    def head_forward(self, y, sums, shortcut):
        pooled, mask, norm = self._ops.head_forward(
            y, sums, *self._norm(-1), shortcut, self._blocks
        )
        return norm, pooled, mask

    def head_backward(self, dpooled, mask, y, norm):
        return self._ops.head_backward(dpooled.contiguous(), mask, y, norm, self._blocks)

    def b2(self, i, dz, sums, y, norm, y_before, norm_before):
        dz, sums, *made = self._ops.conv3x3_b2(
            dz,
            y,
            sums,
            self._units[i].bn_weight,
            norm,
            y_before,
            norm_before,
            self._backward[i],
            *self._left,
            self._blocks,
        )
        self._leave(i, *made)
        return dz, sums

    def b1(self, i, dz, sums, y, norm, y_before, norm_before, x, residual):
        stride = stride_of(i, self._units[i].weight)
        dz, sums, *made = self._ops.conv3x3_b1(
            dz,
            y,
            sums,
            self._units[i].bn_weight,
            norm,
            x,
            residual,
            y_before,
            norm_before,
            self._backward[i],
            *self._left,
            stride,
            self._blocks,
        )
        self._leave(i, *made)
        return dz, sums

    def stem_backward(self, dz, sums, y, norm, pictures):
        made = self._ops.stem_backward(
            dz, y, sums, self._units[0].bn_weight, norm, pictures, *self._left, self._blocks
        )
        self._leave(0, *made)
        self._ops.sum_slabs(*self._left, self._blocks)

    def _leave(self, i: int, slabs: Tensor, dbn_weight: Tensor, dbn_bias: Tensor) -> None:
        """The next kernel adds up the slabs."""
        place = self._places[i]
        dweight = torch.empty_like(self._units[i].weight) if place is None else place
        self._left = (slabs, dweight)
        self.gradients[i] = (dweight, dbn_weight, dbn_bias)


def evaluate(units: Sequence[Unit], pictures: Tensor) -> Tensor:
    """[N, 64] float32. The trunk with the running statistics, folded into the weights."""
    ops, blocks = torch.ops.cifar_resnet_fast, multiprocessors(pictures.device)
    weights, *vectors = [[getattr(unit, name) for unit in units] for name in Unit._fields[:5]]
    eps = [unit.eps for unit in units]
    fragments, biases = ops.fold_weights(weights, *vectors, eps, pictures)
    fragments = fragments.split(fragment_sizes(weights, both=False))
    biases = biases.split([len(unit.weight) for unit in units])
    x = ops.stem_evaluate(pictures, fragments[0], biases[0], blocks)
    for first in range(1, len(units), 2):
        second = first + 1
        stride = stride_of(first, units[first].weight)
        a = ops.conv3x3_evaluate(x, fragments[first], biases[first], None, stride, blocks)
        x = ops.conv3x3_evaluate(a, fragments[second], biases[second], x, 1, blocks)
    return x.mean((2, 3), dtype=torch.float32)
