"""Public operations (layer 1): each takes the arguments of its twin in ``reference`` and runs
the fastest implementation that serves them, or the one that ``implementation`` names."""

from cifar_resnet_fast.ops.augment import load_batch, normalized_bytes
from cifar_resnet_fast.ops.choice import IMPLEMENTATIONS, OPERATIONS, choose, why_not
from cifar_resnet_fast.ops.conv_bn_relu import conv_bn_relu
from cifar_resnet_fast.ops.conv_sync_bn_relu import conv_sync_bn_relu
from cifar_resnet_fast.ops.extension import BUILD_INFO, WHY_NOT_LOADED
from cifar_resnet_fast.ops.sgd import sgd
from cifar_resnet_fast.ops.shortcut_a import shortcut_a
from cifar_resnet_fast.ops.stage_border import stage_border
from cifar_resnet_fast.ops.trunk import trunk
from cifar_resnet_fast.reference import Unit

__all__ = [
    "BUILD_INFO",
    "IMPLEMENTATIONS",
    "OPERATIONS",
    "WHY_NOT_LOADED",
    "Unit",
    "choose",
    "conv_bn_relu",
    "conv_sync_bn_relu",
    "load_batch",
    "normalized_bytes",
    "sgd",
    "shortcut_a",
    "stage_border",
    "trunk",
    "why_not",
]
