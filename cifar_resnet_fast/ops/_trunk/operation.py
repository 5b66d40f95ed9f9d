"""The network's body as one operation: checks and choice of kernels (layer 1).

Twin: ``reference.trunk``. Order of the kernels: schedule.py; autograd: autograd.py.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._checks import (
    check_bool,
    check_number,
    check_shape,
    check_tensor,
    check_weight_dtype,
    compute_dtype,
    is_channels_last,
    is_dense,
)
from cifar_resnet_fast.ops._dispatch import choose
from cifar_resnet_fast.ops._trunk import cuda as trunk_cuda
from cifar_resnet_fast.ops._trunk import schedule
from cifar_resnet_fast.reference import Unit

_given = threading.local()  # id of a weight to the memory for its gradient, inside gradients_into


@contextlib.contextmanager
def gradients_into(places: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Where the backward pass of a trunk that runs inside is to put gradients of weights.

    They are then what autograd gives for these weights, so nothing need be copied. Kernels alone
    do that: the reference, and a trunk inside torch.compile, give new tensors. A place is used
    once, by the first trunk that has the weight, so sums of gradients stay right.

    Args:
        places: pairs of a weight of a unit and memory of its shape, strides, dtype and device
    """
    before = getattr(_given, "places", {})
    _given.places = {id(weight): place for weight, place in places}
    try:
        yield
    finally:
        _given.places = before


def trunk(
    pictures: Tensor, units: Sequence[Unit], *, training: bool, implementation: str = "auto"
) -> Tensor:
    """The whole network before its last layer; see ``reference.trunk``.

    In training differentiable, once, in weight, bn_weight and bn_bias of every unit, not in
    pictures, and updates the running statistics in place; otherwise not differentiable at all but
    by the reference. Under ``torch.autocast``, or where pictures has 16 bits and the weights are
    float32, the activations have 16 bits, normalisation and statistics are float32.

    ``cuda`` takes float16 and bfloat16 activations, float32 parameters and statistics, weights
    contiguous or channels-last, 1 .. 65535 pictures of 32x32, and 16, 32 and 64 channels;
    ``triton`` also float32, any picture size and channels in multiples of 16, with fewer than
    2**31 elements in an activation. ``auto`` takes the first of cuda, triton and reference that
    serves.

    Args:
        pictures: [N, 3, H, W], any strides
        units: 2n + 1 of them, in the order of the reference
        training: True normalises with the batch's statistics, False with the running ones
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Returns:
        [N, K], the average over the pixels; float32, or float64 where pictures is

    Raises:
        TypeError, ValueError: an argument breaks its rule, or one of the named implementation's
        RuntimeError: the named implementation cannot run here
    """
    _check(pictures, units, training)
    dtype = compute_dtype(pictures)
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for u in units for t in u[:3])
    chosen = choose(
        implementation,
        pictures.device,
        "trunk",
        lambda name: _broken_rule(name, pictures, units, dtype, training, wants_grad),
    )
    if chosen == "reference":
        return reference.trunk(pictures.to(dtype), units, training=training)
    # imported only if it is used: torch.library's custom operations import triton
    from cifar_resnet_fast.ops._trunk import autograd as trunk_autograd

    places = None
    if training and wants_grad and not torch.compiler.is_compiling():
        given = getattr(_given, "places", {})
        places = [given.pop(id(unit.weight), None) for unit in units]
    return trunk_autograd.trunk(chosen, pictures, units, dtype, training, wants_grad, places)


def _check(pictures: Tensor, units: Sequence[Unit], training: bool) -> None:
    """The rules of every implementation."""
    check_tensor("pictures", pictures, "N C H W")
    check_bool("training", training)
    if not isinstance(units, (list, tuple)):
        raise TypeError(f"units must be a list of Unit, got {type(units).__name__}")
    if len(units) < 3 or len(units) % 2 == 0:
        raise ValueError(f"units must be 2n + 1 with n of at least 1, got {len(units)}")
    C = pictures.shape[1]
    weight_dtypes = {pictures.dtype, torch.float32 if pictures.element_size() == 2 else None}
    for i, unit in enumerate(units):
        if not isinstance(unit, Unit):
            raise TypeError(f"units must be a list of Unit, got a {type(unit).__name__} as {i}")
        dense = all(map(is_dense, unit[:5]))
        K = unit.weight.shape[0] if dense and unit.weight.dim() else 0
        # a glance, as this runs before every step; what is wrong is found out at leisure
        sound = (
            dense
            and unit.weight.shape == (K, C, 3, 3)
            and unit.weight.dtype in weight_dtypes
            and all(t.device == pictures.device for t in unit[:5])
            and all(v.shape == (K,) and v.dtype.is_floating_point for v in unit[1:5])
            and type(unit.momentum) is type(unit.eps) is float
            and (K == C or (i % 2 and K == 2 * C) or i == 0)
        )
        if not sound:
            _check_unit(i, unit, pictures, C)
        C = K
    N, _, H, W = schedule.shapes_of_y(pictures, [unit.weight for unit in units])[-1]
    if training and N * H * W == 1:
        raise ValueError(
            f"pictures must give more than 1 value per channel when training, "
            f"got shape {tuple(pictures.shape)}"
        )


