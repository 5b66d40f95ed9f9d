"""Checks that end in every way there is; the worker processes of test_selfcheck.py import them."""

import ctypes
import os
import time

import torch

from cifar_resnet_fast.verification.budget import Unavailable, WrongResult
from cifar_resnet_fast.verification.checks import Check


def right():
    return "as it should be"


def measured():
    return {"pid": os.getpid()}


def wrong():
    raise WrongResult("y: norm of the error must be at most 1, got 2")


def unavailable():
    raise Unavailable("there is none of that here")


def crash():
    ctypes.string_at(0)


def end():
    print("said before the end", flush=True)
    os._exit(3)


def hang():
    time.sleep(1000)


def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def full():
    raise torch.OutOfMemoryError("CUDA out of memory.")


def chatter():
    os.write(1, b"a line that is no answer\n")
    os.write(2, b"x" * 200_000)  # more than a pipe holds


ENDINGS = (right, wrong, crash, hang, fail, full, end, unavailable, chatter, measured)


def catalogue(device):
    return [Check(run.__name__, run, limit=2.0 if run is hang else 60.0) for run in ENDINGS]
