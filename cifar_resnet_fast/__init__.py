"""CIFAR ResNets of He et al. 2015, trained and run fast.

``FastResNet(depth)`` is the network, ``FastResNet.from_pretrained(name)`` a trained one and
``models()`` the names; ``load_checkpoint(model, path)`` loads published weights; ``train(config)``
and ``python -m cifar_resnet_fast.train`` train. The import needs neither a GPU nor a compiler.
"""

import importlib
import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # python -m imports this before a command line runs; until then, Ctrl-C ends the process
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from cifar_resnet_fast.modules import ConvBNReLU
from cifar_resnet_fast.resnet import FastResNet, load_checkpoint
from cifar_resnet_fast.weights.pretrained import models

__version__ = "0.1.0"
__all__ = ["ConvBNReLU", "FastResNet", "TrainConfig", "load_checkpoint", "models", "train"]


def __getattr__(name: str):
    """The names of the training part are imported on first use."""
    if name == "train":
        return importlib.import_module("cifar_resnet_fast.train")
    if name == "TrainConfig":
        from cifar_resnet_fast.training.config import TrainConfig

        return TrainConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
