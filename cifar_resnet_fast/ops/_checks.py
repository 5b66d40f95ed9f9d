"""Argument checks of the public operations, before anything is launched (layer 1).

Errors name the argument, the rule and the value. TypeError for what is not of the right kind
(tensor, dtype), ValueError for the rest. csrc/bindings/checks.h has the same rules in the same
words.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shown(value: Any) -> str:
    """A value as an error shows it: in one line, of what is not a plain value the type alone."""
    plain = isinstance(value, (bool, int, float, str, torch.dtype, type(None)))
    return repr(value) if plain else f"a {type(value).__name__}"


def is_dense(value: Any) -> bool:
    """Whether ``value`` is a tensor whose elements lie in memory at its strides."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided


def check_dense(name: str, value: Tensor) -> None:
    """``value`` is a tensor, neither nested nor sparse.

    Raises:
        TypeError: not a tensor
        ValueError: a nested or a sparse one
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not is_dense(value):
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"{name} must be a dense tensor, got {kind}")


def check_tensor(name: str, value: Tensor, axes: str, like: Tensor | None = None) -> None:
    """``value`` is a floating tensor with one axis a name in ``axes``, on the device of ``like``.

    Raises:
        TypeError: not a tensor, or not of a floating dtype
        ValueError: nested, sparse, another number of axes, an empty axis, or another device
    """
    check_dense(name, value)
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
    if type(stride) is not int or stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {shown(stride)}")


def check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """``value`` is of ``dtype``; TypeError where not."""
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")


def check_out_channels(name: str, in_channels: int, out_channels: int) -> None:
    """Half of the option-A shortcut's new channels go in front; ValueError where they cannot."""
    check_count(name, out_channels)
    if out_channels > 2**20:  # 4 bytes each are then 4 MB a pixel
        raise ValueError(f"{name} must be at most {2**20}, got {out_channels}")
    if out_channels < in_channels or (out_channels - in_channels) % 2:
        raise ValueError(
            f"{name} must be x's {in_channels} channels or an even number more, got {out_channels}"
        )


def is_channels_last(value: Tensor) -> bool:
    """Whether ``value`` [N, C, H, W] is a row-major [N, H, W, C] array in memory."""
    return value.is_contiguous(memory_format=torch.channels_last)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What ``torch.autocast`` casts to on ``device``; None if it is off."""
    kind = device.type
    # the meta device knows no autocast; torch.compile, before torch 2.13, no is_autocast_available
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What x is taken in: its own dtype, or that of autocast, which leaves float64 alone."""
    autocast = autocast_dtype(x.device)
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def check_weight_dtype(name: str, weight: Tensor, x: Tensor) -> None:
    """Outside of autocast a weight has the dtype of ``x``, or is the float32 master of what is
    taken in x's 16 bits; TypeError where not."""
    if weight.dtype == x.dtype or autocast_dtype(x.device) is not None:
        return
    if x.element_size() != 2 or weight.dtype != torch.float32:
        raise TypeError(
            f"{name} must be of x's dtype {x.dtype} outside torch.autocast, or torch.float32 if "
            f"that has 16 bits, got {weight.dtype}"
        )


def check_count(name: str, value: int) -> None:
    """``value`` is a whole number; TypeError where not."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")


def check_bool(name: str, value: bool) -> None:
    """``value`` is True or False; TypeError where not."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_number(name: str, value: float) -> None:
    """``value`` is a number; TypeError where not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")


def check_finite_float32(name: str, value: float) -> None:
    """``value`` is from 0 to the largest float32; ValueError otherwise."""
    most = torch.finfo(torch.float32).max
    if not 0 <= value <= most:
        raise ValueError(f"{name} must be from 0 to {most}, got {value}")


def once_differentiable(backward: Callable) -> Callable:
    """The ``backward`` of an operation that has no second derivatives; says so if they are wanted.

    PyTorch's own decorator lets a gradient that depends on saved tensors alone pass as a constant.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        # the gradients have a graph of their own only under create_graph=True
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the fused kernels have no second derivatives, which create_graph=True asks for; "
                "implementation 'reference' has them"
            )
        return backward(ctx, *gradients)

    return checked
