"""Data sets as tensors of bytes: known ones, .npz files, folders of images, shapes (layer 2.1).

Every source gives a ``Dataset`` of [N, 32, 32, 3] uint8 images and int64 labels on the CPU. Data
files are untrusted: nothing in them is executed, and their sizes are checked before memory is
allocated.
"""

import math
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cifar_resnet_fast.data import shapes
from cifar_resnet_fast.data.known import KNOWN, ensure_known, load_known
from cifar_resnet_fast.data.sources import DataUnavailableError
from cifar_resnet_fast.errors import extra, first_line

SHAPE = (32, 32, 3)
NAMES = ("auto", *KNOWN, "shapes")

_AUTO_SECONDS = 300.0  # what would take longer to download is left, if nobody asked for it
_MOST_CLASSES = 10_000  # that labels alone can stand for
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# what becomes RGB as it is seen; 16-bit and float pixels would be clipped to white or black
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa", "CMYK", "YCbCr", "HSV")


@dataclass(frozen=True)
class Dataset:
    """Images and labels of a training and a test split, on the CPU.

    name: its name in logs
    x_train, x_test: [N, 32, 32, 3] uint8, RGB
    y_train, y_test: [N] int64 in 0 .. len(classes) - 1
    classes: names, in the order of the labels
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]

    def limited(self, count: int) -> "Dataset":
        """The first ``count`` images of each split, or all if there are fewer."""
        return replace(
            self,
            x_train=self.x_train[:count],
            y_train=self.y_train[:count],
            x_test=self.x_test[:count],
            y_test=self.y_test[:count],
        )

    def with_validation(self, count: int) -> "Dataset":
        """``count`` training images, held out and used instead of the test split.

        The choice is the same for every seed of training: a fixed shuffle, class by chance.

        Raises:
            ValueError: no image would be left to train on
        """
        if count >= len(self.x_train):
            raise ValueError(
                f"validation must be smaller than the {len(self.x_train)} training images, "
                f"got {count}"
            )
        raw = np.random.Philox(key=45_000).random_raw(len(self.x_train))
        order = torch.from_numpy(np.argsort(raw, kind="stable"))
        held, kept = order[:count].sort().values, order[count:].sort().values
        return replace(
            self,
            x_train=self.x_train[kept],
            y_train=self.y_train[kept],
            x_test=self.x_train[held],
            y_test=self.y_train[held],
        )

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training images in 0 .. 1: two [3] float32."""
        # exact integer sums, so that the result is bitwise the same on every machine
        pixels = self.x_train.reshape(-1, SHAPE[-1])
        counts = torch.stack([torch.bincount(channel, minlength=256) for channel in pixels.T])
        values = torch.arange(256)
        total, squares = (counts * values).sum(1), (counts * values**2).sum(1)
        mean = total.double() / len(pixels)
        std = (squares.double() / len(pixels) - mean**2).sqrt()
        return (mean / 255).float(), (std / 255).float().clamp_min(1e-3)


def load_dataset(
    name: str, root: str | Path, limit: int | None = None, data_url: str | None = None
) -> Dataset:
    """Load a data set by name or by path.

    Args:
        name: ``cifar10``, ``cifar100``, ``svhn`` or ``fashion_mnist`` (in ``root``, or
            downloaded to it); ``shapes`` (drawn); a ``.npz`` file with x_train, y_train,
            x_test, y_test; or a folder with train/<class>/* and test/<class>/* of 32x32 images
        root: folder of the downloaded data
        limit: use only the first ``limit`` images of each split; None for all
        data_url: address of a known data set: its file or, ending with /, a folder with its
            files. None: the known sources, by speed

    Raises:
        ValueError: unknown name, or a file that breaks a rule; names the file, rule and value
        DataUnavailableError: a known data set is not in ``root`` and cannot be downloaded
        OSError: a file cannot be read
    """
    if data_url is not None and name not in KNOWN:
        raise ValueError(
            f"data_url must be left out with dataset {name}, which is not downloaded, "
            f"got {data_url!r}"
        )
    if name == "shapes":
        dataset = _load_shapes(limit)
    elif name in KNOWN:
        dataset = _load_known(name, Path(root), data_url)
    elif name.endswith(".npz"):
        dataset = load_npz(Path(name))
    elif Path(name).is_dir():
        dataset = _load_folder(Path(name))
    else:
        raise ValueError(
            f"dataset must be one of {', '.join(NAMES)}, a .npz file or a folder, got {name!r}"
        )
    return dataset if limit is None else dataset.limited(limit)


