"""How large a batch fits: from a network's and a picture's share, and tried out."""

import pytest
import torch

from cifar_resnet_fast.train import main
from cifar_resnet_fast.training.engine import Engine
from cifar_resnet_fast.training.memory import largest_batch


def memory(fixed, each, limit, lost=0):
    """A device that takes ``fixed`` and ``each`` bytes, and loses some more in large batches."""

    def measure(pictures):
        taken = fixed + each * pictures
        if taken + (lost if pictures > 100 else 0) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return taken

    return measure


@pytest.mark.parametrize(
    ("device", "wanted", "missing", "largest"),
    [
        ((1000, 10, 8000), 1024, 1000 + 10 * 1024 - 8000, 700),
        ((1000, 10, 1640), 1024, 1000 + 10 * 1024 - 1640, 64),  # not even two sixteenths fit
        ((1000, 10, 1010), 1024, 0, None),  # one picture, but not two
        ((1000, 10, 900), 8, 0, None),
        ((1000, 10, 8000), 701, 10, 700),
    ],
)
def test_largest_batch(device, wanted, missing, largest):
    assert largest_batch(memory(*device), wanted, device[2]) == (missing, largest)


def test_largest_batch_has_been_tried():
    measure = memory(1000, 10, 8000, lost=500)
    missing, largest = largest_batch(measure, 1024, 8000)
    assert 0.9 * 650 < largest <= 650
    measure(largest)
    assert missing == 3240


def test_host_memory_that_runs_out_is_one_line(tmp_path, monkeypatch, capsys):
    def step(engine):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(Engine, "train_step", step)
    arguments = "--dataset shapes --limit 64 --depth 8 --batch-size 16 --device cpu --out".split()
    assert main([*arguments, str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --batch-size must fit into memory, got 16: ")
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA out of memory. (originally from call(...) API call failed at ops.h)"),
    ],
    ids=["torch", "extension"],
)
def test_device_memory_that_runs_out_says_what_fits(error, tmp_path, monkeypatch, capsys):
    """A device of 300 MB, of which a picture takes 10: with the steps of a CPU."""

    def step(engine):
        raise error

    monkeypatch.setattr(Engine, "train_step", step)
    monkeypatch.setattr(Engine, "release", lambda engine: 300 * 2**20)
    measure = memory(0, 10 * 2**20, 300 * 2**20)
    monkeypatch.setattr(Engine, "step_bytes", lambda engine, pictures: measure(pictures))
    arguments = "--dataset shapes --limit 64 --depth 8 --batch-size 64 --device cpu --out".split()
    assert main([*arguments, str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "error: --batch-size must fit into the GPU's memory, got 64: about 0.3 GiB are missing; "
        "at most 30 fit\n"
    )


@pytest.mark.gpu
def test_gpu_memory_that_runs_out_says_what_fits(tmp_path, capsys):
    # 6 MiB an image, 290 GiB in all; the drawn shapes have so many images
    arguments = "--dataset shapes --depth 218 --batch-size 50000 --out".split()
    assert main([*arguments, str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --batch-size must fit into the GPU's memory, got 50000: ")
    assert "GiB are missing; at most " in shown
    assert not (tmp_path / "run").exists()
