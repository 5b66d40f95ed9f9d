"""``shortcut_a`` in the compiled extension: its shapes and gradients for torch (layer 1).

Twin: ``reference.shortcut_a``. Kernels: csrc/shortcut_a/shortcut_a.cu, their CPU twins:
csrc/bindings/cpu.cpp. The operation is linear, so backward and forward are each other's gradients,
to any order.
"""

import torch
from torch import Tensor

from cifar_resnet_fast.ops._extension import WHY_NOT_LOADED


def empty_channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _register() -> None:
    @torch.library.register_fake("cifar_resnet_fast::shortcut_a")
    def _(x, out_channels, stride):
        N, _, H, W = x.shape
        return empty_channels_last((N, out_channels, -(-H // stride), -(-W // stride)), x)

    @torch.library.register_fake("cifar_resnet_fast::shortcut_a_backward")
    def _(dout, channels, height, width, stride):
        return empty_channels_last((dout.shape[0], channels, height, width), dout)

    def save_shape(ctx, inputs, output):
        x, _, ctx.stride = inputs
        ctx.sizes = x.shape[1:]

    def backward(ctx, dout):
        dout = dout.contiguous(memory_format=torch.channels_last)
        return (
            torch.ops.cifar_resnet_fast.shortcut_a_backward(dout, *ctx.sizes, ctx.stride),
            None,  # out_channels
            None,  # stride
        )

    def save_channels(ctx, inputs, output):
        dout, _, _, _, ctx.stride = inputs
        ctx.out_channels = dout.shape[1]

    def backward_of_backward(ctx, ddx):
        ddx = ddx.contiguous(memory_format=torch.channels_last)
        return (
            torch.ops.cifar_resnet_fast.shortcut_a(ddx, ctx.out_channels, ctx.stride),
            None,  # channels
            None,  # height
            None,  # width
            None,  # stride
        )

    torch.library.register_autograd(
        "cifar_resnet_fast::shortcut_a", backward, setup_context=save_shape
    )
    torch.library.register_autograd(
        "cifar_resnet_fast::shortcut_a_backward", backward_of_backward, setup_context=save_channels
    )


if WHY_NOT_LOADED["_C"] is None:
    _register()


def shortcut_a_cuda(x: Tensor, out_channels: int, stride: int) -> Tensor:
    """``reference.shortcut_a``: channels-last x [N, C, H, W], floating, on CUDA or CPU."""
    return torch.ops.cifar_resnet_fast.shortcut_a(x, out_channels, stride)