def find_dataset(
    name: str, root: str | Path, data_url: str | None = None
) -> tuple[str, str | None]:
    """Resolve ``auto``: CIFAR-10 if it is there or can be downloaded, otherwise shapes.

    Args:
        name, root, data_url: as for ``load_dataset``. With ``data_url``, ``auto`` is always
            CIFAR-10

    Returns:
        name: as for ``load_dataset``; anything but ``auto`` is returned unchanged
        reason: why ``auto`` is not CIFAR-10, in one line; otherwise None
    """
    if name != "auto":
        return name, None
    if data_url is not None:
        return "cifar10", None
    try:
        ensure_known("cifar10", Path(root), patience=_AUTO_SECONDS)
    except DataUnavailableError as error:
        return "shapes", str(error)
    return "cifar10", None


# --- each source ---------------------------------------------------------------------------


def _load_known(name: str, root: Path, url: str | None) -> Dataset:
    *arrays, classes = load_known(name, root, url)
    tensors = [torch.from_numpy(array) for array in arrays]
    return Dataset(name, tensors[0], tensors[1].long(), tensors[2], tensors[3].long(), classes)


def _load_shapes(limit: int | None) -> Dataset:
    def split(name: str) -> tuple[Tensor, Tensor]:
        size = shapes.SIZES[name]
        images, labels = shapes.draw(name, min(size, limit or size))
        return torch.from_numpy(images), torch.from_numpy(labels)

    return Dataset("shapes", *split("train"), *split("test"), shapes.CLASSES)


