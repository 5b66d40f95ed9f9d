"""The order of kernels in a training step of the trunk, whoever has the kernels (layer 1).

An activation travels raw: a convolution writes its output before the normalisation, y, and sums
of it from which whoever reads y makes the statistics; who reads it normalises on load. So nothing
is written twice, and of every block three activations are kept: its input x and the raw outputs
y1 and y2 of its convolutions.

=======  =======================================================================
unit i   0 is the first convolution, 1 and 2 those of the first block, and so on
y[i]     raw output of unit i's convolution
sums     of a y or a dz, left by the kernel that wrote it, for the next one
norm[i]  [4, K] float32: mean, invstd, scale, shift of unit i's normalisation
x        finished activation, the input of a block
dz       gradient of a normalisation's output, masked by the ReLU behind it
=======  =======================================================================

F1, F2, B1 and B2 are the four kernels of a block:

====  ======================================  ==========================================
F1    x = relu(norm(y) [+ shortcut])          y1 = conv1(x)
F2    a1 = relu(norm(y1))                     y2 = conv2(a1)
B2    dz1 = conv2_T(dy2) where a1 > 0         dweight2 from a1 and dy2
B1    dz = (conv1_T(dy1) + dz2) where x > 0   dweight1 from x and dy1
====  ======================================  ==========================================

where dy is what the normalisation's backward makes of dz and y, on load, and dz2, the gradient of
the block's output, comes back over the shortcut as well. The shortcut of a stage's first block is
option A's in both directions.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


def stride_of(i: int, weight: Tensor) -> int:
    """Of unit i's convolution: 2 where a stage begins."""
    K, C = weight.shape[:2]
    return 1 if i == 0 or K == C else 2


def shapes_of_y(pictures: Tensor, weights: Sequence[Tensor]) -> list[tuple[int, int, int, int]]:
    """[N, K, H, W] of every unit's y."""
    N, _, H, W = pictures.shape
    shapes = []
    for i, weight in enumerate(weights):
        if stride_of(i, weight) == 2:
            H, W = (H + 1) // 2, (W + 1) // 2
        shapes.append((N, weight.shape[0], H, W))
    return shapes


class Kept(NamedTuple):
    """What the backward pass needs of the forward one, for 2n + 1 units in n blocks."""

    mask: Tensor  # where the last activation is positive, as the kernels like it
    y: Sequence[Tensor]  # 2n + 1
    norm: Sequence[Tensor]  # 2n + 1
    x: Sequence[Tensor]  # n
    weights: Sequence[Tensor]  # as the kernels read them

    def flat(self) -> list[Tensor]:
        return [self.mask, *self.y, *self.norm, *self.x, *self.weights]

    @classmethod
    def of(cls, flat: Sequence[Tensor], units: int) -> "Kept":
        """What ``flat`` gave, of so many units."""
        ends = (0, 1, 1 + units, 1 + 2 * units, 1 + 2 * units + units // 2, len(flat))
        mask, *lists = (flat[a:b] for a, b in zip(ends, ends[1:], strict=False))
        return cls(mask[0], *lists)


class Kernels(Protocol):
    """One pass through the kernels of an implementation.

    weights: as the kernels read them
    gradients: of weight, bn_weight and bn_bias of each unit, whole after ``stem_backward``
    """

    weights: Sequence[Tensor]
    gradients: list[tuple[Tensor, ...]]

    def stem_forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """y[0] and its sums."""

    def f1(
        self, i: int, y: Tensor, sums: Tensor, shortcut: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From y[i - 1] and the input x of the block before: x, norm[i - 1], y[i] and its sums."""

    def f2(self, i: int, y: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From y[i - 1]: norm[i - 1], y[i] and its sums."""

    def head_forward(
        self, y: Tensor, sums: Tensor, shortcut: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the last y: its norm, the pooled activation and its mask."""

    def head_backward(
        self, dpooled: Tensor, mask: Tensor, y: Tensor, norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dz of the last unit and its sums."""

    def b2(
        self,
        i: int,
        dz: Tensor,
        sums: Tensor,
        y: Tensor,
        norm: Tensor,
        y_before: Tensor,
        norm_before: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """From dz of unit i: dz of unit i - 1 and its sums. Sees to unit i's gradients."""

    def b1(
        self,
        i: int,
        dz: Tensor,
        sums: Tensor,
        y: Tensor,
        norm: Tensor,
        y_before: Tensor,
        norm_before: Tensor,
        x: Tensor,
        residual: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The same, where x was the input, and the residual is dz of the block's output."""

    def stem_backward(
        self, dz: Tensor, sums: Tensor, y: Tensor, norm: Tensor, pictures: Tensor
    ) -> None:
        """Sees to the gradients of unit 0, and to all that are not finished yet."""


def forward(kernels: Kernels, pictures: Tensor, units: int, keep: bool) -> tuple[Tensor, Kept]:
    """The pooled activation, [N, K] float32; without ``keep`` memory is given back on the way."""
    ys, norms, xs = [], [], []
    y, sums = kernels.stem_forward(pictures)
    x = None
    for first in range(1, units, 2):
        ys.append(y)
        x, norm, y, sums = kernels.f1(first, y, sums, x)
        xs.append(x)
        norms.append(norm)
        ys.append(y)
        norm, y, sums = kernels.f2(first + 1, y, sums)
        norms.append(norm)
        if not keep:
            ys.clear()
            xs.clear()
    norm, pooled, mask = kernels.head_forward(y, sums, x)
    return pooled, Kept(mask, [*ys, y], [*norms, norm], xs, kernels.weights)


def backward(kernels: Kernels, dpooled: Tensor, pictures: Tensor, kept: Kept) -> None:
    """Leaves the gradients of all units with ``kernels``."""
    y, norm = kept.y, kept.norm
    dz2, sums = kernels.head_backward(dpooled, kept.mask, y[-1], norm[-1])
    for second in range(len(y) - 1, 0, -2):
        first, before = second - 1, second - 2
        x = kept.x[before // 2]
        dz1, sums = kernels.b2(second, dz2, sums, y[second], norm[second], y[first], norm[first])
        dz2, sums = kernels.b1(
            first, dz1, sums, y[first], norm[first], y[before], norm[before], x, residual=dz2
        )
    kernels.stem_backward(dz2, sums, y[0], norm[0], pictures)
