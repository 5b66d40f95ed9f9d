"""Public operations (layer 1): each takes the arguments of its twin in ``reference`` and runs
the fastest implementation that serves them, or the one that ``implementation`` names."""

from cifar_resnet_fast.ops._conv_bn_relu.operation import conv_bn_relu
from cifar_resnet_fast.ops._conv_bn_relu.synchronised import conv_sync_bn_relu
from cifar_resnet_fast.ops._dispatch import IMPLEMENTATIONS, OPERATIONS, choose, distrust, why_not
from cifar_resnet_fast.ops._extension import BUILD_INFO, WHY_NOT_LOADED
from cifar_resnet_fast.ops._linear_cross_entropy import linear_cross_entropy
from cifar_resnet_fast.ops._load_batch import load_batch, normalized_bytes
from cifar_resnet_fast.ops._record_step import record_step
from cifar_resnet_fast.ops._sgd import sgd
from cifar_resnet_fast.ops._shortcut_a.operation import shortcut_a
from cifar_resnet_fast.ops._trunk.operation import gradients_into, trunk
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
    "distrust",
    "gradients_into",
    "linear_cross_entropy",
    "load_batch",
    "normalized_bytes",
    "record_step",
    "sgd",
    "shortcut_a",
    "trunk",
    "why_not",
]