def load_npz(
    path: Path,
    splits: tuple[str, ...] = ("train", "test"),
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """A .npz file with x and y of the splits, and perhaps classes (names).

    Args:
        splits: splits that the file must have; others are not read and returned empty
        classes: names of the classes if the file has none (default: numbers)

    Raises:
        FileNotFoundError, ValueError: as ``load_dataset``
    """
    if not path.is_file():
        raise FileNotFoundError(f"dataset {path} must be a file, found none there")
    wanted = [f"{letter}_{split}" for split in splits for letter in "xy"]
    try:
        headers = _npz_headers(path, wanted)
        _check_headers(headers, splits)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[f"{key}.npy"] for key in headers}
    except Exception as error:  # a damaged file can cause any error in the readers
        reason = first_line(error) if str(error) else "the file is truncated"
        raise ValueError(f"dataset {path}: {reason}") from None
    # Keras has [N, 1]
    labels = {key: arrays[key].reshape(-1) for key in wanted if key.startswith("y_")}
    if "classes" in arrays:
        given = arrays["classes"].tolist()
        classes = tuple(
            n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in given
        )
    if classes is None:
        highest = int(labels[f"y_{splits[0]}"].max())
        classes = tuple(map(str, range(min(max(highest + 1, 2), _MOST_CLASSES))))
    for key, values in labels.items():
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= len(classes):
            raise ValueError(
                f"dataset {path}: {key} must be in 0 .. {len(classes) - 1}, got {low} .. {high}"
            )

    def split(name: str) -> tuple[Tensor, Tensor]:
        if name not in splits:
            return torch.empty((0, *SHAPE), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        images = torch.from_numpy(np.ascontiguousarray(arrays[f"x_{name}"]))
        return images, torch.from_numpy(labels[f"y_{name}"].astype(np.int64))

    return Dataset(path.stem, *split("train"), *split("test"), classes)


def npz_arrays(path: Path) -> set[str]:
    """The names of the arrays in a .npz file."""
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _npz_headers(path: Path, wanted: list[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the wanted arrays in a .npz file, without reading their data."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        present = set(archive.namelist())
        twins = sorted(name for name in present if f"{name}.npy" in present)
        if twins:
            raise ValueError(f"must hold each array once, got {twins[0]} and {twins[0]}.npy")
        for key in (*wanted, "classes"):
            if f"{key}.npy" not in present:
                continue
            with archive.open(f"{key}.npy") as file:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read is None:
                    raise ValueError(f"{key} must be in .npy format 1.0 or 2.0, got {version}")
                try:
                    shape, _, dtype = read(file)
                except Exception as error:  # a header is a Python literal
                    reason = first_line(error)
                    raise ValueError(f"{key} must have a whole header: {reason}") from None
                headers[key] = shape, dtype
    return headers


def _check_headers(
    headers: dict[str, tuple[tuple[int, ...], np.dtype]], splits: tuple[str, ...]
) -> None:
    """Check shapes, dtypes and memory before data is read; ValueError if a rule is broken."""
    wanted = [f"{letter}_{split}" for split in splits for letter in "xy"]
    for key in wanted:
        if key not in headers:
            raise ValueError(f"must hold {', '.join(wanted)}; {key} is missing")
    for split in splits:
        shape, dtype = headers[f"x_{split}"]
        if shape[1:] != SHAPE or dtype != np.uint8 or shape[0] == 0:
            raise ValueError(f"x_{split} must be [N, 32, 32, 3] uint8, got {list(shape)} {dtype}")
        labels, label_dtype = headers[f"y_{split}"]
        if labels not in (shape[:1], (shape[0], 1)) or not np.issubdtype(label_dtype, np.integer):
            raise ValueError(
                f"y_{split} must be [{shape[0]}] integers, got {list(labels)} {label_dtype}"
            )
    shape, dtype = headers.get("classes", ((1,), np.dtype(np.str_)))
    if len(shape) != 1 or shape[0] == 0 or dtype.kind not in "US":
        raise ValueError(f"classes must be a list of names, got {list(shape)} {dtype}")
    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(f"must fit into this machine's {memory} bytes, unpacks to {needed}")


def _load_folder(path: Path) -> Dataset:
    """A folder with train/<class>/* and test/<class>/* of 32x32 images."""
    found = {split: _class_folders(path, path / split) for split in ("train", "test")}
    classes = tuple(found["train"])
    if tuple(found["test"]) != classes:
        differing = sorted(found["train"].keys() ^ found["test"].keys())
        raise ValueError(
            f"dataset {path}: train and test must have the same classes, "
            f"differ in {', '.join(differing)}"
        )
    if len(classes) < 2:
        raise ValueError(f"dataset {path} must have at least 2 classes, got {len(classes)}")

    def split(name: str) -> tuple[Tensor, Tensor]:
        files: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(found[name].values()):
            inside = _picture_files(folder)
            if not inside:
                raise ValueError(
                    f"dataset {path} must have images in every class, found none in {folder} "
                    f"({', '.join(_EXTENSIONS)})"
                )
            files += inside
            labels += [label] * len(inside)
        pictures = np.empty((len(files), *SHAPE), np.uint8)
        for picture, file in zip(pictures, files, strict=True):
            picture[:] = _read_picture(file)
        return torch.from_numpy(pictures), torch.tensor(labels)

    return Dataset(path.resolve().name, *split("train"), *split("test"), classes)


def _class_folders(path: Path, split: Path) -> dict[str, Path]:
    """The folders of the classes by name, in that order, without hidden ones."""
    try:
        entries = sorted(split.iterdir())
    except OSError as error:
        raise ValueError(
            f"dataset {path} must hold train/<class>/* and test/<class>/*: {split}: "
            f"{error.strerror}"
        ) from None
    folders = {entry.name: entry for entry in entries if entry.is_dir()}
    return {name: folder for name, folder in folders.items() if not name.startswith(".")}


def _picture_files(folder: Path) -> list[Path]:
    """The images in a class's folder and in folders in it, without hidden entries.

    Raises:
        ValueError: an entry has the name of an image but is not a file
    """
    files = []
    for place, _, names in sorted(os.walk(folder)):  # does not follow links to folders
        for name in sorted(names):
            file = Path(place, name)
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if hidden or not name.lower().endswith(_EXTENSIONS):
                continue
            if not file.is_file():
                raise ValueError(f"dataset image {file}: must be a file")
            files.append(file)
    return files


def _read_picture(file: Path) -> np.ndarray:
    """[32, 32, 3] uint8; the size is checked before the image is unpacked."""
    with extra("train"):
        from PIL import Image
    try:
        with Image.open(file) as picture:
            if picture.size != SHAPE[:2]:
                raise ValueError(f"must be 32x32 pixels, got {picture.width}x{picture.height}")
            if picture.mode not in _MODES:
                raise ValueError(
                    f"must have 8 bits a channel (modes {', '.join(_MODES)}), got mode "
                    f"{picture.mode}"
                )
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # a damaged file can cause any error in the readers
        reason = first_line(error) if str(error) else "it is damaged"
        raise ValueError(f"dataset image {file}: {reason}") from None
