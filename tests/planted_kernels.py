"""The package's own catalogue, with the CUDA kernels emulated on the CPU, and one of them spoiled.

The worker processes of test_selfcheck.py import it. The environment variable PLANTED says what
its F2 kernel does: nothing but its work, ``wrong``, ``crash`` or ``hang``.
"""

import ctypes
import functools
import os
import time

import emulation

from cifar_resnet_fast.ops import _dispatch as choice
from cifar_resnet_fast.ops._trunk import cuda as trunk_cuda
from cifar_resnet_fast.verification import checks


def catalogue(device):
    emulation.load_operations()
    emulation.load().set_order("last_warp_first")
    choice.why_not = lambda *_: None
    checks.ops.why_not = lambda *_: None
    trunk_cuda.multiprocessors = lambda _: 2
    right = trunk_cuda.Kernels.f2

    @functools.wraps(right)
    def f2(kernels, *arguments, **named):
        planted = os.environ.get("PLANTED")
        if planted == "crash":
            ctypes.string_at(0)
        if planted == "hang":
            time.sleep(1000)
        norm, y, sums = right(kernels, *arguments, **named)
        return norm, y * 1.05 if planted == "wrong" else y, sums

    trunk_cuda.Kernels.f2 = f2
    return checks.catalogue(device)
