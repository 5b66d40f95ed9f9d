"""The compiled libraries ``_C`` and ``_cuda``: loads them, and knows why one is missing (layer 1).

Importing ``_C`` registers ``torch.ops.cifar_resnet_fast`` with its CPU code, ``_cuda`` the CUDA
kernels. Neither has to be there: setup.py builds what the machine can and records the rest.
"""

import importlib
import json
import re
from pathlib import Path

import torch

from cifar_resnet_fast.errors import first_line

_RECORD = Path(__file__).parents[1] / "_build_info.json"
# what setup.py built, with what, and what it left out and why; empty where it never ran
BUILD_INFO: dict = json.loads(_RECORD.read_text()) if _RECORD.exists() else {}


def _why_not_load(library: str) -> str | None:
    """Load ``library``; returns the reason in one line if that fails."""
    if not BUILD_INFO:
        return "the package was not installed: pip install --no-build-isolation ."
    if library in BUILD_INFO["missing"]:
        return f"{library} was not built: {BUILD_INFO['missing'][library]}"
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        return f"{library} needs torch 2.11 or later, this is {torch.__version__}"
    if library == "_cuda":
        built, here = BUILD_INFO["cuda"], torch.version.cuda
        if here is None:
            return f"_cuda was built for CUDA {built}, torch {torch.__version__} is without CUDA"
        if here.split(".")[0] != built.split(".")[0]:
            return f"_cuda was built for CUDA {built}, torch {torch.__version__} has CUDA {here}"
    try:
        importlib.import_module(f"cifar_resnet_fast.{library}")
    except ImportError as error:
        return f"{library} cannot be loaded: {first_line(error)}"
    return None


# library: the reason why it is not loaded, or None
WHY_NOT_LOADED = {"_C": _why_not_load("_C")}
WHY_NOT_LOADED["_cuda"] = WHY_NOT_LOADED["_C"] or _why_not_load("_cuda")


def why_not_extension(device: torch.device) -> str | None:
    """The reason why the compiled extension cannot run on ``device``, or None if it can."""
    if device.type == "cpu":
        return WHY_NOT_LOADED["_C"]
    if device.type != "cuda":
        return f"there is compiled code for cpu and cuda, not for {device.type}"
    return WHY_NOT_LOADED["_cuda"] or _why_not_architecture(
        BUILD_INFO["architectures"], torch.cuda.get_device_capability(device)
    )


# what torch.compiler.assume_constant_result does, but for importing torch._dynamo: 2 seconds
setattr(why_not_extension, "_dynamo_marked_constant", True)  # noqa: B010 (mypy)


def _why_not_architecture(built: str, capability: tuple[int, int]) -> str | None:
    """``built`` is a TORCH_CUDA_ARCH_LIST: machine code runs on later minor versions of its own
    major one, PTX on everything later; a list of names (Ampere, ...) is not judged here."""
    for name in re.split(r"[;,\s]+", built):
        version = re.fullmatch(r"(\d+)\.(\d+)(\+PTX)?", name)
        if version is None:
            return None
        major, minor = int(version[1]), int(version[2])
        if major == capability[0] and minor <= capability[1]:
            return None
        if version[3] and (major, minor) <= capability:
            return None
    return (
        f"_cuda was built for compute capability {built}, this GPU has "
        f"{capability[0]}.{capability[1]}; TORCH_CUDA_ARCH_LIST chooses when building"
    )
