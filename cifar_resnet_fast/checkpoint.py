"""Checkpoint files, written atomically and read without executing anything (layer 1).

A checkpoint is a dictionary of tensors and plain values. Writing goes to a temporary file in the
same folder that is flushed to the disk and then renamed, so a crash, a SIGKILL or a full disk
leaves the earlier file untouched. Reading uses ``weights_only=True``, compares the sizes that the
file declares with its own size before memory is allocated, and verifies the checksums of its
archive, which PyTorch's own reader ignores.
"""

import io
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_resnet_fast.errors import first_line


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` by ``data``, atomically: either the old or the new is there.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is unchanged
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # this puts the rename itself on the disk
    finally:
        os.close(folder)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write ``content`` (tensors and plain values) to ``path``, atomically.

    Raises:
        OSError: as ``write_atomically``
    """
    # to memory first: torch.save turns a full disk into a RuntimeError without its reason
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary in a checkpoint file, its tensors on the CPU. Nothing in it is executed.

    Args:
        path: a file written by ``torch.save``, in either of its formats

    Raises:
        FileNotFoundError: there is no such file
        ValueError: it is not a checkpoint, is damaged, unpacks to more than its own size, or
            holds anything but tensors and plain values

    Warns:
        UserWarning: the file was written without checksums, so damage would not be noticed
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} must be a file, found none there")
    try:
        _check_beginning(path)
        has_checksums = _verify(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of tensors that are checked later
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        met = re.search(r"GLOBAL ([\w.]+)", str(error))
        if met:
            raise ValueError(
                f"checkpoint {path} must hold tensors and plain values only, it holds a {met[1]}; "
                f"if you trust it, read it with torch.load(..., weights_only=False) and save its "
                f"state_dict anew"
            ) from None
        raise ValueError(
            f"checkpoint {path} must hold tensors and plain values only, and be whole; "
            f"it is damaged, or not a checkpoint, or holds other Python objects"
        ) from None
    except Exception as error:  # a damaged file can cause any error in the readers
        reason = first_line(error)
        raise ValueError(f"checkpoint {path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"checkpoint {path} must hold a dictionary, got a {type(content).__name__}"
        )
    if not has_checksums:
        warnings.warn(
            f"checkpoint {path} holds no checksums, so damage to it cannot be noticed",
            stacklevel=2,
        )
    return content


def check_holds(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Check that a file holds all elements of its tensors.

    Raises:
        ValueError: a tensor is sparse, nested, quantised or without data, or all tensors together
            have more elements than fit into the file
    """
    claimed, size = 0, Path(path).stat().st_size
    for key, value in tensors.items():
        kind = next(
            (
                name
                for name, found in (
                    ("nested", value.is_nested),
                    (str(value.layout).removeprefix("torch."), value.layout != torch.strided),
                    ("quantised", value.is_quantized),
                    ("meta", value.is_meta),
                )
                if found
            ),
            None,
        )
        if kind is not None:
            raise ValueError(
                f"checkpoint {path}: {key} must be a dense tensor with its data, got a {kind} one"
            )
        claimed += value.numel() * value.element_size()
    if claimed > size:
        raise ValueError(
            f"checkpoint {path} must hold the {claimed} bytes of its tensors, it has {size}"
        )


def check_weight(path: str | Path, key: str, value: Tensor, like: Tensor) -> None:
    """Check that ``value``, read from ``path`` as ``key``, can replace the model's ``like``.

    Raises:
        ValueError: its shape or kind of dtype differs, or it is not finite or a negative variance
    """
    rule: str | None = None
    got: Any = None
    if value.shape != like.shape:
        rule, got = f"have shape {tuple(like.shape)}", tuple(value.shape)
    elif value.is_floating_point() != like.is_floating_point() or value.is_complex():
        kind = "a floating" if like.is_floating_point() else "an integer"
        rule, got = f"be of {kind} dtype", value.dtype
    elif value.is_floating_point():
        values = value.to(like.dtype)  # a number can also be too large for the model's dtype
        wrong = values[~values.isfinite()]
        if wrong.numel():
            rule, got = f"be finite in {like.dtype}", wrong[0].item()
        elif key.endswith("running_var") and values.min() < 0:
            rule, got = "be 0 or more", values.min().item()
    if rule is not None:
        raise ValueError(f"checkpoint {path}: {key} must {rule}, got {got}")


def _check_beginning(path: Path) -> None:
    """Recognise, by their first bytes, files that often take the place of a checkpoint."""
    with open(path, "rb") as file:
        beginning = file.read(64).lstrip().lower()
    if beginning.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer; git lfs pull fetches the file itself")
    if beginning.startswith((b"<!doctype html", b"<html")):
        raise ValueError("it is an HTML page, not the downloaded file")


def _verify(path: Path) -> bool:
    """Compare every part of the archive with its checksum; returns whether there are any.

    Files in the format of PyTorch before 1.6 have none; neither have files written after
    ``torch.serialization.set_crc32_options(False)``.

    Raises:
        ValueError: a checksum differs, the archive is not whole, or is compressed
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise ValueError("the end of its archive is missing or damaged")
        return False
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
        unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if unpacked > size:
            raise ValueError(
                f"must be stored uncompressed, as torch.save does; {size} bytes unpack to "
                f"{unpacked}"
            )
        if not any(entry.CRC for entry in entries):
            return False
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged!r} inside does not have its checksum: the file is damaged")
    return True
