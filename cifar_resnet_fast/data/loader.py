"""Batches from a data set on the device as bytes, augmented and normalised there (layer 2).

Every random draw of an epoch (order, crop offsets, flips, cutout, operations) is a pure function
of (seed, epoch), so any batch of any epoch can be made again, on any device and by any number of
processes. The draws come from numpy's Philox generator, a counter-based one whose stream never
changes.

The draws of an epoch are a table on the device, and a counter on the device selects the rows of a
batch. Making a batch is therefore device work alone, and a CUDA graph can capture it. A set that
does not fit into the device's memory stays on the host, and a window of it moves along with the
steps.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cifar_resnet_fast import ops
from cifar_resnet_fast.data.trivial_augment import TrivialAugment, codes_of

CROP_PADDING = 4  # pixels on each side (He et al. 2015, section 4.2)
PADDING_MODES = ("zeros", "reflect")
FLIPS = ("random", "alternating")
# keys of streams beside those of the epochs
_NO_EPOCH = 2**64 - 1  # draws that are the same in all epochs
_MIX = 2**63  # added to an epoch: how its steps are mixed
_TRIVIAL = 2**62  # added to an epoch: the operations of TrivialAugment
_TRIES = 64  # of drawing a ratio; one is taken with a chance of at least a half
_CHUNK_STEPS = 16  # steps a half of the window holds: 50 MB at batch size 1024


@dataclass(frozen=True)
class EpochDraws:
    """The random draws of one epoch over ``size`` images, on the CPU.

    order: [size] int64. the image at each place of the epoch
    dy, dx: [size] int64 in 0 .. 2 * padding. corner of its crop
    flip: [size] bool. whether it is mirrored
    cy, cx: [size] int64 in 0 .. 31. centre of the square that cutout removes
    """

    order: Tensor
    dy: Tensor
    dx: Tensor
    flip: Tensor
    cy: Tensor
    cx: Tensor


def draw_epoch(
    seed: int, epoch: int, size: int, flip: str = "random", padding: int = CROP_PADDING
) -> EpochDraws:
    """The draws of an epoch, which depend on nothing but the arguments.

    Args:
        seed: seed of the run, 0 .. 2**64 - 1
        epoch: from 0
        size: number of training images
        flip: ``random`` draws anew whether an image is mirrored; ``alternating`` draws once for
            each image whether that is in the even or in the odd epochs, so that two epochs in
            succession have both (Jordan 2024, section 3.6)
        padding: pixels on each side of an image before its crop
    """
    keys, bits, centre = _philox(seed, epoch, 3 * size).reshape(3, size)
    order = np.argsort(keys, kind="stable")
    offsets = np.uint64(2 * padding + 1)
    # 31 bits an offset, whose remainder by 9 is uniform to 4e-9; the top bit for the flip
    dy = (bits & np.uint64(0x7FFFFFFF)) % offsets
    dx = ((bits >> np.uint64(31)) & np.uint64(0x7FFFFFFF)) % offsets
    mirrored = bits >> np.uint64(63)
    if flip == "alternating":
        of_image = _philox(seed, _NO_EPOCH, size) >> np.uint64(63)
        mirrored = of_image[order] ^ np.uint64(epoch % 2)
    cy, cx = centre >> np.uint64(59), (centre >> np.uint64(54)) & np.uint64(31)
    return EpochDraws(
        torch.from_numpy(order),
        torch.from_numpy(dy.astype(np.int64)),
        torch.from_numpy(dx.astype(np.int64)),
        torch.from_numpy(mirrored.astype(bool)),
        torch.from_numpy(cy.astype(np.int64)),
        torch.from_numpy(cx.astype(np.int64)),
    )


def draw_mix(seed: int, epoch: int, steps: int, side: int, mixup: float, cutmix: float) -> Tensor:
    """[6, steps] float32, on the CPU. How each step of an epoch mixes images with their partners,
    in the form of ``ops.load_batch``.

    Args:
        seed, epoch: as for ``draw_epoch``
        steps: of the epoch
        side: of the images, pixels
        mixup, cutmix: parameter of the symmetric Beta distribution of the ratio, 0 .. 1, or 0 if
            there is none of the kind. With both, each step has one of them, with equal chances

    Source: Zhang et al. 2018, section 2 (mixup); Yun et al. 2019, equation 2 (cutmix); Johnk 1964
    (drawing from a Beta distribution).
    """
    # [draw, step], uniform in 0 .. 1 and never either
    uniform = (_philox(seed, _MIX + epoch, (2 * _TRIES + 3) * steps) >> np.uint64(11)) + 0.5
    uniform = uniform.reshape(-1, steps) * 2.0**-53
    kind, cy, cx = uniform[:3]
    is_cutmix = kind < (0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = np.where(is_cutmix, cutmix, mixup)
    # powers of uniform numbers x and y; x / (x + y) if x + y <= 1. A small alpha makes both of
    # them too small for a float64, not so their logarithms
    x, y = np.log(uniform[3:].reshape(2, _TRIES, steps)) / alpha
    taken = (np.logaddexp(x, y) <= 0).argmax(0)[None]
    ratio = (1 + np.tanh((np.take_along_axis(x - y, taken, 0)[0]) / 2)) / 2
    # the box has the share 1 - ratio of the image, and what lies outside is cut off
    half = np.sqrt(1 - ratio) / 2
    edges = [(cy - half), (cy + half), (cx - half), (cx + half)]
    top, bottom, left, right = ((edge * side).round().clip(0, side) for edge in edges)
    outside = 1 - (bottom - top) * (right - left) / side**2
    box = [np.where(is_cutmix, edge, 0.0) for edge in (top, bottom, left, right)]
    weight, share = np.where(is_cutmix, 1.0, ratio), np.where(is_cutmix, outside, ratio)
    return torch.from_numpy(np.stack([weight, *box, share])).float()


def draw_trivial(seed: int, epoch: int, size: int) -> Tensor:
    """[size] int64, on the CPU. The code of ``TrivialAugment`` at each place of an epoch.

    Args:
        seed, epoch, size: as for ``draw_epoch``
    """
    return torch.from_numpy(codes_of(_philox(seed, _TRIVIAL + epoch, size)))


def _philox(seed: int, epoch: int, count: int) -> np.ndarray:
    """[count] uint64. A stream of its own for each seed and epoch."""
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)


class Loader:
    """Batches of one split, made on a device, for one of several processes.

    A batch is made in two parts. ``prepare``, on the host, puts the inputs of the step on the
    device; it waits for the device only if the window moves. ``batch`` is device work alone.

    Args:
        images: [N, 32, 32, 3] uint8, on the CPU; or the ``source`` of another loader, which is
            then shared
        labels: [N] int64
        mean, std: [3] float32, full scale 1. of the normalisation
        batch_size: images per step, over all processes; a multiple of their number
        device: the device of the batches
        dtype: of the batches
        augmented: True for training: each epoch has its own order and draws, and the images of a
            partial batch are dropped; False for all images unchanged and in their own order, with
            the last batch filled up with black images of label -1
        cutout: side of the square removed from each augmented image, or 0
        flip: of augmented images, as ``draw_epoch`` has it
        crop_padding: pixels on each side of an augmented image before its crop
        padding_mode: one of ``PADDING_MODES``: what these pixels are
        trivial_augment: augmented images first have an operation each, as ``TrivialAugment`` has
            it, in plain PyTorch; all else is as without
        mixup, cutmix: of augmented images, as ``draw_mix`` has them. An image's partner is the one
            at its place in the reversed batch of all processes
        mixed_epochs: the epochs from this one on are not mixed; None if all are
        rank, processes: makes the ``rank``-th part of each batch
        resident: whether the whole set lies on the device; None where it takes at most half of
            the free memory
        wait: waits for an event of the device

    Raises:
        ValueError: ``batch_size`` is out of its range or does not split
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
        augmented: bool = True,
        cutout: int = 0,
        flip: str = "random",
        crop_padding: int = CROP_PADDING,
        padding_mode: str = "zeros",
        trivial_augment: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixed_epochs: int | None = None,
        rank: int = 0,
        processes: int = 1,
        resident: bool | None = None,
        wait: Callable[[torch.cuda.Event], None] = torch.cuda.Event.synchronize,
    ):
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"batch_size must be in 1 .. {len(images)}, the number of images, got {batch_size}"
            )
        if batch_size % processes:
            raise ValueError(
                f"batch_size must be a multiple of the {processes} processes, got {batch_size}"
            )
        self.size = len(images)
        self.batch_size = batch_size
        self.part_size = batch_size // processes  # this process's images of a batch
        self._augmented, self._cutout = augmented, cutout if augmented else 0
        self._flip = flip
        self._padding, self._padding_mode = crop_padding, padding_mode
        self._rank, self._processes = rank, processes
        self._kinds = mixup, cutmix
        mixed = augmented and bool(mixup or cutmix)
        self._mixed_epochs = mixed_epochs
        self._values = ops.normalized_bytes(mean, std, dtype).to(device)
        shape = (1 + mixed, 6, self.steps * self.part_size)
        self._draws = torch.zeros(shape, dtype=torch.int32, device=device)
        self._trivial = None
        if trivial_augment and augmented:
            self._trivial = TrivialAugment(images.shape[1], images.shape[2], device)
            # of each image and partner of the epoch: where it lies, and its code
            self._chosen = torch.zeros((2, *shape[::2]), dtype=torch.int64, device=device)
        self._mix = torch.zeros((6, self.steps), device=device) if mixed else None
        # the seed and the epoch of the draws on the device
        self._drawn: tuple[int, int] | None = None
        self._window = None
        if resident is None:
            resident = _fits(images, device)
        self.resident = resident
        self.source = images, labels  # what another loader can share
        if resident:
            self._images, self._labels = self.source = images.to(device), labels.to(device)
        elif mixed and processes > 1:
            raise ValueError(
                f"mixup and cutmix must be 0 with several processes if the images do not fit into "
                f"the device's memory, got {mixup} and {cutmix}"
            )
        else:
            self._window = _Window(images, labels, self.part_size, self.steps, device, wait)
            self._images, self._labels = self._window.images, self._window.labels

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.size, self.batch_size)
        return full if self._augmented else full + (rest > 0)

    def prepare(self, step: int, seed: int = 0) -> None:
        """Put the inputs of ``batch`` on the device; to be called before each step.

        Args:
            step: from 0, counted through all epochs; must be the device's counter
            seed: of the run
        """
        epoch = step // self.steps
        if self._drawn != (seed, epoch):
            table = self._table(seed, epoch)
            if self._window is not None:
                present = table[0, 0] >= 0
                places = self._window.places(epoch)
                table[0, 0] = torch.where(present, places, -1)
                if self._mix is not None:
                    table[1, 0] = places.reshape(self.steps, -1).flip(1).flatten()
            if self._trivial is not None:
                chosen = table[:, ::6].transpose(0, 1).long()
                self._chosen.copy_(_pinned(chosen, self._chosen.device), non_blocking=True)
                # the kernel finds them in the batch of the augmented ones, the partners last
                batch = torch.arange(len(table) * self.part_size, dtype=torch.int32)
                table[:, 0] = (
                    batch.reshape(-1, 1, self.part_size).expand(-1, self.steps, -1).flatten(1)
                )
            draws = table[:, :6].contiguous()
            self._draws.copy_(_pinned(draws, self._draws.device), non_blocking=True)
            if self._mix is not None:
                mix = self._mix_of(seed, epoch)
                self._mix.copy_(_pinned(mix, self._mix.device), non_blocking=True)
            self._drawn = (seed, epoch)
        if self._window is not None:
            self._window.move_to(step, lambda epoch: self._table(seed, epoch)[0, 0], key=seed)

    def batch(self, step: Tensor) -> tuple[Tensor, ...]:
        """This process's part of a batch.

        Args:
            step: [] int64, on the device. what ``prepare`` was called with

        Returns:
            images: [part_size, 3, 32, 32], channels-last, normalised; see ``ops.load_batch``
            labels: [part_size] int64
            labels_b, ratio: [part_size] int64 and [] float32, with mixup or cutmix only. second
                labels, and the share of the first ones
        """
        images, labels = self._images, self._labels
        if self._trivial is not None:
            rows = step % self.steps * self.part_size
            rows = rows + torch.arange(self.part_size, device=images.device)
            places, codes = self._chosen.index_select(2, rows).flatten(1)
            images = self._trivial(images.index_select(0, places), codes)
            labels = labels.index_select(0, places)
        return ops.load_batch(
            images,
            labels,
            self._values,
            self._draws.flatten(0, 1),
            step,
            batch_size=self.part_size,
            padding=self._padding,
            padding_mode=self._padding_mode,
            cutout=self._cutout,
            mix=self._mix,
        )

    def _mix_of(self, seed: int, epoch: int) -> Tensor:
        """[6, steps] float32, on the CPU."""
        if self._mixed_epochs is not None and epoch >= self._mixed_epochs:
            return torch.tensor([1.0, 0, 0, 0, 0, 1.0])[:, None].repeat(1, self.steps)
        return draw_mix(seed, epoch, self.steps, self._images.shape[1], *self._kinds)

    def _table(self, seed: int, epoch: int) -> Tensor:
        """[1 or 2, 6 or 7, steps * part_size] int32, on the CPU. The epoch's draws, of this
        process's part; with mixing those of the partners after them. The seventh is the code of
        TrivialAugment."""
        if self._augmented:
            draws = draw_epoch(seed, epoch, self.size, self._flip, self._padding)
            columns = [draws.order, draws.dy, draws.dx, draws.flip, draws.cy, draws.cx]
            if self._trivial is not None:
                columns.append(draw_trivial(seed, epoch, self.size))
            table = torch.stack([column.int() for column in columns])
        else:
            table = torch.tensor([0, self._padding, self._padding, 0, 0, 0], dtype=torch.int32)
            table = table[:, None].repeat(1, self.steps * self.batch_size)
            table[0] = torch.arange(table.shape[1])
            table[0, self.size :] = -1
        parts = table[:, : self.steps * self.batch_size].reshape(
            len(table), self.steps, self._processes, self.part_size
        )
        own = parts[:, :, self._rank].flatten(1)
        if self._mix is None:
            return own[None]
        partners = parts[:, :, self._processes - 1 - self._rank].flip(2).flatten(1)
        return torch.stack((own, partners))


