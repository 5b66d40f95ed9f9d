"""Which implementation of an operation runs: the only place that chooses (layer 1).

``reference`` is plain PyTorch; ``cuda`` is the compiled extension; ``triton`` is kernels that are
compiled when first launched. An operation need not have all of them, so the question is always
asked for one operation. On a CUDA tensor ``auto`` takes the fastest that can run there, on any
other tensor the reference. One that was asked for by name and cannot run is an error that says
why; nothing falls back silently. By name, CPU tensors too are served by ``cuda``, with the
C++ twins by which its smaller kernels are tested, and by ``triton``, interpreted, where the
environment has TRITON_INTERPRET=1.
"""

import importlib.util
import os
from collections.abc import Callable

import torch

from cifar_resnet_fast.ops._checks import shown
from cifar_resnet_fast.ops._extension import why_not_extension

IMPLEMENTATIONS = ("cuda", "triton", "reference")
OPERATIONS = {  # and their implementations, fastest first
    "conv_bn_relu": ("triton", "reference"),
    "shortcut_a": ("cuda", "triton", "reference"),
    "trunk": ("cuda", "triton", "reference"),
    "linear_cross_entropy": ("triton", "reference"),
    "load_batch": ("triton", "reference"),
    "record_step": ("triton", "reference"),
    "sgd": ("triton", "reference"),
}
# (implementation, operation): why it is not to be trusted on this machine
_DISTRUSTED: dict[tuple[str, str], str] = {}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_not(implementation: str, device: torch.device, operation: str) -> str | None:
    """The reason why ``operation`` cannot run in ``implementation`` on ``device``, None if it can.

    Raises:
        TypeError: ``device`` is not a torch.device
        ValueError: the implementation's or the operation's name is unknown
    """
    if not isinstance(device, torch.device):
        raise TypeError(f"device must be a torch.device, got {shown(device)}")
    if not isinstance(operation, str) or operation not in OPERATIONS:
        raise ValueError(
            f"operation must be one of {', '.join(OPERATIONS)}, got {shown(operation)}"
        )
    if not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(('auto', *IMPLEMENTATIONS))}, "
            f"got {shown(implementation)}"
        )
    if implementation not in OPERATIONS[operation]:
        return f"{operation} has no implementation of that name"
    if (implementation, operation) in _DISTRUSTED:
        return _DISTRUSTED[implementation, operation]
    if implementation == "cuda":
        if operation == "trunk" and device.type == "cpu":
            return "the kernels of trunk need a CUDA GPU"
        return why_not_extension(device)
    if implementation == "triton":
        return why_not_triton(device)
    return None


def distrust(implementation: str, operation: str, reason: str) -> None:
    """Have ``operation`` never again run in ``implementation`` in this process, for ``reason``.

    Raises:
        ValueError: it is the reference, which everything falls back to
    """
    if implementation == "reference":
        raise ValueError(f"implementation must be another than the reference of {operation}")
    _DISTRUSTED[implementation, operation] = reason


def why_not_triton(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on ``device``, None if they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return (
            "Triton kernels need a CUDA device, or TRITON_INTERPRET=1 in the environment, which "
            "interprets them on the CPU, slowly"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "compute capability 8.0 or above is needed, got {}.{}".format(*capability)
    return None


def no_rules(implementation: str) -> None:
    """The ``broken_rule`` of an operation whose implementations all take the same arguments."""


def choose(
    implementation: str,
    device: torch.device,
    operation: str,
    broken_rule: Callable[[str], Exception | None] = no_rules,
) -> str:
    """The name of the implementation of ``operation`` that runs on ``device``.

    Args:
        implementation: ``auto`` or one of ``IMPLEMENTATIONS``
        device: where the tensors live
        operation: one of ``OPERATIONS``
        broken_rule: of an implementation's name. the first of the rules which it has besides those
            of the reference that the arguments break, as the error to raise; None if they break
            none. ``auto`` passes over an implementation whose rules are broken

    Raises:
        ValueError: the name is unknown
        RuntimeError: the named implementation cannot run on ``device``; says why
        Exception: the named implementation's broken rule
    """
    if isinstance(implementation, str) and implementation == "auto":
        why_not("reference", device, operation)  # what is wrong with the others
        # Triton's interpreter checks kernels; it is hundreds of times slower than the reference
        if device.type != "cuda":
            return "reference"
        names = OPERATIONS[operation]
        return next(
            name
            for name in names
            if why_not(name, device, operation) is None and broken_rule(name) is None
        )
    reason = why_not(implementation, device, operation)
    if reason is not None:
        raise RuntimeError(
            f"implementation {implementation!r} cannot run {operation} on {device}: {reason}"
        )
    broken = broken_rule(implementation)
    if broken is not None:
        raise broken
    return implementation
