"""The option-A shortcut: strided subsampling and zero channels (layer 1).

Twin: ``reference.shortcut_a``.
"""

from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops.checks import check_stride, check_tensor
from cifar_resnet_fast.ops.choice import choose


def shortcut_a(
    x: Tensor, out_channels: int, stride: int = 2, *, implementation: str = "auto"
) -> Tensor:
    """Every ``stride``-th pixel of x, new channels zero, half of them in front.

    Args:
        x: [N, C, H, W]
        out_channels: K >= C, with K - C even
        stride: 1 or 2
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], in the memory format of ``x``

    Raises:
        TypeError: x is not a floating tensor
        ValueError: a shape, the stride or out_channels breaks its rule
        RuntimeError: the named implementation cannot run here
    """
    check_stride(stride)
    check_tensor("x", x, "N C H W")
    C = x.shape[1]
    if out_channels < C or (out_channels - C) % 2:
        raise ValueError(
            f"out_channels must be x's {C} channels or an even number more, got {out_channels}"
        )
    choose(implementation, x.device)
    return reference.shortcut_a(x, out_channels, stride)
