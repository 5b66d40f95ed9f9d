"""One step of SGD over flat buffers (layer 1). Twin: ``reference.sgd``."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._checks import (
    check_bool,
    check_count,
    check_dense,
    check_finite_float32,
    check_number,
)
from cifar_resnet_fast.ops._dispatch import choose


def sgd(
    parameters: Tensor,
    gradients: Tensor,
    momenta: Tensor,
    lr: Tensor,
    loss_scale: Tensor,
    skipped: Tensor,
    *,
    decayed: int,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scaled: int = 0,
    lr_factor: float = 1.0,
    implementation: str = "auto",
) -> None:
    """A step in place, or none where a gradient is infinite or NaN; see ``reference.sgd``.

    Nothing is read back to the host, so a CUDA graph can capture it.

    Args:
        parameters, gradients, momenta: [P] float32, contiguous, with P < 2**31
        lr, loss_scale: [] float32
        skipped: [] int32. counts the steps that were left out
        decayed: 0 .. P. so many elements, from the first on, have weight decay
        momentum, weight_decay, nesterov: as torch.optim.SGD has them; both numbers, and
            weight_decay / lr_factor, from 0 to the largest float32
        scaled: 0 .. P. so many elements, up to the last one, have lr_factor times the learning
            rate and a weight decay divided by lr_factor
        lr_factor: more than 0, finite
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Raises:
        TypeError: an argument is of another type, or a tensor of another dtype
        ValueError: a tensor is nested or sparse; a shape, a device or a number breaks its rule
        RuntimeError: the named implementation cannot run here
    """
    check_dense("parameters", parameters)
    check_count("decayed", decayed)
    check_number("momentum", momentum)
    check_number("weight_decay", weight_decay)
    check_bool("nesterov", nesterov)
    check_count("scaled", scaled)
    check_number("lr_factor", lr_factor)
    P = parameters.numel()
    if not 0 < P < 2**31:
        raise ValueError(f"parameters must have 1 .. 2**31 - 1 elements, got {P}")
    flat, scalar = (P,), ()
    rules: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("parameters", parameters, flat, torch.float32),
        ("gradients", gradients, flat, torch.float32),
        ("momenta", momenta, flat, torch.float32),
        ("lr", lr, scalar, torch.float32),
        ("loss_scale", loss_scale, scalar, torch.float32),
        ("skipped", skipped, scalar, torch.int32),
    ]
    for name, tensor, shape, dtype in rules:
        check_dense(name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous with shape {shape}, got shape {tuple(tensor.shape)} "
                f"and strides {tensor.stride()}"
            )
        if tensor.device != parameters.device:
            raise ValueError(
                f"{name} must be on the device of parameters, {parameters.device}, "
                f"got {tensor.device}"
            )
    for name, count in (("decayed", decayed), ("scaled", scaled)):
        if not 0 <= count <= P:
            raise ValueError(f"{name} must be in 0 .. {P}, the number of parameters, got {count}")
    if not 0 < lr_factor < math.inf:
        raise ValueError(f"lr_factor must be more than 0 and finite, got {lr_factor}")
    check_finite_float32("momentum", momentum)
    check_finite_float32("weight_decay", weight_decay)
    check_finite_float32("weight_decay / lr_factor", weight_decay / lr_factor)
    run: Callable[..., None] = reference.sgd
    if choose(implementation, parameters.device, "sgd") == "triton":
        from cifar_resnet_fast.kernels import sgd as kernel

        run = kernel.sgd
    run(
        parameters,
        gradients,
        momenta,
        lr,
        loss_scale,
        skipped,
        decayed=decayed,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        scaled=scaled,
        lr_factor=lr_factor,
    )
