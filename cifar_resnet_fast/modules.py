"""The building blocks: parameters, buffers, and one call to ``ops`` each (layer 2)."""

from torch import Tensor, nn

from cifar_resnet_fast import ops


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """The family's only convolution: 3x3, zero padding 1, no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def unit_of(conv: nn.Conv2d, bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> ops.Unit:
    """The parameters, buffers and settings that ``conv`` and ``bn`` hold."""
    statistics = (bn.running_mean, bn.running_var, bn.momentum, bn.eps)
    return ops.Unit(conv.weight, bn.weight, bn.bias, *statistics)


def apply_unit(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | nn.SyncBatchNorm,
    *,
    shortcut: Tensor | None = None,
    relu: bool = True,
    implementation: str,
) -> Tensor:
    """``ops.conv_bn_relu`` with the parameters and buffers that ``conv`` and ``bn`` hold.

    Where ``bn`` is a torch.nn.SyncBatchNorm, as its ``convert_sync_batchnorm`` makes them, it
    trains with the statistics of all processes, in plain PyTorch whatever ``implementation`` is.
    """
    *tensors, momentum, eps = unit_of(conv, bn)
    settings = {"stride": conv.stride[0], "shortcut": shortcut, "relu": relu}
    settings |= {"momentum": momentum, "eps": eps}
    if bn.training:
        bn.num_batches_tracked.add_(1)
        if isinstance(bn, nn.SyncBatchNorm):
            return ops.conv_sync_bn_relu(x, *tensors, **settings)
    return ops.conv_bn_relu(
        x, *tensors, **settings, training=bn.training, implementation=implementation
    )


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
    """Two 3x3 convolutions and a parameter-free shortcut (He et al. 2015, figure 2, option A).

    The convolutions and normalisations hold the parameters under the customary names; ``ops``
    does the arithmetic, so hooks belong on the block, not on its ``conv1``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, implementation: str):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x
        if self.conv1.stride != (1, 1):
            shortcut = ops.shortcut_a(
                x,
                self.conv1.out_channels,
                self.conv1.stride[0],
                implementation=self.implementation,
            )
        a = apply_unit(x, self.conv1, self.bn1, implementation=self.implementation)
        return apply_unit(
            a, self.conv2, self.bn2, shortcut=shortcut, implementation=self.implementation
        )