class _Window:
    """The images of the current steps, on the device: two halves, of which one is read while the
    other is filled.

    A half takes a chunk of up to ``_CHUNK_STEPS`` steps of one epoch. Chunks are numbered through
    all epochs; chunk c is in half c % 2.

    Args:
        images, labels: the whole set, on the CPU
        part_size: images per step
        steps: steps per epoch
        device: the device of the window
        wait: waits for an event
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        part_size: int,
        steps: int,
        device: torch.device,
        wait: Callable[[torch.cuda.Event], None],
    ):
        self._wait = wait
        self._all_images, self._all_labels = images, labels
        self._part_size, self._steps = part_size, steps
        self._chunk_steps = min(_CHUNK_STEPS, steps)
        self._chunks = -(-steps // self._chunk_steps)  # an epoch
        self._half = self._chunk_steps * part_size  # images
        shape = (2 * self._half, *images.shape[1:])
        self.images = torch.zeros(shape, dtype=images.dtype, device=device)
        self.labels = torch.zeros(2 * self._half, dtype=labels.dtype, device=device)
        self._held: list[tuple[Any, int] | None] = [None, None]
        self._cuda = device.type == "cuda"
        # a copy to the device without waiting needs pinned memory until it has arrived
        self._staged_images = _pinned(torch.zeros(shape, dtype=images.dtype), device)
        self._staged_labels = _pinned(torch.zeros(2 * self._half, dtype=labels.dtype), device)
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._filled = [torch.cuda.Event(), torch.cuda.Event()]

    def places(self, epoch: int) -> Tensor:
        """[steps * part_size] int32. The places of the epoch's images in the window."""
        row = torch.arange(self._steps * self._part_size, dtype=torch.int32)
        chunk = epoch * self._chunks + row // self._half
        return chunk % 2 * self._half + row % self._half

    def move_to(self, step: int, pictures_of, key) -> None:
        """Put the step's chunk on the device, and launch the copy of the next one.

        Args:
            step: from 0, counted through all epochs
            pictures_of: function of an epoch to [steps * part_size]. its images, -1 for none
            key: two orders of the same epoch have different ones
        """
        epoch, place = divmod(step, self._steps)
        chunk = epoch * self._chunks + place // self._chunk_steps
        here = self._held[chunk % 2] == (key, chunk)
        if here and place % self._chunk_steps:
            return
        for wanted in (chunk, chunk + 1):
            if self._held[wanted % 2] != (key, wanted):
                self._fill(wanted, pictures_of)
                self._held[wanted % 2] = (key, wanted)
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._filled[chunk % 2])

    def _fill(self, chunk: int, pictures_of) -> None:
        epoch, part = divmod(chunk, self._chunks)
        pictures = pictures_of(epoch)[part * self._half :][: self._half].long().clamp(min=0)
        half = chunk % 2
        place = slice(half * self._half, half * self._half + len(pictures))
        if self._cuda:
            self._wait(self._filled[half])  # the copy out of this staging half has ended
        torch.index_select(self._all_images, 0, pictures, out=self._staged_images[place])
        torch.index_select(self._all_labels, 0, pictures, out=self._staged_labels[place])
        stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._cuda:
            # steps that read this half were launched before; the copy must not overtake them
            self._stream.wait_stream(torch.cuda.current_stream())
            stream = torch.cuda.stream(self._stream)
        with stream:
            self.images[place].copy_(self._staged_images[place], non_blocking=True)
            self.labels[place].copy_(self._staged_labels[place], non_blocking=True)
            if self._cuda:
                self._filled[half].record()


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` in memory from which a copy to ``device`` need not be waited for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= free // 2
