"""``shortcut_a`` on the Triton kernels, with its gradient (layer 1).

Twin: ``reference.shortcut_a``. Arguments have been checked.
"""

import torch
from torch import Tensor

from cifar_resnet_fast.kernels.shortcut_a import shortcut_a_bwd, shortcut_a_fwd
from cifar_resnet_fast.ops._checks import once_differentiable

# torch.compile sees these as opaque operations; called plainly they would cost more host time
_forward_op = torch.library.custom_op(
    "cifar_resnet_fast::shortcut_a_triton_fwd", shortcut_a_fwd, mutates_args=()
)
_backward_op = torch.library.custom_op(
    "cifar_resnet_fast::shortcut_a_triton_bwd", shortcut_a_bwd, mutates_args=()
)


@_forward_op.register_fake
def _(x, out_channels, stride):
    N, _, H, W = x.shape
    shape = (N, out_channels, (H + stride - 1) // stride, (W + stride - 1) // stride)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_backward_op.register_fake
def _(dout, C, H, W, stride):
    shape = (dout.shape[0], C, H, W)
    return torch.empty(
        shape, dtype=dout.dtype, device=dout.device, memory_format=torch.channels_last
    )


class _ShortcutA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out_channels, stride):
        ctx.sizes = (*x.shape[1:], stride)
        run = _forward_op if torch.compiler.is_compiling() else shortcut_a_fwd
        return run(x, out_channels, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        run = _backward_op if torch.compiler.is_compiling() else shortcut_a_bwd
        dout = dout.contiguous(memory_format=torch.channels_last)
        return (
            run(dout, *ctx.sizes),
            None,  # out_channels
            None,  # stride
        )


def shortcut_a_triton(x: Tensor, out_channels: int, stride: int) -> Tensor:
    """``reference.shortcut_a`` in Triton; see ``ops.shortcut_a``.

    Args:
        x: [N, C, H, W], any strides; made channels-last if it is not
        out_channels: K
        stride: 1 or 2

    Returns:
        [N, K, HO, WO], channels-last
    """
    x = x.contiguous(memory_format=torch.channels_last)
    return _ShortcutA.apply(x, out_channels, stride)
