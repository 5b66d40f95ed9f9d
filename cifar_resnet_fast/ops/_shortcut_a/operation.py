"""The option-A shortcut: strided subsampling and zero channels (layer 1).

Twin: ``reference.shortcut_a``.
"""

from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._checks import (
    check_out_channels,
    check_stride,
    check_tensor,
    is_channels_last,
)
from cifar_resnet_fast.ops._dispatch import choose
from cifar_resnet_fast.ops._shortcut_a.cuda import shortcut_a_cuda


def shortcut_a(
    x: Tensor, out_channels: int, stride: int = 2, *, implementation: str = "auto"
) -> Tensor:
    """Every ``stride``-th pixel of x, new channels zero, half of them in front.

    Args:
        x: [N, C, H, W]
        out_channels: K >= C, with K - C even
        stride: 1 or 2
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``; ``cuda`` takes a
            channels-last x, ``auto`` leaves others to the reference; ``triton`` makes x
            channels-last

    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], in the memory format of ``x``; channels-last
        from ``triton``

    Raises:
        TypeError: x is not a floating tensor
        ValueError: a shape, the stride, out_channels or the layout breaks its rule
        RuntimeError: the named implementation cannot run here
    """
    check_stride(stride)
    check_tensor("x", x, "N C H W")
    check_out_channels("out_channels", x.shape[1], out_channels)
    if implementation == "auto" and not is_channels_last(x):
        implementation = "reference"  # which keeps the memory format
    chosen = choose(
        implementation, x.device, "shortcut_a", lambda name: _broken_rule(name, x, out_channels)
    )
    if chosen == "cuda":
        return shortcut_a_cuda(x, out_channels, stride)
    if chosen == "triton":
        # triton is imported only if it is used
        from cifar_resnet_fast.ops._shortcut_a.triton import shortcut_a_triton

        return shortcut_a_triton(x, out_channels, stride)
    return reference.shortcut_a(x, out_channels, stride)


def _broken_rule(implementation: str, x: Tensor, out_channels: int) -> Exception | None:
    """The first rule of an implementation that the arguments break."""
    if implementation == "cuda" and not is_channels_last(x):
        return ValueError(f"x must be channels-last [N, C, H, W], got strides {x.stride()}")
    elements = x.numel() // x.shape[1] * out_channels
    if implementation == "triton" and elements >= 2**31:
        return ValueError(
            f"x with out_channels must have fewer than 2**31 elements for implementation "
            f"'triton', got {elements}"
        )
    return None
