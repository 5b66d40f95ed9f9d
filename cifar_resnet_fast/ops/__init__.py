"""Public operations (layer 1): each takes the arguments of its twin in ``reference`` and runs
the fastest implementation that serves them, or the one that ``implementation`` names."""

from cifar_resnet_fast.ops.augment import augment, normalize
from cifar_resnet_fast.ops.choice import IMPLEMENTATIONS, choose, why_not
from cifar_resnet_fast.ops.conv_bn_relu import conv_bn_relu
from cifar_resnet_fast.ops.shortcut_a import shortcut_a

__all__ = [
    "IMPLEMENTATIONS",
    "augment",
    "choose",
    "conv_bn_relu",
    "normalize",
    "shortcut_a",
    "why_not",
]
