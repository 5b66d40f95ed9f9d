"""``conv_bn_relu`` in training, with the statistics of all processes (layer 1).

Twin: ``reference.conv_bn_relu`` on the batches of all processes put together. Plain PyTorch, any
device: torch.nn.SyncBatchNorm itself takes CUDA tensors only.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cifar_resnet_fast.ops._checks import check_bool
from cifar_resnet_fast.ops._conv_bn_relu.operation import check_unit
from cifar_resnet_fast.processes import all_reduce


class _Sum(torch.autograd.Function):
    """The sum over the processes; each one's gradient is the sum of all their gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, dx):
        dx = dx.clone()
        all_reduce(dx)
        return dx


def conv_sync_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    stride: int,
    shortcut: Tensor | None,
    relu: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``relu(batch_norm(conv3x3(x)) + shortcut)``; see ``reference.conv_bn_relu``.

    Every process calls it at the same place with the same shapes, in forward and in backward.
    Updates running_mean and running_var in place, to the same values everywhere.

    Args:
        all: as ``reference.conv_bn_relu``; bn_weight and bn_bias float32, or float64 as x

    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], of the convolution's dtype

    Raises:
        TypeError, ValueError: an argument breaks its rule, or there is no process group
        ProcessLostError: another process does not answer

    Source: Ioffe and Szegedy 2015, algorithm 1.
    """
    check_bool("relu", relu)
    check_unit(
        x, weight, bn_weight, bn_bias, running_mean, running_var, stride, shortcut, momentum, eps
    )
    y = F.conv2d(x, weight, stride=stride, padding=1)
    values = y.to(torch.promote_types(y.dtype, torch.float32))
    processes = dist.get_world_size()
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    var, mean = var.double(), mean.double()
    # mean and mean square over all processes, which have as many pixels each; in float64, where
    # their difference cancels nothing that float32 holds
    mean, square = _Sum.apply(torch.stack((mean, var + mean * mean))) / processes
    var = square - mean * mean
    scale = bn_weight * torch.rsqrt(var + eps).to(values.dtype)
    shift = bn_bias - mean.to(values.dtype) * scale
    pixels = processes * (values.numel() // values.shape[1])
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (pixels / (pixels - 1))).to(running_var.dtype), momentum)
    z = values * scale[:, None, None] + shift[:, None, None]
    z = z.to(y.dtype)
    if shortcut is not None:
        z = z + shortcut
    return F.relu(z) if relu else z
