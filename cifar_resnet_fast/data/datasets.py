"""Data sets as tensors of bytes: CIFAR, .npz files, folders of pictures, drawn shapes (layer 2).

Every source ends as a ``Dataset`` of [N, 32, 32, 3] uint8 pictures and int64 labels on the CPU.
Data files are untrusted: nothing in them is executed (but torchvision's CIFAR pickles, whose MD5
it checks first), and their sizes are checked before memory is taken.
"""

import contextlib
import math
import os
import socket
import threading
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar_resnet_fast.data import shapes

SHAPE = (32, 32, 3)
NAMES = ("auto", "cifar10", "cifar100", "shapes")

_PROBE_SECONDS = 6.0  # finding out that a server cannot be reached takes at most this long
_STALL_SECONDS = 30.0  # a download that receives nothing for so long has failed
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class DataUnavailableError(OSError):
    """A known data set is neither on the disk nor to be downloaded; the message says why."""


@dataclass(frozen=True)
class Dataset:
    """Pictures and labels of a training and a test split, on the CPU.

    name: what it is called in logs
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
        """The first ``count`` pictures of each split (all, where there are fewer)."""
        return replace(
            self,
            x_train=self.x_train[:count],
            y_train=self.y_train[:count],
            x_test=self.x_test[:count],
            y_test=self.y_test[:count],
        )

    def with_validation(self, count: int) -> "Dataset":
        """``count`` training pictures held out in place of the test split.

        The choice is the same for every seed of training: a fixed shuffle, class by chance.

        Raises:
            ValueError: no picture would be left to train on
        """
        if count >= len(self.x_train):
            raise ValueError(
                f"validation must be smaller than the {len(self.x_train)} training pictures, "
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
        """Mean and standard deviation of the training pictures: two [3] float32, full scale 1."""
        # exact integer sums, so that every machine gets the same bits
        pixels = self.x_train.reshape(-1, SHAPE[-1])
        counts = torch.stack([torch.bincount(channel, minlength=256) for channel in pixels.T])
        values = torch.arange(256)
        total, squares = (counts * values).sum(1), (counts * values**2).sum(1)
        mean = total.double() / len(pixels)
        std = (squares.double() / len(pixels) - mean**2).sqrt()
        return (mean / 255).float(), (std / 255).float().clamp_min(1e-3)


def load_dataset(name: str, root: str | Path, limit: int | None = None) -> Dataset:
    """Load a data set by name or by path.

    Args:
        name: ``cifar10`` or ``cifar100`` (in ``root``, or downloaded to it); ``shapes`` (drawn);
            a ``.npz`` file with x_train, y_train, x_test, y_test; or a folder with
            train/<class>/* and test/<class>/* of 32x32 pictures
        root: folder of the downloaded data
        limit: only the first so many pictures of each split; None for all

    Raises:
        ValueError: unknown name, or a file that breaks a rule; names the file, rule and value
        DataUnavailableError: CIFAR is neither in ``root`` nor to be downloaded
        OSError: a file cannot be read
    """
    if name == "shapes":
        dataset = _load_shapes(limit)
    elif name in ("cifar10", "cifar100"):
        dataset = _load_cifar(name, Path(root))
    elif name.endswith(".npz"):
        dataset = _load_npz(Path(name))
    elif Path(name).is_dir():
        dataset = _load_folder(Path(name))
    else:
        raise ValueError(
            f"dataset must be one of {', '.join(NAMES)}, a .npz file or a folder, got {name!r}"
        )
    return dataset if limit is None else dataset.limited(limit)


def find_dataset(name: str, root: str | Path) -> tuple[str, str | None]:
    """What ``auto`` stands for here: CIFAR-10 where it is or can be had, else shapes.

    Returns:
        name: as ``load_dataset`` takes it; anything but ``auto`` comes back as it is
        reason: why it is not CIFAR-10, in one line; None where it is or was not asked for
    """
    if name != "auto":
        return name, None
    try:
        _ensure_cifar("cifar10", Path(root))
    except DataUnavailableError as error:
        return "shapes", str(error)
    return "cifar10", None


# --- CIFAR ---------------------------------------------------------------------------------


def _cifar_class(name: str) -> type:
    from torchvision import datasets  # takes a second and imports triton: only when needed

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _ensure_cifar(name: str, root: Path) -> None:
    """Download and unpack CIFAR into ``root`` unless it is there with the right MD5 sums."""
    cifar = _cifar_class(name)
    try:
        cifar(root, train=False)
        return
    except RuntimeError:
        pass  # torchvision's word for absent or damaged
    ways_out = (
        f"put {cifar.base_folder} (from the unpacked {cifar.filename}) into {root}, "
        f"or name a .npz file or a folder as the dataset"
    )
    host = cifar.url.split("/")[2]
    reason = _why_unreachable(host, 443 if cifar.url.startswith("https") else 80)
    if reason is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _stall_limit(), contextlib.redirect_stdout(None):
                cifar(root, train=False, download=True)
            return
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
    raise DataUnavailableError(
        f"{name} is not (whole) in {root} and cannot be downloaded ({reason}): {ways_out}"
    )


def _why_unreachable(host: str, port: int) -> str | None:
    """The reason why ``host`` cannot be reached within ``_PROBE_SECONDS``; None where it can."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "http_proxy")):
        return None  # only the proxy can tell
    outcome: list[str | None] = []

    def probe() -> None:
        try:
            socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(f"{host}: {error}")

    # in a thread, since looking up a name has no time-out of its own
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return outcome[0] if outcome else f"{host}: no answer in {_PROBE_SECONDS:.0f} s"


@contextlib.contextmanager
def _stall_limit():
    """Downloads inside fail after ``_STALL_SECONDS`` without a byte, instead of hanging."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _load_cifar(name: str, root: Path) -> Dataset:
    _ensure_cifar(name, root)
    train, test = (_cifar_class(name)(root, train=train) for train in (True, False))
    return Dataset(
        name,
        torch.from_numpy(train.data),
        torch.tensor(train.targets),
        torch.from_numpy(test.data),
        torch.tensor(test.targets),
        tuple(train.classes),
    )


# --- other sources -------------------------------------------------------------------------


def _load_shapes(limit: int | None) -> Dataset:
    arrays = []
    for split, size in shapes.SIZES.items():
        arrays += map(torch.from_numpy, shapes.draw(split, min(size, limit or size)))
    return Dataset("shapes", *arrays, classes=shapes.CLASSES)


def _load_npz(path: Path) -> Dataset:
    """A .npz file with x_train, y_train, x_test, y_test, and perhaps classes (names)."""
    if not path.is_file():
        raise FileNotFoundError(f"dataset {path} must be a file, found none there")
    try:
        headers = _npz_headers(path)
        _check_headers(headers)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in headers}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else "the file is truncated"
        raise ValueError(f"dataset {path}: {reason}") from None
    labels = {key: torch.from_numpy(arrays[key].astype(np.int64)) for key in ("y_train", "y_test")}
    top = max(int(labels["y_train"].max()), 1)
    classes = tuple(map(str, arrays.get("classes", range(top + 1))))
    for key, values in labels.items():
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= len(classes):
            raise ValueError(
                f"dataset {path}: {key} must be in 0 .. {len(classes) - 1}, got {low} .. {high}"
            )
    return Dataset(
        path.stem,
        torch.from_numpy(arrays["x_train"]),
        labels["y_train"],
        torch.from_numpy(arrays["x_test"]),
        labels["y_test"],
        classes,
    )


def _npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the arrays we want in a .npz file, without reading their data."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        present = set(archive.namelist())
        for key in (*_ARRAYS, "classes"):
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
                shape, _, dtype = read(file)
                headers[key] = shape, dtype
    return headers


def _check_headers(headers: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """The rules for shapes, dtypes and memory, before data is read; ValueError if broken."""
    for key in _ARRAYS:
        if key not in headers:
            raise ValueError(f"must hold {', '.join(_ARRAYS)}; {key} is missing")
    for split in ("train", "test"):
        shape, dtype = headers[f"x_{split}"]
        if shape[1:] != SHAPE or dtype != np.uint8 or shape[0] == 0:
            raise ValueError(f"x_{split} must be [N, 32, 32, 3] uint8, got {list(shape)} {dtype}")
        labels, label_dtype = headers[f"y_{split}"]
        if labels != shape[:1] or not np.issubdtype(label_dtype, np.integer):
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
    """A folder with train/<class>/* and test/<class>/* of 32x32 pictures."""
    from torchvision.datasets import ImageFolder

    try:
        splits = {split: ImageFolder(path / split) for split in ("train", "test")}
    except FileNotFoundError as error:
        raise ValueError(
            f"dataset {path} must hold train/<class>/* and test/<class>/*: "
            f"{str(error).splitlines()[0]}"
        ) from None
    classes = splits["train"].classes
    if splits["test"].classes != classes:
        differing = sorted(set(classes) ^ set(splits["test"].classes))
        raise ValueError(
            f"dataset {path}: train and test must have the same classes, "
            f"differ in {', '.join(differing)}"
        )
    if len(classes) < 2:
        raise ValueError(f"dataset {path} must have at least 2 classes, got {len(classes)}")
    arrays = []
    for folder in splits.values():
        pictures = np.empty((len(folder.samples), *SHAPE), np.uint8)
        for picture, (file, _) in zip(pictures, folder.samples, strict=True):
            picture[:] = _read_picture(file)
        arrays += [torch.from_numpy(pictures), torch.tensor(folder.targets)]
    return Dataset(path.resolve().name, *arrays, classes=tuple(classes))


def _read_picture(file: str) -> np.ndarray:
    """[32, 32, 3] uint8; the size is checked before the picture is unpacked."""
    try:
        with Image.open(file) as picture:
            if picture.size != SHAPE[:2]:
                raise ValueError(f"must be 32x32 pixels, got {picture.width}x{picture.height}")
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"dataset picture {file}: {error}") from None
