"""Checkpoint files: written whole or not at all, read without running anything (layer 1).

A checkpoint is a dictionary of tensors and plain values. Writing goes to a temporary file in the
same folder that is flushed to the disk and then renamed, so a crash, a SIGKILL or a full disk
leaves the file before it untouched. Reading uses ``weights_only=True`` and checks what the file
claims to hold against its size before memory is taken.
"""

import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: the old content or the new stands there, never a part.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is as it was
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
        os.fsync(folder)  # the rename itself is on the disk only after this
    finally:
        os.close(folder)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write ``content`` (tensors and plain values) to ``path``, whole or not at all.

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
        path: a file by ``torch.save``, this package's or anybody's, in either of its formats

    Raises:
        FileNotFoundError: there is no such file
        ValueError: it is not a checkpoint, is damaged, unpacks to more than its own size, or
            holds something else than tensors and plain values
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} must be a file, found none there")
    try:
        _check_beginning(path)
        if zipfile.is_zipfile(path):
            _check_unpacked_size(path)
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
    except Exception as error:  # a damaged file can make the readers stumble over anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"checkpoint {path} must hold a dictionary, got a {type(content).__name__}"
        )
    return content


def _check_beginning(path: Path) -> None:
    """What is often found in the place of a checkpoint is told by its first bytes."""
    with open(path, "rb") as file:
        beginning = file.read(64).lstrip().lower()
    if beginning.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer; git lfs pull fetches the file itself")
    if beginning.startswith((b"<!doctype html", b"<html")):
        raise ValueError("it is an HTML page, not the file that was to be downloaded")


def _check_unpacked_size(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > size:
        raise ValueError(
            f"must be stored uncompressed, as torch.save does; {size} bytes unpack to {unpacked}"
        )
