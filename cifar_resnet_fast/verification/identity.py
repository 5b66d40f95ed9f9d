"""What a verdict or a time depends on besides the input: card, driver, versions, build (layer 1).

``build`` is a hash of the package's kernels and of what calls them, compiled and not.
"""

import functools
import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parents[1]
_BUILD = ("ops/**/*.py", "kernels/**/*.py", "reference.py", "*.so", "_build_info.json")


def identity(device: torch.device) -> dict[str, str | None]:
    """``card``, ``driver``, ``torch``, ``triton``, ``python``, ``build``."""
    on_gpu = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "build": build(),
    }


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def build() -> str:
    """12 hexadecimal digits, other ones after any change of the kernels or of what calls them."""
    digest = hashlib.sha256()
    for pattern in _BUILD:
        for path in sorted(_PACKAGE.glob(pattern)):
            digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_name() -> str:
    """``CPU``, the model if Linux tells it, and the threads in use."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        model = None
    name = model[1] if model else platform.machine()
    threads = torch.get_num_threads()
    return f"CPU {name}, {threads} thread" + ("s" if threads > 1 else "")


def output_of(*command: str) -> str | None:
    """First line of what ``command`` prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None


def _driver() -> str | None:
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
