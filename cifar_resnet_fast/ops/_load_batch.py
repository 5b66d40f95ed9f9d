"""Batches out of the bytes of a data set (layer 1).

Twins: ``reference.load_batch`` and ``reference.normalize``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._checks import (
    FLOATING,
    check_count,
    check_dense,
    check_dtype,
    check_shape,
    check_tensor,
    shown,
)
from cifar_resnet_fast.ops._dispatch import choose


def normalized_bytes(mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """What each byte becomes in each channel: the ``values`` of ``load_batch``.

    Args:
        mean, std: [3] float32, in units of the full scale 1.0
        dtype: of the result

    Returns:
        [256, 3]

    Raises:
        TypeError: an argument is of another type or dtype
        ValueError: a shape or a device breaks its rule
    """
    for name, tensor in (("mean", mean), ("std", std)):
        check_tensor(name, tensor, "3")
        check_dtype(name, tensor, torch.float32)
        check_shape(name, tensor, (3,))
    if std.device != mean.device:
        raise ValueError(f"std must be on the device of mean, {mean.device}, got {std.device}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be {' or '.join(map(str, FLOATING))}, got {shown(dtype)}")
    every = torch.arange(256, dtype=torch.uint8, device=mean.device).reshape(256, 1, 1, 1)
    return reference.normalize(every.expand(256, 1, 1, 3), mean, std, dtype)[:, :, 0, 0]


def load_batch(
    images: Tensor,
    labels: Tensor,
    values: Tensor,
    draws: Tensor,
    step: Tensor,
    *,
    batch_size: int,
    padding: int,
    padding_mode: str = "zeros",
    cutout: int = 0,
    mix: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, ...]:
    """The augmented, normalised batch of a step; see ``reference.load_batch``.

    Every implementation gives the same bits. ``triton`` writes pixels of 4 channels, the fourth
    zero: its pictures are a view, channels-last with strides (4HW, 1, 4W, 4), which any
    convolution takes and one that knows of it can load 8 bytes at a time.

    Nothing is read back to the host, so a CUDA graph can capture it.

    Args:
        images: [N, H, W, 3] uint8, contiguous, with H * W <= 4096
        labels: [N] int64
        values: [256, 3], contiguous, floating. from ``normalized_bytes``
        draws: [6, R] int32, with ``mix`` [12, R], contiguous, R a multiple of batch_size and below
            2**31
        step: [] int64
        batch_size: at least 1
        padding: 0 .. 64
        padding_mode: ``zeros``, or ``reflect``, with padding less than H and W
        cutout: 0 .. 2**31 - 1
        mix: [6, R / batch_size] float32, contiguous, or None. how each step's images are mixed
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Returns:
        images: [B, 3, H, W], channels-last, of the dtype of ``values``
        labels: [B] int64
        labels_b, ratio: [B] int64 and [] float32, with ``mix`` only

    Raises:
        TypeError: an argument is of another type, or a tensor of another dtype
        ValueError: a tensor is nested or sparse; a shape, a device or a number breaks its rule
        RuntimeError: the named implementation cannot run here
    """
    check_dense("images", images)
    for name, number in (("batch_size", batch_size), ("padding", padding), ("cutout", cutout)):
        check_count(name, number)
    rules = [
        ("images", images, (None, None, None, 3), (torch.uint8,)),
        ("labels", labels, images.shape[:1], (torch.int64,)),
        ("values", values, (256, 3), FLOATING),
        ("draws", draws, (6 if mix is None else 12, None), (torch.int32,)),
        ("step", step, (), (torch.int64,)),
    ]
    if mix is not None:
        rules.append(("mix", mix, (6, None), (torch.float32,)))
    for name, tensor, axes, dtypes in rules:
        check_dense(name, tensor)
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        fits = tensor.dim() == len(axes) and all(
            size == axis or axis is None for size, axis in zip(tensor.shape, axes, strict=True)
        )
        if not fits or not tensor.is_contiguous():
            rule = ", ".join("any" if axis is None else str(axis) for axis in axes)
            raise ValueError(
                f"{name} must be contiguous with shape [{rule}], got shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()}"
            )
        if tensor.device != images.device:
            raise ValueError(
                f"{name} must be on the device of images, {images.device}, got {tensor.device}"
            )
    H, W, R = images.shape[1], images.shape[2], draws.shape[1]
    if not 0 < H * W <= 4096:
        raise ValueError(f"images must have 1 .. 4096 pixels each, got {H} x {W}")
    if batch_size < 1 or R == 0 or R % batch_size or R >= 2**31:
        raise ValueError(
            f"draws must have a multiple of the batch size {batch_size} of rows, below 2**31, "
            f"got {R}"
        )
    if mix is not None and mix.shape[1] != R // batch_size:
        raise ValueError(f"mix must have {R // batch_size} columns, got {mix.shape[1]}")
    for name, number, most in (("padding", padding, 64), ("cutout", cutout, 2**31 - 1)):
        if not 0 <= number <= most:
            raise ValueError(f"{name} must be 0 or more and at most {most}, got {number}")
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"padding_mode must be zeros or reflect, got {padding_mode!r}")
    if padding_mode == "reflect" and padding >= min(H, W):
        raise ValueError(
            f"padding must be less than {min(H, W)} pixels to be reflected, got {padding}"
        )
    run: Callable[..., tuple[Tensor, ...]] = reference.load_batch
    if choose(implementation, images.device, "load_batch") == "triton":
        from cifar_resnet_fast.kernels.augment import load_batch as run
    return run(
        images,
        labels,
        values,
        draws,
        step,
        batch_size=batch_size,
        padding=padding,
        padding_mode=padding_mode,
        cutout=cutout,
        mix=mix,
    )
