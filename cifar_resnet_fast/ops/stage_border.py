"""The end of a stage's first block: affine map, option-A shortcut and ReLU in one pass (layer 1).

Twin: ``reference.stage_border``.
"""

from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._checks import (
    check_affine,
    check_channels_last,
    check_dtype,
    check_out_channels,
    check_shape,
    check_stride,
    check_tensor,
    is_channels_last,
)
from cifar_resnet_fast.ops._dispatch import choose
from cifar_resnet_fast.ops.stage_border_cuda import stage_border_cuda


def stage_border(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    x: Tensor,
    stride: int = 2,
    *,
    implementation: str = "auto",
) -> Tensor:
    """``relu(scale * y + shift + shortcut_a(x))``, differentiable once in all four tensors.

    With ``scale = weight * invstd`` and ``shift = bias - mean * scale`` this is the block's batch
    normalisation, addition and ReLU; dscale = sum(dz * y) and dshift = sum(dz), dz the gradient
    before the ReLU, are the sums of which that normalisation's backward is made.

    Args:
        y: [N, K, ceil(H / stride), ceil(W / stride)]. the second convolution's raw output
        scale, shift: [K], contiguous, float32, or float64 where y is
        x: [N, C, H, W], of y's dtype. the block's input; K - C not negative and even
        stride: 1 or 2
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``; ``cuda`` takes channels-last y
            and x, ``auto`` leaves others to the reference

    Returns:
        of y's shape and dtype, computed in scale's dtype and rounded once; channels-last from
        ``cuda``

    Raises:
        TypeError: an argument is not a floating tensor of the right dtype
        ValueError: a shape, the stride, a device or the layout breaks its rule
        RuntimeError: the named implementation cannot run here
    """
    check_stride(stride)
    check_tensor("x", x, "N C H W")
    check_tensor("y", y, "N K H W", like=x)
    N, C, H, W = x.shape
    K = y.shape[1]
    check_out_channels("y's channels", C, K)
    check_dtype("y", y, x.dtype)
    check_shape("y", y, (N, K, -(-H // stride), -(-W // stride)))
    check_affine("scale", scale, x, K)
    check_affine("shift", shift, x, K)
    if implementation == "cuda":
        check_channels_last("x", x)
        check_channels_last("y", y)
    chosen = choose(implementation, x.device, "stage_border")
    if chosen == "cuda" and is_channels_last(x) and is_channels_last(y):
        return stage_border_cuda(y, scale, shift, x, stride)
    return reference.stage_border(y, scale, shift, x, stride)
