"""Tensors saved for a backward pass come back in the layout that they had (layer 1).

Hooks on saved tensors, such as ``torch.autograd.graph.save_on_cpu``, which offloads activations,
keep values and shapes, but not strides. The kernels take no strides, so for them the values would
be others.
"""

from typing import Any

import torch
from torch import Tensor


def save(ctx, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, and the strides."""
    ctx.save_for_backward(*tensors)
    ctx.saved_strides = [None if tensor is None else tensor.stride() for tensor in tensors]


def saved(ctx) -> list[Any]:
    """The tensors, or None, that ``save`` was given, laid out as they were; copied if a hook
    changed the layout."""
    return [
        tensor if tensor is None or tensor.stride() == strides else _with_strides(tensor, strides)
        for tensor, strides in zip(ctx.saved_tensors, ctx.saved_strides, strict=True)
    ]


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    laid_out = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return laid_out.copy_(tensor)
