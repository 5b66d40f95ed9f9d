"""Batches: the whole set on the device as bytes, augmented and normalised there (layer 2).

Every random draw of an epoch (order, crop offsets, flips) is a pure function of (seed, epoch), so
any batch of any epoch can be made again, on any device and by any number of processes. The draws
come from numpy's Philox generator, a counter-based one whose stream never changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cifar_resnet_fast import ops

CROP_PADDING = 4  # pixels of zeros on each side (He et al. 2015, section 4.2)


@dataclass(frozen=True)
class EpochDraws:
    """The random draws of one epoch over ``size`` pictures, on the CPU.

    order: [size] int64. the picture at each place of the epoch
    dy, dx: [size] int64 in 0 .. 2 * CROP_PADDING. corner of its crop
    flip: [size] bool. whether it is mirrored
    """

    order: Tensor
    dy: Tensor
    dx: Tensor
    flip: Tensor


def draw_epoch(seed: int, epoch: int, size: int) -> EpochDraws:
    """The draws of an epoch: the same for the same arguments, everywhere and for ever.

    Args:
        seed: of the run, 0 .. 2**64 - 1
        epoch: from 0
        size: number of training pictures
    """
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(2 * size)
    keys, bits = raw[:size], raw[size:]
    offsets = np.uint64(2 * CROP_PADDING + 1)
    # 31 bits an offset, whose remainder by 9 is uniform to 4e-9; the top bit for the flip
    dy = (bits & np.uint64(0x7FFFFFFF)) % offsets
    dx = ((bits >> np.uint64(31)) & np.uint64(0x7FFFFFFF)) % offsets
    flip = bits >> np.uint64(63)
    return EpochDraws(
        torch.from_numpy(np.argsort(keys, kind="stable")),
        torch.from_numpy(dy.astype(np.int64)),
        torch.from_numpy(dx.astype(np.int64)),
        torch.from_numpy(flip.astype(bool)),
    )


class Loader:
    """Batches of one split, made on the device that holds it.

    Args:
        images: [N, 32, 32, 3] uint8, any device; kept on ``device``
        labels: [N] int64
        mean, std: [3] float32, full scale 1. of the normalisation
        batch_size: 1 .. N
        device: where the batches are made
        dtype: of the batches

    Raises:
        ValueError: ``batch_size`` is out of its range
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"batch_size must be in 1 .. {len(images)}, the number of pictures, "
                f"got {batch_size}"
            )
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = mean.to(device), std.to(device)
        self.batch_size = batch_size
        self.dtype = dtype

    @property
    def steps(self) -> int:
        """Full batches in an epoch of training; the pictures left over are dropped."""
        return len(self.images) // self.batch_size

    def training_batches(
        self, seed: int, epoch: int, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of an epoch from batch ``start`` on.

        Yields:
            images: [batch_size, 3, 32, 32], channels-last, normalised
            labels: [batch_size] int64
        """
        draws = draw_epoch(seed, epoch, len(self.images))
        device = self.images.device
        order, dy, dx, flip = (
            draw.to(device) for draw in (draws.order, draws.dy, draws.dx, draws.flip)
        )
        for step in range(start, self.steps):
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            images = ops.augment(
                self.images[order[part]], dy[part], dx[part], flip[part], CROP_PADDING
            )
            yield self._normalized(images), self.labels[order[part]]

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All pictures in their own order, as they are; the last batch may be smaller."""
        parts = zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        )
        for images, labels in parts:
            yield self._normalized(images), labels

    def _normalized(self, images: Tensor) -> Tensor:
        return ops.normalize(images, self.mean, self.std, self.dtype)
