"""Data sets as tensors of bytes: CIFAR, .npz files, folders of pictures, drawn shapes (layer 2).

Every source ends as a ``Dataset`` of [N, 32, 32, 3] uint8 pictures and int64 labels on the CPU.
Data files are untrusted: nothing in them is executed (but torchvision's CIFAR pickles, whose MD5
it checks first), and their sizes are checked before memory is taken.
"""

import contextlib
import hashlib
import math
import os
import socket
import threading
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar_resnet_fast.data import shapes
from cifar_resnet_fast.errors import first_line

SHAPE = (32, 32, 3)
NAMES = ("auto", "cifar10", "cifar100", "shapes")

_PROBE_SECONDS = 6.0  # finding out that a server cannot be reached takes at most this long
_STALL_SECONDS = 30.0  # a download that receives nothing for so long has failed
_MOST_CLASSES = 10_000  # that labels alone can stand for
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# what becomes RGB as it is seen; 16-bit and float pixels would be clipped to white or black
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa", "CMYK", "YCbCr", "HSV")


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
        dataset = load_npz(Path(name))
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
    """Unpack or download CIFAR into ``root`` unless it is there with the right MD5 sums."""
    cifar = _cifar_class(name)
    damaged = _damaged_file(cifar, root)
    if damaged is None:
        return
    if _md5(root / cifar.filename) == cifar.tgz_md5:
        # torchvision unpacks what it need not download
        with contextlib.redirect_stdout(None):
            cifar(root, train=False, download=True)
        return
    ways_out = (
        f"put {cifar.filename}, or {cifar.base_folder} out of it, into {root}, "
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
            reason = first_line(error)
    raise DataUnavailableError(
        f"{name} is not (whole) in {root}, {damaged}, and cannot be downloaded ({reason}): "
        f"{ways_out}"
    )


def _damaged_file(cifar: type, root: Path) -> str | None:
    """The first of CIFAR's files that is missing or has a wrong MD5 sum; None if all are right."""
    rules = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    for filename, md5 in rules:
        path = root / cifar.base_folder / filename
        found = _md5(path)
        if found != md5:
            archive = root / cifar.filename
            if found is None and archive.is_file():
                return f"{archive} is damaged"
            return f"{path} is {'missing' if found is None else 'damaged'}"
    return None


def _md5(path: Path) -> str | None:
    """The MD5 sum of a file; None if there is none."""
    if not path.is_file():
        return None
    sum_ = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while part := file.read(2**20):
            sum_.update(part)
    return sum_.hexdigest()


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


def load_npz(
    path: Path,
    splits: tuple[str, ...] = ("train", "test"),
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """A .npz file with x and y of the splits, and perhaps classes (names).

    Args:
        splits: that the file must have; what it has of others is left alone and comes back empty
        classes: names of the classes if the file has none; by default numbers

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
    except Exception as error:  # a damaged file can make the readers stumble over anything
        reason = first_line(error) if str(error) else "the file is truncated"
        raise ValueError(f"dataset {path}: {reason}") from None
    # [N, 1], as Keras has them, are as good as [N]
    labels = {key: arrays[key].reshape(-1) for key in wanted if key.startswith("y_")}
    names = arrays.get("classes", classes)
    if names is None:
        first = labels[f"y_{splits[0]}"]
        names = range(min(max(int(first.max()) + 1, 2), _MOST_CLASSES))
    tensors = {
        "x_train": torch.empty((0, *SHAPE), dtype=torch.uint8),
        "y_train": torch.empty(0, dtype=torch.int64),
    }
    for key, values in labels.items():
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= len(names):
            raise ValueError(
                f"dataset {path}: {key} must be in 0 .. {len(names) - 1}, got {low} .. {high}"
            )
        tensors[key] = torch.from_numpy(values.astype(np.int64))
    if getattr(names, "dtype", np.dtype("U")).kind == "S":
        names = [name.decode(errors="replace") for name in names]
    for split in splits:
        images = np.ascontiguousarray(arrays[f"x_{split}"])
        tensors[f"x_{split}"] = torch.from_numpy(images)
    return Dataset(path.stem, **tensors, classes=tuple(map(str, names)))


def npz_arrays(path: Path) -> set[str]:
    """The names of the arrays in a .npz file."""
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _npz_headers(path: Path, wanted: list[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the arrays we want in a .npz file, without reading their data."""
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
                except Exception as error:  # a header is Python source, and read as such
                    reason = first_line(error)
                    raise ValueError(f"{key} must have a whole header: {reason}") from None
                headers[key] = shape, dtype
    return headers


def _check_headers(
    headers: dict[str, tuple[tuple[int, ...], np.dtype]], splits: tuple[str, ...]
) -> None:
    """The rules for shapes, dtypes and memory, before data is read; ValueError if broken."""
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
    """A folder with train/<class>/* and test/<class>/* of 32x32 pictures."""
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
    arrays = []
    for folders in found.values():
        files, labels = [], []
        for label, folder in enumerate(folders.values()):
            inside = _picture_files(folder)
            if not inside:
                raise ValueError(
                    f"dataset {path} must have pictures in every class, found none in {folder} "
                    f"({', '.join(_EXTENSIONS)})"
                )
            files += inside
            labels += [label] * len(inside)
        pictures = np.empty((len(files), *SHAPE), np.uint8)
        for picture, file in zip(pictures, files, strict=True):
            picture[:] = _read_picture(file)
        arrays += [torch.from_numpy(pictures), torch.tensor(labels)]
    return Dataset(path.resolve().name, *arrays, classes=classes)


def _class_folders(path: Path, split: Path) -> dict[str, Path]:
    """The folders of the classes by name, in its order; hidden ones are none."""
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
    """The pictures in a class's folder, and in folders in it; hidden entries are none.

    Raises:
        ValueError: something is named as a picture and is no file
    """
    files = []
    for place, _, names in sorted(os.walk(folder)):  # does not follow links to folders
        for name in sorted(names):
            file = Path(place, name)
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if hidden or not name.lower().endswith(_EXTENSIONS):
                continue
            if not file.is_file():
                raise ValueError(f"dataset picture {file}: must be a file")
            files.append(file)
    return files


def _read_picture(file: Path) -> np.ndarray:
    """[32, 32, 3] uint8; the size is checked before the picture is unpacked."""
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
    except Exception as error:  # a damaged file can make the readers stumble over anything
        reason = first_line(error) if str(error) else "it is damaged"
        raise ValueError(f"dataset picture {file}: {reason}") from None