def _check_unit(i: int, unit: Unit, pictures: Tensor, C: int) -> None:
    """Unit i, whose input has C channels."""
    check_tensor(f"weight {i}", unit.weight, "K C 3 3", like=pictures)
    K = unit.weight.shape[0]
    allowed = (K,) if i == 0 else (C, 2 * C) if i % 2 else (C,)
    if K not in allowed:
        raise ValueError(
            f"weight {i} must have {' or '.join(map(str, allowed))} output channels, got {K}"
        )
    check_shape(f"weight {i}", unit.weight, (K, C, 3, 3))
    check_weight_dtype(f"weight {i}", unit.weight, pictures)
    for name, vector in zip(Unit._fields[1:5], unit[1:5], strict=True):
        check_tensor(f"{name} {i}", vector, "K", like=pictures)
        check_shape(f"{name} {i}", vector, (K,))
    check_number(f"momentum {i}", unit.momentum)
    check_number(f"eps {i}", unit.eps)


def _broken_rule(
    implementation: str,
    pictures: Tensor,
    units: Sequence[Unit],
    dtype: torch.dtype,
    training: bool,
    wants_grad: bool,
) -> Exception | None:
    """The first rule of an implementation that the arguments break."""
    if implementation == "reference":
        return None
    named = f"for implementation {implementation!r}"
    if torch.is_grad_enabled() and pictures.requires_grad:
        return ValueError(f"pictures must not require a gradient {named}")
    if wants_grad and not training:
        return ValueError(f"no unit may require a gradient in evaluation {named}")
    N, C, H, W = pictures.shape
    channels = [len(unit.weight) for unit in units]
    dtypes = (torch.float16, torch.bfloat16) + ((torch.float32,) * (implementation == "triton"))
    if dtype not in dtypes:
        return TypeError(f"pictures must be {' or '.join(map(str, dtypes))} {named}, got {dtype}")
    if C != 3:
        return ValueError(f"pictures must have 3 channels {named}, got {C}")
    if implementation == "triton":
        if any(K % 16 for K in channels):
            return ValueError(f"units must have multiples of 16 channels {named}, got {channels}")
        shapes = schedule.shapes_of_y(pictures, [unit.weight for unit in units])
        elements = max(map(math.prod, shapes))
        if elements >= 2**31:
            return ValueError(
                f"activations must have fewer than 2**31 elements {named}, got up to {elements}"
            )
        names: tuple[str, ...] = Unit._fields[1:5]
    else:
        if (H, W) != (32, 32):
            return ValueError(f"pictures must be 32 x 32 {named}, got {H} x {W}")
        if N > trunk_cuda.MOST_PICTURES:
            return ValueError(
                f"pictures must be at most {trunk_cuda.MOST_PICTURES} {named}, got {N}"
            )
        if tuple(dict.fromkeys(channels)) != trunk_cuda.CHANNELS:
            return ValueError(
                f"units must have {trunk_cuda.CHANNELS} channels {named}, got {channels}"
            )
        names = Unit._fields[:5]
    for i, unit in enumerate(units):
        for name in names:
            tensor = getattr(unit, name)
            if implementation == "cuda" and tensor.dtype != torch.float32:
                return TypeError(f"{name} {i} must be torch.float32 {named}, got {tensor.dtype}")
            if not tensor.is_contiguous() and not (name == "weight" and is_channels_last(tensor)):
                return ValueError(
                    f"{name} {i} must be contiguous {named}, got strides {tensor.stride()}"
                )
    return None
