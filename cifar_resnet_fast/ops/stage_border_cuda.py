"""``stage_border`` in the compiled extension: its shapes and gradients for torch (layer 1).

Twin: ``reference.stage_border``. Kernels: csrc/shortcut_a/stage_border.cu, their CPU twins:
csrc/bindings/cpu.cpp.
"""

import torch
from torch import Tensor

from cifar_resnet_fast.ops._extension import WHY_NOT_LOADED
from cifar_resnet_fast.ops._saved import save, saved
from cifar_resnet_fast.ops._shortcut_a.cuda import empty_channels_last


def _register() -> None:
    @torch.library.register_fake("cifar_resnet_fast::stage_border")
    def _(y, scale, shift, x, stride):
        return empty_channels_last(y.shape, y)

    @torch.library.register_fake("cifar_resnet_fast::stage_border_backward")
    def _(dout, out, y, scale, channels, height, width, stride):
        return (
            empty_channels_last(dout.shape, dout),  # dy
            torch.empty_like(scale),  # dscale
            torch.empty_like(scale),  # dshift
            empty_channels_last((dout.shape[0], channels, height, width), dout),  # dx
        )

    def setup(ctx, inputs, output):
        y, scale, _, x, ctx.stride = inputs
        save(ctx, output, y, scale)
        ctx.x_sizes = x.shape[1:]

    def backward(ctx, dout):
        dout = dout.contiguous(memory_format=torch.channels_last)
        dy, dscale, dshift, dx = torch.ops.cifar_resnet_fast.stage_border_backward(
            dout, *saved(ctx), *ctx.x_sizes, ctx.stride
        )
        return (
            dy,
            dscale,
            dshift,
            dx,
            None,  # stride
        )

    def backward_of_backward(ctx, *gradients):
        raise NotImplementedError("stage_border can be differentiated once, not twice")

    torch.library.register_autograd(
        "cifar_resnet_fast::stage_border", backward, setup_context=setup
    )
    torch.library.register_autograd(
        "cifar_resnet_fast::stage_border_backward", backward_of_backward
    )


if WHY_NOT_LOADED["_C"] is None:
    _register()


def stage_border_cuda(y: Tensor, scale: Tensor, shift: Tensor, x: Tensor, stride: int) -> Tensor:
    """``reference.stage_border``: channels-last y and x, on CUDA or CPU."""
    return torch.ops.cifar_resnet_fast.stage_border(y, scale, shift, x, stride)
