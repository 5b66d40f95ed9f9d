"""3x3 convolution, batch normalisation, optional shortcut and ReLU as one operation (layer 1).

Twin: ``reference.conv_bn_relu``, which has the symbol table.
"""

import torch
from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._checks import (
    autocast_dtype,
    check_bool,
    check_dtype,
    check_number,
    check_shape,
    check_stride,
    check_tensor,
    check_weight_dtype,
    compute_dtype,
)
from cifar_resnet_fast.ops._dispatch import choose


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    stride: int = 1,
    shortcut: Tensor | None = None,
    relu: bool = True,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> Tensor:
    """``relu(batch_norm(conv3x3(x)) + shortcut)``; see ``reference.conv_bn_relu``.

    Differentiable in x, weight, bn_weight, bn_bias and shortcut. Updates running_mean and
    running_var in place when ``training``. Under ``torch.autocast`` x, weight and shortcut are
    taken in the autocast dtype; normalisation and statistics stay in theirs.

    ``triton`` works on channels-last memory: an x or a shortcut laid out otherwise is copied into
    that layout first, and the result has it. It takes float16, bfloat16 and float32, 3 channels or
    a multiple of 16, and fewer than 2**31 elements; ``auto`` leaves the rest to the reference.

    Args:
        x: [N, C, H, W], any strides
        weight: [K, C, 3, 3], of x's dtype, or float32 where x has 16 bits or under autocast
        bn_weight, bn_bias, running_mean, running_var: [K], all of one dtype, x's or float32
        stride: 1 or 2
        shortcut: [N, K, ceil(H / stride), ceil(W / stride)], of x's dtype unless under autocast,
            or None
        relu, training, momentum, eps: as in the reference
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], of x's dtype, or the autocast dtype

    Raises:
        TypeError: an argument is not a floating tensor, or of a dtype that does not go with x's
        ValueError: a shape, a device or the stride breaks its rule; or, in training, one value
            a channel is all there is to normalise
        RuntimeError: the named implementation cannot run here
    """
    check_bool("relu", relu)
    check_bool("training", training)
    N, C, H, W, K, HO, WO = check_unit(
        x, weight, bn_weight, bn_bias, running_mean, running_var, stride, shortcut, momentum, eps
    )
    if training and N * HO * WO == 1:
        raise ValueError(
            f"x must give more than 1 value per channel when training, got shape {tuple(x.shape)} "
            f"at stride {stride}"
        )
    dtype = compute_dtype(x)
    x = x.to(dtype)
    if shortcut is not None:
        shortcut = shortcut.to(dtype)

    vectors = (bn_weight, bn_bias, running_mean, running_var)
    elements = N * max(C * H * W, K * HO * WO)
    chosen = choose(
        implementation,
        x.device,
        "conv_bn_relu",
        lambda name: _broken_rule(name, x, C, K, elements, vectors),
    )
    if chosen == "triton":
        # triton is imported only if it is used
        from cifar_resnet_fast.ops._conv_bn_relu.triton import conv_bn_relu_triton

        return conv_bn_relu_triton(
            x, weight, *vectors, shortcut, stride, relu, training, momentum, eps
        )
    return reference.conv_bn_relu(
        x,
        weight,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        stride=stride,
        shortcut=shortcut,
        relu=relu,
        training=training,
        momentum=momentum,
        eps=eps,
    )


def check_unit(
    x, weight, bn_weight, bn_bias, running_mean, running_var, stride, shortcut, momentum, eps
) -> tuple[int, ...]:
    """The rules of every implementation; returns N, C, H, W, K, HO, WO."""
    check_stride(stride)
    check_number("momentum", momentum)
    check_number("eps", eps)
    check_tensor("x", x, "N C H W")
    check_tensor("weight", weight, "K C 3 3", like=x)
    N, C, H, W = x.shape
    K = weight.shape[0]
    HO, WO = -(-H // stride), -(-W // stride)
    check_shape("weight", weight, (K, C, 3, 3))
    for name, vector in (
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        check_tensor(name, vector, "K", like=x)
        check_shape(name, vector, (K,))
        if vector.dtype != bn_weight.dtype:
            raise TypeError(
                f"{name} must be of bn_weight's dtype {bn_weight.dtype}, got {vector.dtype}"
            )
    if shortcut is not None:
        check_tensor("shortcut", shortcut, "N K H W", like=x)
        check_shape("shortcut", shortcut, (N, K, HO, WO))
    check_weight_dtype("weight", weight, x)
    if shortcut is not None and autocast_dtype(x.device) is None:
        check_dtype("shortcut", shortcut, x.dtype)
    if bn_weight.dtype not in (torch.float32, compute_dtype(x)):
        raise TypeError(
            f"bn_weight must be torch.float32 or of the dtype x is taken in, {compute_dtype(x)}, "
            f"got {bn_weight.dtype}"
        )
    return N, C, H, W, K, HO, WO


def _broken_rule(
    implementation: str, x: Tensor, C: int, K: int, elements: int, vectors: tuple[Tensor, ...]
) -> Exception | None:
    """The first rule of an implementation that the arguments break."""
    if implementation != "triton":
        return None
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return TypeError(
            f"x must be float16, bfloat16 or float32 for implementation 'triton', got {x.dtype}"
        )
    if C != 3 and C % 16:
        return ValueError(
            f"x must have 3 channels or a multiple of 16 for implementation 'triton', got {C}"
        )
    if K % 16:
        return ValueError(
            f"weight must have a multiple of 16 output channels for implementation 'triton', "
            f"got {K}"
        )
    if elements >= 2**31:
        return ValueError(
            f"x and the result must have fewer than 2**31 elements for implementation 'triton', "
            f"got {elements}"
        )
    for name, vector in zip(
        ("bn_weight", "bn_bias", "running_mean", "running_var"), vectors, strict=True
    ):
        if not vector.is_contiguous():
            return ValueError(
                f"{name} must be contiguous for implementation 'triton', "
                f"got strides {vector.stride()}"
            )
    return None
