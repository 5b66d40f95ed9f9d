"""CIFAR ResNets of He et al. 2015, trained and run fast.

``FastResNet(depth)`` is the network, ``FastResNet.from_pretrained(name)`` a trained one and
``models()`` the names; ``load_checkpoint(model, path)`` loads published weights; ``train(config)``
and ``python -m cifar_resnet_fast.train`` train. Needs neither a GPU nor a compiler to import.
"""

from cifar_resnet_fast.modules import ConvBNReLU
from cifar_resnet_fast.pretrained import models
from cifar_resnet_fast.resnet import FastResNet, load_checkpoint

__version__ = "0.1.0"
__all__ = ["ConvBNReLU", "FastResNet", "load_checkpoint", "models"]
