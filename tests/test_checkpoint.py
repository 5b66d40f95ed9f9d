"""Checkpoint files: whole or not at all, whatever happens; and nothing in them runs."""

import contextlib
import pickle
import resource
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

from cifar_resnet_fast.checkpoint import read_checkpoint, save_checkpoint, write_atomically

KILLED_WHILE_WRITING = """
import io, os, signal, sys
from pathlib import Path
from cifar_resnet_fast import checkpoint

path, moment = Path(sys.argv[1]), sys.argv[2]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "half-written":
    class Half(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            die()
    checkpoint.open = lambda name, mode: Half(name, mode)
elif moment == "before-flush":
    os.fsync = die
else:
    os.replace = die
checkpoint.write_atomically(path, b"new" * 100_000)
"""


@pytest.mark.parametrize("moment", ["half-written", "before-flush", "before-rename"])
def test_sigkill_while_writing_keeps_the_old_file(tmp_path, moment):
    path = tmp_path / "checkpoint.pt"
    write_atomically(path, b"old")
    child = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, path, moment], timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2, "the temporary file shows that it was written to"
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_full_disk_keeps_the_old_file(tmp_path):
    """The kernel refuses to write past a limit, as it does on a full disk."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(path, {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_round_trip(tmp_path):
    content = {"step": 3, "config": {"lr": 0.1, "milestones": [1, 2]}, "w": torch.randn(3)}
    save_checkpoint(tmp_path / "c.pt", content)
    back = read_checkpoint(tmp_path / "c.pt")
    assert torch.equal(back.pop("w"), content.pop("w"))
    assert back == content


class RunsCode:
    def __reduce__(self):
        return (print, ("executed",))


def evil(path):
    torch.save({"state_dict": RunsCode()}, path)


def evil_legacy(path):
    path.write_bytes(pickle.dumps({"state_dict": RunsCode()}))


def truncated(path):
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


def damaged(path):
    torch.save({"a": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[60:70] = b"\xff" * 10
    path.write_bytes(data)


def bomb(path):
    torch.save({"a": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (evil, "tensors and plain values only"),
        (evil_legacy, "tensors and plain values only|cannot be read"),
        (truncated, "cannot be read|tensors and plain"),
        (damaged, "cannot be read|tensors and plain"),
        (bomb, "must be stored uncompressed.*unpack to 4"),
        (lambda path: path.write_bytes(b""), "cannot be read|tensors and plain"),
        (lambda path: path.write_text("not a checkpoint"), "cannot be read|tensors and plain"),
        (lambda path: torch.save([1, 2], path), "must hold a dictionary, got a list"),
    ],
    ids=["code", "code-legacy", "truncated", "damaged", "bomb", "empty", "text", "list"],
)
def test_untrusted_files(tmp_path, capfd, make, message):
    path = tmp_path / "untrusted.pt"
    make(path)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "executed" not in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:checkpoint .* holds no checksums")
def test_no_damage_ends_in_another_error(tmp_path):
    """A byte of a small checkpoint overwritten anywhere: it loads, or it is a ValueError."""
    path = tmp_path / "fuzzed.pt"
    for legacy in (False, True):
        content = {"w": torch.ones(2), "step": 1}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        data = path.read_bytes()
        for place in range(0, len(data), 7):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
            # any other error than a ValueError fails the test
            with contextlib.suppress(ValueError):
                assert isinstance(read_checkpoint(path), dict)


def saved_without_checksums(path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(1000)}, path)
    finally:
        torch.serialization.set_crc32_options(before)


def test_no_flipped_bit_changes_a_value(tmp_path):
    """PyTorch alone takes most of these files, with other numbers in them."""
    path, taken = tmp_path / "flipped.pt", 0
    torch.save({"a": torch.arange(1000.0)}, path)
    data = path.read_bytes()
    for place in range(0, len(data), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            content = read_checkpoint(path)
        except ValueError:
            continue
        taken += 1  # a flip in what pads the parts of the archive
        assert torch.equal(content["a"], torch.arange(1000.0)), place
    assert taken < len(data) / 37 / 4


def test_end_of_the_archive_is_damaged(tmp_path):
    path = tmp_path / "cut.pt"
    torch.save({"a": torch.ones(10)}, path)
    path.write_bytes(path.read_bytes().replace(b"PK\x05\x06", b"PK\x05\x07"))
    with pytest.raises(ValueError, match="end of its archive is missing or damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "save",
    [
        saved_without_checksums,
        lambda path: torch.save({"a": torch.ones(9)}, path, _use_new_zipfile_serialization=False),
    ],
    ids=["switched-off", "legacy"],
)
def test_files_without_checksums_are_read_and_said_to_be(tmp_path, save):
    save(tmp_path / "old.pt")
    with pytest.warns(UserWarning, match="old.pt holds no checksums") as said:
        content = read_checkpoint(tmp_path / "old.pt")
    assert content["a"].sum() == len(content["a"])
    assert len(said) == 1


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt must be a file"):
        read_checkpoint(tmp_path / "none.pt")
