"""The known data sets, in miniature: out of their archives, from a folder of our own."""

import gzip
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import struct
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest

from cifar_resnet_fast.data import known, sources
from cifar_resnet_fast.data.known import KNOWN, ensure_known, load_known
from cifar_resnet_fast.data.sources import DataUnavailableError
from cifar_resnet_fast.train import main

RNG = np.random.default_rng(0)


class Python2(pickle._Pickler):
    """Pickles as Python 2 and the NumPy of 2009 did, which the authors' files come from."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_text

    @classmethod
    def dumps(cls, value):
        file = io.BytesIO()
        cls(file, protocol=2).dump(value)
        return file.getvalue().replace(b"numpy._core", b"numpy.core")


def md5(data):
    return hashlib.md5(data).hexdigest()


def put(monkeypatch, name, folder, files, unpacked=None):
    """Let the data set consist of ``files`` (name: bytes), which lie in ``folder``."""
    folder.mkdir(exist_ok=True)
    remote = []
    for file in KNOWN[name].remote:
        (folder / file.name).write_bytes(files[file.name])
        size, total = len(files[file.name]), md5(files[file.name])
        remote.append(replace(file, size=size, md5=total, urls=(), unpacked=0))
    small = replace(KNOWN[name], remote=tuple(remote), unpacked=unpacked)
    monkeypatch.setitem(known.KNOWN, name, small)
    return folder.as_uri() + "/"


def cifar(folder, name, classes):
    """An archive as the authors' are, and what is in it."""
    number = {"cifar10": "label", "cifar100": "fine_label"}[name]
    members = list(KNOWN[name].unpacked)
    data, unpacked = {}, {}
    for member in members[:-1]:
        images = RNG.integers(0, 256, (6, 3072), dtype=np.uint8)
        batch = {"data": images, f"{number}s": RNG.integers(0, len(classes), 6).tolist()}
        data[member] = Python2.dumps(batch)
    data[members[-1]] = Python2.dumps({f"{number}_names": list(classes)})
    folder.mkdir()
    path = folder / KNOWN[name].remote[0].name
    with tarfile.open(path, "w:gz") as tar:
        for member, content in data.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            (folder / "member").write_bytes(content)
            with open(folder / "member", "rb") as file:
                tar.addfile(info, file)
            unpacked[member] = md5(content)
    return {path.name: path.read_bytes()}, unpacked, data


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    classes = ("a", "b", "c")
    archive, unpacked, data = cifar(tmp_path / "made", name, classes)
    url = put(monkeypatch, name, tmp_path / "server", archive, unpacked)
    root = tmp_path / "data"
    x_train, y_train, x_test, y_test, found = load_known(name, root, url)
    batches = [pickle.loads(content, encoding="latin1") for content in data.values()]
    number = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    pixels = np.concatenate([batch["data"] for batch in batches[:-2]])
    assert x_train.shape == (len(pixels), 32, 32, 3)
    assert x_train.flags["C_CONTIGUOUS"]
    for at in ((0, 0, 0, 0), (5, 31, 2, 1), (len(pixels) - 1, 7, 30, 2)):
        n, y, x, channel = at
        assert x_train[at] == pixels[n, 1024 * channel + 32 * y + x]
    assert y_train.tolist() == sum((batch[number] for batch in batches[:-2]), [])
    assert x_test.shape == (6, 32, 32, 3)
    assert y_test.tolist() == batches[-2][number]
    assert found == classes
    # again, with nothing to download from
    monkeypatch.setattr(known, "fetch", None)
    assert np.array_equal(load_known(name, root)[0], x_train)


def test_an_archive_that_is_there_is_unpacked(tmp_path, monkeypatch):
    archive, unpacked, _ = cifar(tmp_path / "made", "cifar10", "ab")
    put(monkeypatch, "cifar10", tmp_path / "data", archive, unpacked)
    assert load_known("cifar10", tmp_path / "data")[4] == ("a", "b")


