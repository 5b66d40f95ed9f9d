"""--eval: scores by class, calibration, files, and what images are normalised with."""

import csv

import pytest
import torch
from test_train import bad_input

from cifar_resnet_fast import FastResNet
from cifar_resnet_fast.data.datasets import load_dataset
from cifar_resnet_fast.train import main
from cifar_resnet_fast.training.evaluate import Scores


@pytest.fixture
def published(tmp_path):
    """A file without mean and std."""
    torch.manual_seed(0)
    model = FastResNet(8)
    model(torch.randn(16, 3, 32, 32))
    torch.save(model.state_dict(), tmp_path / "net.th")
    return str(tmp_path / "net.th")


def shown(capsys, *arguments):
    assert main([*map(str, arguments), "--dataset", "shapes", "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_scores():
    logits = torch.tensor([[4.0, 0, 0], [0, 4, 0], [4, 0, 0], [0, 0, 4]])
    scores = Scores.of(logits, torch.tensor([0, 1, 1, 0]))
    assert (scores.top1, scores.top5) == (0.5, 1.0)
    assert scores.confusion.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert scores.by_class() == [0.5, 0.5, None]
    confidence = torch.softmax(logits.double(), 1).max().item()
    assert scores.calibration_error == pytest.approx(confidence - 0.5)


def test_files_and_lines(published, tmp_path, capsys):
    files = ["--predictions", tmp_path / "p.csv", "--confusion", tmp_path / "c.png"]
    out = shown(capsys, "--eval", published, "--limit", 50, "--batch-size", 16, *files)
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    data = load_dataset("shapes", "", 50)
    assert [row["label"] for row in rows] == [data.classes[y] for y in data.y_test.tolist()]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert f"test accuracy {100 * right / 50:.2f} %" in out
    assert "top-5 accuracy" in out
    assert "expected calibration error" in out
    assert all(f"  {name}: " in out for name in data.classes)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_limit_does_not_change_the_statistics(published, capsys):
    """The mean and std are those of all training images, as they are without --limit."""
    mean, std = load_dataset("shapes", "").channel_statistics()
    flags = [f"--mean={','.join(map(str, mean.tolist()))}"]
    flags += [f"--std={','.join(map(str, std.tolist()))}"]
    ours = shown(capsys, "--eval", published, "--limit", 20)
    assert ours == shown(capsys, "--eval", published, "--limit", 20, *flags)
    assert ours != shown(capsys, "--eval", published, "--limit", 20, "--mean=0,0,0", "--std=1,1,1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 0.1", "--lr must be left out with --eval, got 0.1"),
        ("--validation 5", "--validation must be left out with --eval, got 5"),
        ("--mean 0,0,0", "--std must be given, as the other one of mean and std is"),
        ("--mean 0,0 --std 1,1,1", "--mean must be three numbers, with commas between them, got"),
        ("--mean 0,0,0 --std 1,0,1", "--std must be three numbers more than 0, with commas"),
    ],
)
def test_bad_input(flags, message, published, capsys):
    arguments = ["--eval", published, "--dataset", "shapes", "--limit", "16", *flags.split()]
    assert message in bad_input(arguments, capsys)
