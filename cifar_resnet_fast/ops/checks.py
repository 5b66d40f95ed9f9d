"""Argument checks of the public operations, before anything is launched (layer 1).

Errors name the argument, the rule and the value. TypeError for what is not of the right kind
(tensor, dtype), ValueError for the rest.
"""

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: Tensor, axes: str, like: Tensor | None = None) -> None:
    """``value`` is a floating tensor with one axis a name in ``axes``, on the device of ``like``.

    Raises:
        TypeError: not a tensor, or not of a floating dtype
        ValueError: another number of axes, an empty axis, or another device
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}")
    letters = axes.split()
    if value.dim() != len(letters) or value.numel() == 0:
        raise ValueError(
            f"{name} must be [{', '.join(letters)}] with no axis empty, "
            f"got shape {tuple(value.shape)}"
        )
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on the device of x, {like.device}, got {value.device}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """``value`` has exactly ``shape``; ValueError where not."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def check_stride(stride: int) -> None:
    """``stride`` is 1 or 2; ValueError where not."""
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")