def test_a_damaged_batch_is_unpacked_anew_and_never_unpickled(tmp_path, monkeypatch):
    archive, unpacked, data = cifar(tmp_path / "made", "cifar10", "ab")
    put(monkeypatch, "cifar10", tmp_path / "data", archive, unpacked)
    load_known("cifar10", tmp_path / "data")
    batch = tmp_path / "data/cifar-10-batches-py/data_batch_3"
    batch.write_bytes(b"cos\nabort\n(tR.")  # would end the process if unpickled
    load_known("cifar10", tmp_path / "data")
    assert batch.read_bytes() == data["cifar-10-batches-py/data_batch_3"]
    batch.write_bytes(b"cos\nabort\n(tR.")
    (tmp_path / "data/cifar-10-python.tar.gz").unlink()
    with pytest.raises(DataUnavailableError, match="data_batch_3 is damaged, and cannot be"):
        load_known("cifar10", tmp_path / "data")


@pytest.mark.parametrize("made", ["in 2009", "now"])
def test_a_pickle_as_the_authors_made_it_is_read(tmp_path, made):
    batch = {"data": RNG.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 1]}
    content = Python2.dumps(batch) if made == "in 2009" else pickle.dumps(batch)
    globals_ = {value for code, value, _ in pickletools.genops(content) if code.name == "GLOBAL"}
    if made == "in 2009":
        assert globals_ == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    path = tmp_path / "batch"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = known._unpickled(path)
    assert np.array_equal(found["data"], batch["data"])
    assert found["labels"] == [3, 1]


class Calls:
    """Whose pickle calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (pickle.dumps(Calls(os.mkdir, "made")), "posix.mkdir"),
        (pickle.dumps(Calls(os.mkdir, "made"), protocol=0), "posix.mkdir"),
        (pickle.dumps(Calls(exec, "import os; os.mkdir('made')")), "builtins.exec"),
        (pickle.dumps(Calls(np.fromfile, "/dev/zero")), "fromfile"),
        (pickle.dumps({"data": np.zeros(3), "labels": [Calls(os.mkdir, "made")]}), "posix.mkdir"),
        (b"cnumpy\nload\n(Vmade\ntR.", "numpy.load"),
        # a name with dots would lead from what is allowed to anything
        (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", "numpy.ndarray.__class__"),
    ],
    ids=["mkdir", "text", "exec", "numpy", "inside", "load", "dots"],
)
def test_a_pickle_with_another_global_is_refused(tmp_path, monkeypatch, content, what):
    """Even one whose MD5 sum is that of the table."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: must hold arrays only")) as error:
        known._unpickled(path)
    assert what in str(error.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"(lp0\nI1", b"ab", b"\x80\x02}q\x00."[:4]])
def test_a_pickle_that_is_cut_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"data file .*batch: ") as error:
        known._unpickled(tmp_path / "batch")
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_among_the_reasons(tmp_path, monkeypatch):
    archive, unpacked, _ = cifar(tmp_path / "made", "cifar10", "ab")
    url = put(monkeypatch, "cifar10", tmp_path / "server", archive, unpacked)
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataUnavailableError, match="File exists|Not a directory"):
        load_known("cifar10", tmp_path / "data", url)


def idx(array):
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.tobytes())


