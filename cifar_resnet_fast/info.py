"""The installation and what it can run: ``python -m cifar_resnet_fast.info`` (layer 4).

Lists versions, devices and the compiled libraries; for every operation and device, the
implementation that ``auto`` takes and why another one cannot run; and the results of the
self-check on each GPU. Needs neither a GPU, Triton nor the extension.
"""

import importlib.metadata
import os
import platform
import sys

import torch

from cifar_resnet_fast import ops
from cifar_resnet_fast.verification.verdicts import Verdicts


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def version_lines() -> list[str]:
    cuda = torch.version.cuda
    return [
        f"{_version('cifar_resnet_fast')}, Python {platform.python_version()}",
        f"torch {torch.__version__} ({f'CUDA {cuda}' if cuda else 'without CUDA'}), "
        f"{_version('torchvision')}, {_version('triton')}",
    ]


def extension_lines() -> list[str]:
    """The compiled libraries: how they were built, and whether they are loaded."""
    line = "compiled libraries"
    if ops.BUILD_INFO.get("built"):
        line += f", built with torch {ops.BUILD_INFO['torch']}"
        if "_cuda" in ops.BUILD_INFO["built"]:
            source = ops.BUILD_INFO.get("toolkit", "of unknown origin")  # an earlier build's
            line += (
                f" and CUDA {ops.BUILD_INFO['cuda']} ({source}) "
                f"for compute capability {ops.BUILD_INFO['architectures']}"
            )
    return [line] + [
        f"  {library}: {reason or 'loaded'}" for library, reason in ops.WHY_NOT_LOADED.items()
    ]


def device_lines() -> list[str]:
    """Every device, followed by every operation with its implementations."""
    lines = []
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if not devices:
        lines.append("device cuda: no GPU is visible")
    for device in [*devices, torch.device("cpu")]:
        what = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            what = (
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.multi_processor_count} multiprocessors, "
                f"{properties.total_memory / 2**30:.1f} GiB"
            )
        lines.append(f"device {device}: {what}")
        for operation in ops.OPERATIONS:
            lines.append(f"  {operation}: auto takes {ops.choose('auto', device, operation)}")
            for implementation in ops.IMPLEMENTATIONS:
                reason = ops.why_not(implementation, device, operation)
                lines.append(f"    {implementation}: {'can run' if reason is None else reason}")
        if device.type == "cuda":
            lines += verdict_lines(device)
    return lines


def verdict_lines(device: torch.device) -> list[str]:
    """The results of the self-check on a GPU with these versions and this build."""
    verdicts = Verdicts(device)
    if verdicts.why_not_kept is not None:
        return [f"  self-check: no results are kept: {verdicts.why_not_kept}"]
    found = verdicts.items()
    if not found:
        return ["  self-check: not run on this card and build yet: cifar_resnet_fast.selfcheck"]
    lines = [f"  self-check, in {verdicts.path}:"]
    for name, verdict in found:
        reason = f": {verdict.reason}" if verdict.reason else ""
        lines.append(f"    {name}: {verdict.verdict} on {verdict.date}{reason}")
    return lines


if __name__ == "__main__":
    try:
        print("\n".join([*version_lines(), *extension_lines(), *device_lines()]), flush=True)
    except BrokenPipeError:  # by a program such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
