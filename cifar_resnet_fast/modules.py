"""The building blocks: parameters, buffers, and one call to ``ops`` in each (layer 2)."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cifar_resnet_fast import ops


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """The family's only convolution: 3x3, zero padding 1, no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def unit_of(conv: nn.Conv2d, bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> ops.Unit:
    """The parameters, buffers and settings that ``conv`` and ``bn`` hold.

    If ``bn.momentum`` is None, the running statistics are the mean over all batches, counted in
    ``bn.num_batches_tracked``, which is then read back to the host.
    """
    momentum = bn.momentum
    if momentum is None:
        momentum = 1 / max(int(held(bn, "num_batches_tracked")), 1)
    return ops.Unit(
        held(conv, "weight"),
        held(bn, "weight"),
        held(bn, "bias"),
        held(bn, "running_mean"),
        held(bn, "running_var"),
        momentum,
        bn.eps,
    )


def held(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` of a parameter or a buffer, by a direct look-up: that of modules
    takes three times as long."""
    tensor: Tensor | None = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    return getattr(module, name) if tensor is None else tensor


# --- which modules are called as modules -------------------------------------------------------


def why_all_called(x: Tensor) -> str | None:
    """Why every module has to be called itself, without fusion; None if there is no reason."""
    if isinstance(x, torch.fx.Proxy):
        return "torch.fx traces the model"
    if torch.compiler.is_exporting():
        return "torch.export traces the model"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "torch.jit traces the model"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the model"
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    return None


def why_called(module: nn.Module, *kinds: type) -> str | None:
    """Why ``module`` has to be called; None if it behaves as its type, one of ``kinds``, does."""
    if type(module) not in kinds:
        return f"is a {type(module).__name__}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return None


def why_conv_called(conv: nn.Module) -> str | None:
    """Why ``conv`` has to be called; None if it is a convolution that ``ops`` may compute."""
    reason = why_called(conv, nn.Conv2d)
    if reason is not None:
        return reason
    if "_conv_forward" in conv.__dict__:
        return "has a forward of its own"
    if conv._parameters.get("bias", _ELSEWHERE) is not None and conv.bias is not None:
        return "has a bias"
    shape = held(conv, "weight").shape
    if shape[2:] != (3, 3):
        return f"has a kernel of {tuple(shape[2:])}"
    if conv.stride not in _STRIDES:
        return f"has stride {conv.stride}"
    if conv.padding != (1, 1) or conv.padding_mode != "zeros":
        return f"has padding {conv.padding}, {conv.padding_mode}"
    if conv.dilation != (1, 1) or conv.groups != 1:
        return f"has dilation {conv.dilation}, groups {conv.groups}"
    return None


_STRIDES = ((1, 1), (2, 2))
_ELSEWHERE = object()


def why_bn_called(bn: nn.Module) -> str | None:
    """Why ``bn`` has to be called; None if it is a normalisation that ``ops`` may compute."""
    reason = why_called(bn, nn.BatchNorm2d, nn.SyncBatchNorm)
    if reason is not None:
        return reason
    if held(bn, "weight") is None or held(bn, "bias") is None:
        return "has no weight or no bias"
    if (
        not bn.track_running_stats
        or held(bn, "running_mean") is None
        or held(bn, "num_batches_tracked") is None
    ):
        return "has no running statistics"
    return None


def apply_unit(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | nn.SyncBatchNorm,
    *,
    shortcut: Tensor | None = None,
    relu: bool = True,
    implementation: str,
) -> Tensor:
    """``relu(bn(conv(x)) + shortcut)``, by ``ops.conv_bn_relu`` if that computes exactly this.

    If one of the two modules is of another type, has hooks, or has settings that the operation
    does not support, both modules are called themselves.

    A torch.nn.SyncBatchNorm, as made by its ``convert_sync_batchnorm``, trains with the statistics
    of all processes, in plain PyTorch for every ``implementation``.
    """
    if why_all_called(x) or why_conv_called(conv) or why_bn_called(bn):
        with _weights_cast(x, conv):
            y = bn(conv(x))
        y = y if shortcut is None else y + shortcut
        return F.relu(y) if relu else y
    if bn.training:
        held(bn, "num_batches_tracked").add_(1)
    *tensors, momentum, eps = unit_of(conv, bn)
    settings: dict[str, Any] = {
        "stride": conv.stride[0],
        "shortcut": shortcut,
        "relu": relu,
        "momentum": momentum,
        "eps": eps,
    }
    if bn.training and type(bn) is nn.SyncBatchNorm:
        return ops.conv_sync_bn_relu(x, *tensors, **settings)
    return ops.conv_bn_relu(
        x, *tensors, **settings, training=bn.training, implementation=implementation
    )


def _weights_cast(x: Tensor, module: nn.Module) -> contextlib.AbstractContextManager:
    """Context for calls of modules: float32 weights are cast to x's 16 bits, as in ``ops``."""
    if isinstance(x, torch.fx.Proxy) or x.element_size() != 2:
        return contextlib.nullcontext()
    kind = x.device.type
    first = next(module.parameters(), None)
    if first is None or first.dtype != torch.float32 or torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, x.dtype)


class ConvBNReLU(nn.Module):
    """3x3 convolution, batch normalisation, optional shortcut and ReLU, for use in any network.

    Args:
        in_channels, out_channels: C and K
        stride: 1 or 2
        relu: False leaves the ReLU out
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    ``forward(x, shortcut=None)``: x [N, C, H, W], shortcut and result
    [N, K, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        relu: bool = True,
        implementation: str = "auto",
    ):
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels, stride)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu
        self.implementation = implementation

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return apply_unit(
            x,
            self.conv,
            self.bn,
            shortcut=shortcut,
            relu=self.relu,
            implementation=self.implementation,
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 2).

    The modules have the customary names. ``ops`` computes their results, unless one of them has to
    be called itself (see ``apply_unit``).

    Args:
        in_channels, out_channels: C and K
        stride: 1 or 2, of the first convolution and of the shortcut
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``
        shortcut: the shortcut of a block that changes the shape of its input. ``A`` has no
            parameters: every ``stride``-th pixel, new channels zero. ``B`` is a 1x1 convolution
            and a normalisation, ``self.shortcut``
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        implementation: str,
        shortcut: str = "A",
    ):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        changes = stride != 1 or in_channels != out_channels
        if changes and shortcut == "B":
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        shortcut = self._shortcut(x)
        a = apply_unit(x, self.conv1, self.bn1, implementation=self.implementation)
        return apply_unit(
            a, self.conv2, self.bn2, shortcut=shortcut, implementation=self.implementation
        )

    def _shortcut(self, x: Tensor) -> Tensor:
        if "shortcut" in self._modules:
            with _weights_cast(x, self.shortcut):
                return self.shortcut(x)
        if self.stride == 1 and self.in_channels == self.out_channels:
            return x
        if why_all_called(x):
            # reference.shortcut_a with numbers that do not depend on x
            new = (self.out_channels - self.in_channels) // 2
            return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, new, new))
        return ops.shortcut_a(
            x, self.out_channels, self.stride, implementation=self.implementation
        )