def test_fashion_mnist_is_padded_to_32(tmp_path, monkeypatch):
    images = [RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (5, 3)]
    labels = [RNG.integers(0, 10, n, dtype=np.uint8) for n in (5, 3)]
    files = {}
    for split, x, y in zip(("train", "t10k"), images, labels, strict=True):
        files[f"{split}-images-idx3-ubyte.gz"] = idx(x)
        files[f"{split}-labels-idx1-ubyte.gz"] = idx(y)
    url = put(monkeypatch, "fashion_mnist", tmp_path / "server", files)
    x_train, y_train, x_test, y_test, classes = load_known("fashion_mnist", tmp_path / "a", url)
    assert x_train.shape == (5, 32, 32, 3)
    assert x_test.shape == (3, 32, 32, 3)
    for channel in range(3):
        assert np.array_equal(x_train[:, 2:30, 2:30, channel], images[0])
    assert x_test.sum() == 3 * images[1].sum(dtype=np.int64)  # black around them
    assert np.array_equal(y_train, labels[0])
    assert np.array_equal(y_test, labels[1])
    assert classes[0] == "T-shirt/top"
    assert classes[9] == "Ankle boot"


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn(tmp_path, monkeypatch, compressed):
    matlab = pytest.importorskip("scipy.io")
    images = [RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8) for n in (12, 3)]
    labels = [np.arange(1, n + 1, dtype=np.uint8).clip(1, 10) for n in (12, 3)]
    files = {}
    for split, x, y in zip(("train", "test"), images, labels, strict=True):
        path = tmp_path / f"{split}_32x32.mat"
        matlab.savemat(path, {"X": x, "y": y[:, None]}, do_compression=compressed)
        files[path.name] = path.read_bytes()
    url = put(monkeypatch, "svhn", tmp_path / "server", files)
    x_train, y_train, x_test, y_test, classes = load_known("svhn", tmp_path / "data", url)
    assert np.array_equal(x_train, images[0].transpose(3, 0, 1, 2))
    assert np.array_equal(x_test, images[1].transpose(3, 0, 1, 2))
    assert y_train.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]
    assert y_test.tolist() == [1, 2, 3]
    assert classes == tuple("0123456789")


def test_the_tables_are_torchvision_s():
    datasets = pytest.importorskip("torchvision.datasets")
    for name, theirs in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        (archive,) = KNOWN[name].remote
        assert archive.name == theirs.filename
        assert archive.md5 == theirs.tgz_md5
        assert theirs.url in archive.urls
        sums = {**dict(theirs.train_list + theirs.test_list)}
        sums[theirs.meta["filename"]] = theirs.meta["md5"]
        ours = {f"{theirs.base_folder}/{file}": total for file, total in sums.items()}
        assert KNOWN[name].unpacked == ours
    fashion = {file.name: file.md5 for file in KNOWN["fashion_mnist"].remote}
    assert fashion == dict(datasets.FashionMNIST.resources)
    splits = datasets.SVHN.split_list
    svhn = [(file.urls[0], file.name, file.md5) for file in KNOWN["svhn"].remote]
    assert svhn == [tuple(splits["train"]), tuple(splits["test"])]


def test_every_source_is_a_plain_address_without_an_account():
    for name, one in KNOWN.items():
        for file in one.remote:
            assert file.urls, name
            for url in file.urls:
                assert url.startswith(("https://", "http://")), url
                assert url.rpartition("/")[2] == file.name
                assert "@" not in url
                assert "?" not in url


def test_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_by_speed", lambda file, whys: [])
    for name, put_where in (
        ("cifar10", f"put cifar-10-python.tar.gz, or what is in it, into {tmp_path}, name"),
        ("svhn", f"put train_32x32.mat and test_32x32.mat into {tmp_path}, name"),
    ):
        with pytest.raises(DataUnavailableError) as error:
            ensure_known(name, tmp_path)
        assert put_where in str(error.value)
        assert "\n" not in str(error.value)


def test_a_url_of_several_files_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"data_url must end with / for svhn, which is several"):
        ensure_known("svhn", tmp_path, "http://127.0.0.1/train_32x32.mat")


def test_a_run_downloads_from_the_address_of_its_flag(tmp_path, monkeypatch):
    archive, unpacked, _ = cifar(tmp_path / "made", "cifar10", "abcdefghij")
    url = put(monkeypatch, "cifar10", tmp_path / "server", archive, unpacked)
    root, out = tmp_path / "data", tmp_path / "run"
    shared = f"--data-root {root} --data-url {url}cifar-10-python.tar.gz --device cpu"
    begin = f"--depth 8 --batch-size 10 --lr 0.01 --milestones 1 --warmup-epochs 0 --out {out}"
    for arguments in (
        f"{begin} --epochs 1",  # --dataset auto
        f"--resume {out} --epochs 2",
        f"--eval {out}/checkpoint.pt",
    ):
        shutil.rmtree(root, ignore_errors=True)
        assert main([*arguments.split(), *shared.split()]) == 0
        assert (root / "cifar-10-batches-py/test_batch").is_file()
    begun = json.loads((out / "config.json").read_text())
    assert begun["dataset"] == "cifar10"
    assert "data_url" not in begun
