"""``conv_bn_relu`` on the Triton kernels: order of launches and autograd (layer 1).

Twin: ``reference.conv_bn_relu``. Arguments have been checked; activations are channels-last.

Training, forward: y = conv(x) with its statistics, their merge, then a = relu(scale * y + shift
[+ shortcut]). Backward: the sums of dz and dz * yhat, their merge, and the convolution's two
gradients with BN's backward applied on load. Evaluation without gradients is one launch.

Saved for the backward: x and the weight in x's dtype (the gradients' factors), y (for yhat),
affine (16 bytes a channel) and, with a shortcut, a (the ReLU's mask; the next layer keeps it
anyway). Without a shortcut the mask is made from y.
"""

import torch
from torch import Tensor

from cifar_resnet_fast.kernels import bn
from cifar_resnet_fast.kernels.conv3x3_bwd import conv3x3_bwd
from cifar_resnet_fast.kernels.conv3x3_fwd import conv3x3_fwd
from cifar_resnet_fast.ops._checks import once_differentiable
from cifar_resnet_fast.ops._saved import save, saved


def conv_bn_relu_fwd(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut: Tensor | None,
    stride: int,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The finished activation a, and y and affine, which the backward needs."""
    y, partials, _ = conv3x3_fwd(x, weight, stride=stride, sums=training)
    affine = bn.bn_merge_fwd(
        partials, bn_weight, bn_bias, running_mean, running_var, momentum, eps
    )
    return bn.bn_apply_fwd(y, affine, shortcut, relu), y, affine


def conv_bn_relu_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut: Tensor | None,
    stride: int,
    relu: bool,
    eps: float,
) -> Tensor:
    """The finished activation in evaluation, where no gradient is wanted."""
    running = (bn_weight, bn_bias, running_mean, running_var, eps)
    a, _, _ = conv3x3_fwd(x, weight, stride=stride, running=running, shortcut=shortcut, relu=relu)
    return a


def conv_bn_relu_bwd(
    da: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    affine: Tensor,
    a: Tensor | None,
    stride: int,
    relu: bool,
    training: bool,
    dx: bool,
    dweight: bool,
    dshortcut: bool,
    weight_dtype: torch.dtype,
    weight_channels_last: bool,
    bn_dtype: torch.dtype,
) -> list[Tensor]:
    """dbn_weight and dbn_bias, then those of dx, dweight and dshortcut that are wanted."""
    dz, partials = bn.bn_reduce_bwd(da, y, affine, a, relu, write_dz=dshortcut or a is not None)
    coef, dbn_weight, dbn_bias = bn.bn_merge_bwd(
        partials, affine, y.numel() // y.shape[1], training, bn_dtype
    )
    gradients = [dbn_weight, dbn_bias]
    into = None
    if dweight:
        form = torch.channels_last if weight_channels_last else torch.contiguous_format
        into = torch.empty_like(weight, dtype=weight_dtype, memory_format=form)
    if dx or dweight:
        masked = relu and dz is da
        grad, _ = conv3x3_bwd(
            dz, y, coef, x, weight, stride=stride, relu=masked, dx=dx, dweight=into
        )
        gradients += [gradient for gradient in (grad, into) if gradient is not None]
    return gradients + ([dz] if dshortcut else [])


# torch.compile sees these as opaque operations; called plainly they would cost more host time
_forward_op = torch.library.custom_op(
    "cifar_resnet_fast::conv_bn_relu_fwd",
    conv_bn_relu_fwd,
    mutates_args=("running_mean", "running_var"),
)
_eval_op = torch.library.custom_op(
    "cifar_resnet_fast::conv_bn_relu_eval", conv_bn_relu_eval, mutates_args=()
)
_backward_op = torch.library.custom_op(
    "cifar_resnet_fast::conv_bn_relu_bwd", conv_bn_relu_bwd, mutates_args=()
)


def _empty_output(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    N, _, H, W = x.shape
    shape = (N, weight.shape[0], (H + stride - 1) // stride, (W + stride - 1) // stride)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_forward_op.register_fake
def _(x, weight, bn_weight, bn_bias, running_mean, running_var, shortcut, stride, *_):
    a = _empty_output(x, weight, stride)
    affine = x.new_empty((4, weight.shape[0]), dtype=torch.float32)
    return a, torch.empty_like(a), affine


@_eval_op.register_fake
def _(x, weight, bn_weight, bn_bias, running_mean, running_var, shortcut, stride, *_):
    return _empty_output(x, weight, stride)


@_backward_op.register_fake
def _(
    da,
    x,
    weight,
    y,
    affine,
    a,
    stride,
    relu,
    training,
    dx,
    dweight,
    dshortcut,
    weight_dtype,
    weight_channels_last,
    bn_dtype,
):
    K = weight.shape[0]
    gradients = [x.new_empty(K, dtype=bn_dtype), x.new_empty(K, dtype=bn_dtype)]
    gradients += [torch.empty_like(x)] if dx else []
    form = torch.channels_last if weight_channels_last else torch.contiguous_format
    if dweight:
        gradients.append(torch.empty_like(weight, dtype=weight_dtype, memory_format=form))
    return gradients + ([torch.empty_like(da)] if dshortcut else [])


class _ConvBNReLU(torch.autograd.Function):
    """Differentiable in x, weight, bn_weight, bn_bias and shortcut, once."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        shortcut,
        stride,
        relu,
        training,
        momentum,
        eps,
    ):
        packed = _packed(weight, x.dtype)
        run = _forward_op if torch.compiler.is_compiling() else conv_bn_relu_fwd
        a, y, affine = run(
            x,
            packed,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            shortcut,
            stride,
            relu,
            training,
            momentum,
            eps,
        )
        mask = a if relu and shortcut is not None else None
        save(ctx, x, packed, y, affine, mask)
        ctx.settings = (stride, relu, training)
        ctx.weight_layout = (weight.dtype, not weight.is_contiguous())
        ctx.bn_dtype = bn_weight.dtype
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx, da):
        x, packed, y, affine, mask = saved(ctx)
        stride, relu, training = ctx.settings
        weight_dtype, channels_last = ctx.weight_layout
        dx, dweight, dbn_weight, dbn_bias, _, _, dshortcut, *_ = ctx.needs_input_grad
        da = da.contiguous(memory_format=torch.channels_last)
        run = _backward_op if torch.compiler.is_compiling() else conv_bn_relu_bwd
        gradients = run(
            da,
            x,
            packed,
            y,
            affine,
            mask,
            stride,
            relu,
            training,
            dx,
            dweight,
            dshortcut and relu,
            weight_dtype,
            channels_last,
            ctx.bn_dtype,
        )
        grad_bn_weight, grad_bn_bias = gradients[:2]
        gradients = list(gradients[2:])  # the starred form is a tuple to torch 2.11's compiler
        return (
            gradients.pop(0) if dx else None,
            gradients.pop(0) if dweight else None,
            grad_bn_weight if dbn_weight else None,
            grad_bn_bias if dbn_bias else None,
            None,  # running_mean
            None,  # running_var
            (gradients.pop(0) if relu else da) if dshortcut else None,
            None,  # stride
            None,  # relu
            None,  # training
            None,  # momentum
            None,  # eps
        )


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the kernels read it, [K, 9, C] row-major; unchanged if it is so already."""
    return weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def conv_bn_relu_triton(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut: Tensor | None,
    stride: int,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``reference.conv_bn_relu`` on the Triton kernels; see ``ops.conv_bn_relu``.

    Args:
        x: [N, C, H, W], any strides; made channels-last if it is not
        weight: [K, C, 3, 3] of any floating dtype, cast to that of x for the products; its
            gradient is not rounded to x's
        shortcut: as the result, of x's dtype, any strides; or None
        all others: as ``ops.conv_bn_relu``

    Returns:
        [N, K, HO, WO], channels-last, of x's dtype
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    differentiable = (x, weight, bn_weight, bn_bias, shortcut)
    bn_vectors = (bn_weight, bn_bias, running_mean, running_var)
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in differentiable
    )
    if wants_grad:
        return _ConvBNReLU.apply(
            x, weight, *bn_vectors, shortcut, stride, relu, training, momentum, eps
        )
    compiling = torch.compiler.is_compiling()
    packed = _packed(weight, x.dtype)
    if training:
        train = _forward_op if compiling else conv_bn_relu_fwd
        return train(x, packed, *bn_vectors, shortcut, stride, relu, training, momentum, eps)[0]
    evaluate = _eval_op if compiling else conv_bn_relu_eval
    return evaluate(x, packed, *bn_vectors, shortcut, stride, relu, eps)
