"""Test sets without training images: CIFAR-10-C, CIFAR-10.1, .npz files (layer 2).

A folder holds NAME.npy files of images with one labels.npy for all, as CIFAR-10-C has them, or
with NAME_labels.npy beside NAME_data.npy, as CIFAR-10.1 has them; or .npz files with x_test and
y_test. The files are untrusted, as in ``datasets``.

Source: Hendrycks and Dietterich 2019 (CIFAR-10-C); Recht et al. 2018 (CIFAR-10.1).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cifar_resnet_fast.data.datasets import SHAPE, Dataset, load_npz, npz_arrays
from cifar_resnet_fast.errors import first_line

SEVERITIES = 5  # severities of each corruption in CIFAR-10-C, one after the other in its file


def is_test_file(path: Path) -> bool:
    """Whether ``path`` is a .npz file with test images and without training images."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        names = npz_arrays(path)
    except Exception:  # load_dataset reports the error
        return False
    return "x_test" in names and "x_train" not in names


def test_files(folder: Path) -> list[Path]:
    """The files with images in a folder of test sets, by name; none if it is not such a folder."""
    if not folder.is_dir() or (folder / "train").exists():
        return []
    files = sorted(path for path in folder.glob("*.npy") if not _holds_labels(path))
    return files + sorted(path for path in folder.glob("*.npz") if is_test_file(path))


def load_test_sets(
    folder: Path, classes: tuple[str, ...], limit: int | None
) -> Iterator[tuple[Dataset, int]]:
    """The test sets of a folder, one after the other, without training images.

    Args:
        folder: one for which ``test_files`` finds some
        classes: names of the classes, unless an .npz file has its own names
        limit: use only the first ``limit`` images, of each severity if there are severities

    Yields:
        dataset: one test set
        parts: 5 if its images are five severities, one after the other: there is one labels.npy
            for all, which is the same five times over, as in CIFAR-10-C; otherwise 1

    Raises:
        ValueError, OSError: a file breaks a rule or cannot be read; names the file
    """
    for path in test_files(folder):
        if path.suffix == ".npz":
            dataset, parts = load_npz(path, ("test",), classes), 1
        else:
            dataset, parts = _from_npy(path, classes)
        if limit is not None:
            kept = torch.arange(len(dataset.x_test)).reshape(parts, -1)[:, :limit].flatten()
            dataset = replace(dataset, x_test=dataset.x_test[kept], y_test=dataset.y_test[kept])
        yield dataset, parts


def _holds_labels(path: Path) -> bool:
    return path.stem == "labels" or path.stem.endswith("_labels")


def _from_npy(path: Path, classes: tuple[str, ...]) -> tuple[Dataset, int]:
    name = path.stem.removesuffix("_data")
    own, shared = path.with_name(f"{name}_labels.npy"), path.with_name("labels.npy")
    labels_path = own if own.is_file() else shared
    if not labels_path.is_file():
        raise ValueError(f"dataset {path} must have {own.name} or labels.npy beside it")
    images, labels = _array(path), _array(labels_path)
    if images.dtype != np.uint8 or images.shape[1:] != SHAPE or len(images) == 0:
        raise ValueError(
            f"dataset {path} must be [N, 32, 32, 3] uint8, got {list(images.shape)} {images.dtype}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"dataset {labels_path} must be [{len(images)}] integers, got {list(labels.shape)} "
            f"{labels.dtype}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise ValueError(
            f"dataset {labels_path} must be in 0 .. {len(classes) - 1}, got {low} .. {high}"
        )
    dataset = Dataset(
        name,
        torch.empty((0, *SHAPE), dtype=torch.uint8),
        torch.empty(0, dtype=torch.int64),
        torch.from_numpy(np.array(images)),
        torch.from_numpy(np.array(labels, dtype=np.int64)),
        classes,
    )
    if labels_path == own or len(labels) % SEVERITIES:
        return dataset, 1
    rows = dataset.y_test.reshape(SEVERITIES, -1)
    return dataset, SEVERITIES if bool((rows == rows[0]).all()) else 1


def _array(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped: its size is that of the file."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged file can cause any error in the reader
        raise ValueError(
            f"dataset {path} must be a whole .npy file: {first_line(error)}"
        ) from None
