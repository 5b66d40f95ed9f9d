"""Data sets: the drawn one, files, folders, CIFAR, and what happens when they are wrong."""

import dataclasses
import hashlib
import os
import pickle
import shutil
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_resnet_fast.data import datasets, known, shapes, sources
from cifar_resnet_fast.data.datasets import DataUnavailableError, find_dataset, load_dataset

# --- shapes ------------------------------------------------------------------------------------


def test_shapes_bytes_never_change():
    images, labels = shapes.draw("train", 1500)
    assert images.shape == (1500, 32, 32, 3)
    assert images.dtype == np.uint8
    digest = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    assert digest == "6faeb758b3844e9babbb7769c86201933b67dea7160b2e06d4e9fd4b957db05e"


def test_shapes_splits_are_drawn_apart():
    train, test = (shapes.draw(split, 300)[0] for split in ("train", "test"))
    assert not {picture.tobytes() for picture in train} & {picture.tobytes() for picture in test}


def test_shapes_classes_are_balanced_and_a_prefix_is_the_same():
    images, labels = shapes.draw("test", 2000)
    assert (np.bincount(labels, minlength=10) > 150).all()
    assert np.array_equal(shapes.draw("test", 7)[0], images[:7])


def test_shapes_defeat_a_linear_classifier():
    """Least squares on the pixels, on as many pictures as a short run trains on."""
    (x, y), (x_test, y_test) = shapes.draw("train", 8000), shapes.draw("test", 2000)
    features = [torch.from_numpy(a).flatten(1).double() / 255 - 0.5 for a in (x, x_test)]
    ones = torch.eye(10, dtype=torch.float64)[torch.from_numpy(y)]
    ridge = 100 * torch.eye(features[0].shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(features[0].T @ features[0] + ridge, features[0].T @ ones)
    accuracy = ((features[1] @ weight).argmax(1).numpy() == y_test).mean()
    assert accuracy < 0.6


# --- .npz --------------------------------------------------------------------------------------


def arrays(**changes):
    rng = np.random.default_rng(0)
    values = {
        "x_train": rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(20) % 4,
        "x_test": rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_loads(tmp_path, save):
    expected = arrays(classes=np.array(["a", "b", "c", "d"]))
    save(tmp_path / "mine.npz", **expected)
    dataset = load_dataset(str(tmp_path / "mine.npz"), tmp_path)
    assert dataset.name == "mine"
    assert dataset.classes == ("a", "b", "c", "d")
    assert torch.equal(dataset.x_train, torch.from_numpy(expected["x_train"]))
    assert torch.equal(dataset.y_test, torch.from_numpy(expected["y_test"]))
    assert dataset.limited(5).x_test.shape == (5, 32, 32, 3)


def test_npz_without_names_counts_classes(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    assert load_dataset(str(tmp_path / "mine.npz"), tmp_path).classes == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "must hold x_train, y_train, x_test, y_test; y_test is missing"),
        ({"x_test": np.zeros((8, 3, 32, 32), np.uint8)}, r"x_test must be \[N, 32, 32, 3\] uint8"),
        ({"x_train": np.zeros((20, 32, 32, 3))}, "x_train must be .* float64"),
        ({"x_train": np.zeros((0, 32, 32, 3), np.uint8)}, "x_train must be"),
        ({"y_train": np.zeros(19, int)}, r"y_train must be \[20\] integers, got \[19\]"),
        ({"y_train": np.zeros(20)}, "y_train must be .* float64"),
        ({"y_test": np.full(8, 9)}, r"y_test must be in 0 .. 3, got 9 .. 9"),
        ({"y_train": np.full(20, -1)}, r"y_train must be in 0 .. 1, got -1"),
        ({"classes": np.array(["only"])}, r"must be in 0 .. 0, got 0 .. 3"),
        ({"y_train": np.array([{}] * 20)}, "y_train must be .* object"),
    ],
)
def test_wrong_npz_is_named(tmp_path, changes, message):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(str(path), tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def rewritten(path, change):
    """The archive at ``path`` anew, with its members by name as ``change`` has them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(members).items():
            archive.writestr(name, data)


def test_npz_with_labels_as_keras_has_them_and_in_fortran_order(tmp_path):
    expected = arrays()
    changed = {key: a.reshape(-1, 1) for key, a in expected.items() if key.startswith("y")}
    changed |= {key: np.asfortranarray(a) for key, a in expected.items() if key.startswith("x")}
    np.savez(tmp_path / "keras.npz", **changed)
    dataset = load_dataset(str(tmp_path / "keras.npz"), tmp_path)
    for key, values in expected.items():
        assert torch.equal(getattr(dataset, key), torch.from_numpy(values)), key
    assert dataset.x_train.is_contiguous()


@pytest.mark.parametrize("label", [10**9, 2**62, 2**63 + 5])
def test_npz_with_huge_labels_is_refused_at_once(tmp_path, label):
    labels = np.full(20, label, np.uint64)
    np.savez(tmp_path / "many.npz", **arrays(y_train=labels))
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"y_train must be in 0 .. 9999, got {label}"):
        load_dataset(str(tmp_path / "many.npz"), tmp_path)
    assert time.monotonic() - began < 5


def header_that_does_not_close(members):
    data = members["x_train.npy"]
    return {**members, "x_train.npy": data.replace(b"}", b"(", 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (header_that_does_not_close, "header"),
        (lambda m: {**m, "x_train": b"twin"}, "each array once, got x_train and x_train.npy"),
    ],
    ids=["header", "twin"],
)
def test_npz_of_another_making(tmp_path, change, message):
    path = tmp_path / "made.npz"
    np.savez(path, **arrays())
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(str(path), tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("place", "value"), [(8, 99), (6, 1)], ids=["compression", "encrypted"])
def test_npz_with_an_archive_that_cannot_be_unpacked(tmp_path, place, value):
    path = tmp_path / "packed.npz"
    np.savez(path, **arrays())
    data = bytearray(path.read_bytes())
    for start, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        at = data.find(start)
        while at >= 0:
            data[at + place + shift] = value
            at = data.find(start, at + 4)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="packed.npz: ") as error:
        load_dataset(str(path), tmp_path)
    assert "\n" not in str(error.value)


def test_truncated_npz(tmp_path):
    path = tmp_path / "cut.npz"
    np.savez(path, **arrays())
    data = path.read_bytes()
    for end in (0, 10, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="cut.npz"):
            load_dataset(str(path), tmp_path)


def test_damaged_npz(tmp_path):
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, **arrays())
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged.npz"):
        load_dataset(str(path), tmp_path)


def test_npz_larger_than_memory_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez(path, **arrays())
    header = np.lib.format
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, count in (("train", 2**40), ("test", 8)):
            for key, shape, dtype in (
                (f"x_{split}", (count, 32, 32, 3), "|u1"),
                (f"y_{split}", (count,), "<i8"),
            ):
                with archive.open(f"{key}.npy", "w") as file:
                    fields = {"descr": dtype, "fortran_order": False, "shape": shape}
                    header.write_array_header_1_0(file, fields)
    with pytest.raises(ValueError, match="must fit into this machine's"):
        load_dataset(str(path), tmp_path)


# --- folders -----------------------------------------------------------------------------------


def write_folder(root, size=(32, 32)):
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                colour = (label * 100, n * 10, 7)
                Image.new("RGB", size, colour).save(root / split / name / f"{n}.png")


def test_folder_loads(tmp_path):
    write_folder(tmp_path)
    dataset = load_dataset(str(tmp_path), tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert dataset.x_train.shape == (6, 32, 32, 3)
    assert dataset.x_train[4, 0, 0].tolist() == [100, 10, 7]
    assert dataset.y_test.tolist() == [0, 0, 1, 1]


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="must hold train/<class>"):
        load_dataset(str(tmp_path), tmp_path)
    write_folder(tmp_path / "small", size=(28, 28))
    with pytest.raises(ValueError, match=r"0.png: must be 32x32 pixels, got 28x28"):
        load_dataset(str(tmp_path / "small"), tmp_path)
    write_folder(tmp_path / "broken")
    (tmp_path / "broken/test/dog/1.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    with pytest.raises(ValueError, match=r"test/dog/1.png"):
        load_dataset(str(tmp_path / "broken"), tmp_path)
    write_folder(tmp_path / "more")
    (tmp_path / "more/train/emu").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "more/train/emu/0.png")
    with pytest.raises(ValueError, match="same classes, differ in emu"):
        load_dataset(str(tmp_path / "more"), tmp_path)


def test_hidden_entries_are_neither_classes_nor_pictures(tmp_path):
    write_folder(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / split / ".ipynb_checkpoints/1.png")
        (tmp_path / split / "cat/.ipynb_checkpoints").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / split / "cat/.ipynb_checkpoints/1.png")
        (tmp_path / split / ".DS_Store").write_bytes(b"x")
        (tmp_path / split / "cat/.DS_Store").write_bytes(b"x")
        (tmp_path / split / "cat/._1.png").write_bytes(b"x")
    dataset = load_dataset(str(tmp_path), tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.x_train) == 6


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(tmp_path, mode):
    """Their pixels would be clipped: white or black pictures."""
    write_folder(tmp_path)
    path = tmp_path / "train/dog/deep.tif"
    Image.fromarray(np.full((32, 32), 3000, np.float32)).convert("F").convert(
        mode if mode != "I;16" else "I"
    ).convert(mode).save(path)
    with pytest.raises(ValueError, match=rf"deep.tif: must have 8 bits a channel .*{mode}$"):
        load_dataset(str(tmp_path), tmp_path)


def test_links_are_not_followed_without_end(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/cat/loop").symlink_to(tmp_path / "train/cat")
    assert len(load_dataset(str(tmp_path), tmp_path).x_train) == 6


def test_a_fifo_is_no_picture(tmp_path):
    write_folder(tmp_path)
    os.mkfifo(tmp_path / "train/cat/9.png")
    with pytest.raises(ValueError, match=r"cat/9.png: must be a file"):
        load_dataset(str(tmp_path), tmp_path)


# --- CIFAR and auto ------------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(ValueError, match="dataset must be one of auto, cifar10.*got 'cifar11'"):
        load_dataset("cifar11", ".")
    with pytest.raises(FileNotFoundError, match=r"dataset none.npz must be a file"):
        load_dataset("none.npz", ".")


@pytest.fixture
def no_network(monkeypatch):
    """Looking up any name fails at once, as it does without a network."""
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def fail(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_data_names_both_ways_out(tmp_path, name, no_network):
    with pytest.raises(DataUnavailableError) as error:
        load_dataset(name, tmp_path)
    message = str(error.value)
    assert "cannot be downloaded" in message
    assert "Name or service not known" in message
    assert f"put {name.replace('cifar', 'cifar-')}" in message
    assert ".npz file" in message
    assert "\n" not in message


def test_auto_falls_to_shapes_at_once_and_says_why(tmp_path, no_network):
    began = time.monotonic()
    name, reason = find_dataset("auto", tmp_path)
    assert time.monotonic() - began < 2
    assert name == "shapes"
    assert "cannot be downloaded" in reason
    assert find_dataset("shapes", tmp_path) == ("shapes", None)


def test_a_silent_network_costs_seconds(tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(sources, "_PROBE_SECONDS", 0.2)

    def hang(*args, **kwargs):
        time.sleep(2)
        raise OSError("too late")

    monkeypatch.setattr("socket.getaddrinfo", hang)
    began = time.monotonic()
    assert "no answer" in find_dataset("auto", tmp_path)[1]
    assert time.monotonic() - began < 1.5


def test_damaged_cifar_is_not_parsed(tmp_path, no_network):
    """A pickle with a wrong MD5 sum is never opened."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"cos\nabort\n(tR.")  # would end the process if unpickled
    with pytest.raises(
        DataUnavailableError, match="not .whole. in .*data_batch_1 is damaged, and"
    ):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("archived", [False, True], ids=["unpacked", "archive"])
def test_cifar_layout(tmp_path, monkeypatch, no_network, archived):
    """The authors' files, in miniature, with their MD5 sums written into the table."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sums, names = {}, [f"class {n}" for n in range(10)]
    for member in known.KNOWN["cifar10"].unpacked:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": [3, 1, 0, 9]}
        if member.endswith("meta"):
            content = {"label_names": names}
        (tmp_path / member).write_bytes(pickle.dumps(content))
        sums[member] = hashlib.md5((tmp_path / member).read_bytes()).hexdigest()
    (archive,) = known.KNOWN["cifar10"].remote
    if archived:
        with tarfile.open(tmp_path / archive.name, "w:gz") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)
        packed = (tmp_path / archive.name).read_bytes()
        archive = dataclasses.replace(archive, md5=hashlib.md5(packed).hexdigest())
    small = dataclasses.replace(known.KNOWN["cifar10"], remote=(archive,), unpacked=sums)
    monkeypatch.setitem(known.KNOWN, "cifar10", small)
    assert find_dataset("auto", tmp_path) == ("cifar10", None)
    dataset = load_dataset("cifar10", tmp_path)
    assert dataset.x_train.shape == (20, 32, 32, 3)
    assert dataset.x_train.dtype == torch.uint8
    assert dataset.y_test.tolist() == [3, 1, 0, 9]
    assert dataset.y_test.dtype == torch.int64
    assert dataset.classes == tuple(names)


def test_auto_does_not_wait_for_a_slow_download(tmp_path, monkeypatch):
    """It stops at five minutes; a data set that is named, and an address that is, do not."""
    asked = []

    def ensure(name, root, url=None, patience=None):
        asked.append((name, url, patience))

    monkeypatch.setattr(datasets, "ensure_known", ensure)
    assert find_dataset("auto", tmp_path) == ("cifar10", None)
    assert find_dataset("auto", tmp_path, "http://host/file") == ("cifar10", None)
    assert find_dataset("cifar10", tmp_path) == ("cifar10", None)
    assert asked == [("cifar10", None, 300.0)]


def test_an_address_needs_a_data_set_that_is_downloaded(tmp_path):
    with pytest.raises(ValueError, match="data_url must be left out with dataset shapes, which"):
        load_dataset("shapes", tmp_path, data_url="http://host/file")
    with pytest.raises(ValueError, match="data_url must begin with http://, https:// or file://"):
        load_dataset("cifar10", tmp_path, data_url="cifar-10-python.tar.gz")


# --- splits and statistics ---------------------------------------------------------------------


def test_validation_holds_out_training_pictures(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    whole = load_dataset(str(tmp_path / "mine.npz"), tmp_path)
    split = whole.with_validation(5)
    assert len(split.x_train) == 15
    assert len(split.x_test) == 5
    both = {x.numpy().tobytes() for x in split.x_train} | {
        x.numpy().tobytes() for x in split.x_test
    }
    assert both == {x.numpy().tobytes() for x in whole.x_train}
    assert torch.equal(split.x_test, whole.with_validation(5).x_test)
    with pytest.raises(ValueError, match="validation must be smaller than the 20"):
        whole.with_validation(20)


def test_channel_statistics(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    dataset = load_dataset(str(tmp_path / "mine.npz"), tmp_path)
    mean, std = dataset.channel_statistics()
    pixels = dataset.x_train.double().reshape(-1, 3) / 255
    torch.testing.assert_close(mean.double(), pixels.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(std.double(), pixels.std(0, correction=0), rtol=1e-6, atol=0)
