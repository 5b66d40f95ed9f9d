"""CIFAR ResNets of He et al. 2015, trained and run fast.

``FastResNet(depth)`` is the network, ``load_checkpoint(model, path)`` loads published weights,
``python -m cifar_resnet_fast.train`` trains. Needs neither a GPU nor a compiler to import.
"""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # python -m imports this for one of the command lines: until it runs, Ctrl-C ends the process
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from cifar_resnet_fast.modules import ConvBNReLU
from cifar_resnet_fast.resnet import FastResNet, load_checkpoint

__version__ = "0.1.0"
__all__ = ["ConvBNReLU", "FastResNet", "load_checkpoint"]
