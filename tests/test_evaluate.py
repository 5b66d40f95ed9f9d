"""--eval: scores by class, calibration, files, and what images are normalised with."""

import csv

import numpy as np
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
        ("--mean 0,0,0", "--std must be given, because the other one of mean and std is"),
        ("--mean 0,0 --std 1,1,1", "--mean must be three numbers, with commas between them, got"),
        ("--mean 0,0,0 --std 1,0,1", "--std must be three numbers more than 0, with commas"),
    ],
)
def test_bad_input(flags, message, published, capsys):
    arguments = ["--eval", published, "--dataset", "shapes", "--limit", "16", *flags.split()]
    assert message in bad_input(arguments, capsys)


# --- test sets without training images ----------------------------------------------------------

STATISTICS = ["--mean=0.5,0.5,0.5", "--std=0.2,0.2,0.2"]


@pytest.fixture
def corrupted(tmp_path):
    """A folder like CIFAR-10-C's, with a set like CIFAR-10.1 and a .npz file beside."""
    data = load_dataset("shapes", "", 20)
    images, labels = data.x_test.numpy(), data.y_test.numpy()
    folder = tmp_path / "corrupted"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels.astype(np.uint8), 5))
    dark = [images // divisor for divisor in (1, 2, 4, 8, 16)]
    np.save(folder / "dark.npy", np.concatenate(dark))
    np.save(folder / "plain.npy", np.tile(images, (5, 1, 1, 1)))
    np.save(folder / "new_v6_data.npy", images[:7])
    np.save(folder / "new_v6_labels.npy", labels[:7])
    np.savez(folder / "alone.npz", x_test=images, y_test=labels)
    return folder


def rows_of(out):
    """The table's cells, by the name of the test set."""
    lines = [line.split() for line in out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:2] == ["test", "set"])
    assert lines[start][2:] == "images top-1 top-5 ECE mirror 1 2 3 4 5".split()
    return {line[0]: line[1:] for line in lines[start + 1 :]}


def evaluated(capsys, *arguments):
    assert main([*map(str, arguments), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_a_folder_of_test_sets(published, corrupted, tmp_path, capsys):
    given = ["--eval", published, *STATISTICS, "--tta", "flip"]
    rows = rows_of(evaluated(capsys, *given, "--dataset", corrupted))
    assert list(rows) == ["dark", "new_v6", "plain", "alone", "mean"]
    assert [rows[name][0] for name in ("dark", "new_v6", "alone")] == ["100", "7", "20"]
    # each severity is what --eval finds for its images alone
    for severity, name in enumerate(["dark", "dark", "dark", "dark", "dark", "plain"]):
        part = slice(20 * (severity % 5), 20 * (severity % 5) + 20)
        images = np.load(corrupted / f"{name}.npy")[part]
        labels = np.load(corrupted / "labels.npy")[part]
        np.savez(tmp_path / "part.npz", x_test=images, y_test=labels)
        out = evaluated(capsys, *given, "--dataset", tmp_path / "part.npz")
        assert f"test accuracy {rows[name][5 + severity % 5]} %" in out
        if name == "plain":
            assert rows["plain"][1:] == [*rows["alone"][1:5], *[rows["alone"][1]] * 5]
            assert f"({rows['plain'][4]} % with mirror images)" in out
    assert rows["new_v6"][5:] == rows["alone"][5:] == ["-"] * 5
    top1 = [float(rows[name][1]) for name in ("dark", "new_v6", "plain", "alone")]
    assert float(rows["mean"][0]) == pytest.approx(sum(top1) / 4, abs=0.01)


def test_limit_takes_as_many_images_of_each_severity(published, corrupted, capsys):
    given = ["--eval", published, *STATISTICS, "--dataset", corrupted]
    whole = rows_of(evaluated(capsys, *given))
    assert rows_of(evaluated(capsys, *given, "--limit", 20)) == whole
    images, labels = np.load(corrupted / "dark.npy"), np.load(corrupted / "labels.npy")
    few = rows_of(evaluated(capsys, *given, "--limit", 4))
    for name in ("dark", "plain"):
        (corrupted / f"{name}.npy").unlink()
    np.save(corrupted / "dark.npy", np.concatenate(images.reshape(5, 20, 32, 32, 3)[:, :4]))
    np.save(corrupted / "labels.npy", labels.reshape(5, 20)[:, :4].flatten())
    assert rows_of(evaluated(capsys, *given))["dark"] == few["dark"]


def test_the_network_runs_once(published, capsys, monkeypatch):
    calls = []
    forward = FastResNet.forward
    monkeypatch.setattr(
        FastResNet, "forward", lambda model, x: calls.append(len(x)) or forward(model, x)
    )
    shown(capsys, "--eval", published, "--limit", 50, "--batch-size", 25, *STATISTICS)
    assert calls == [25, 25]


def broken_sets(folder, change):
    if change == "no-labels":
        (folder / "labels.npy").unlink()
    elif change == "other-shape":
        np.save(folder / "dark.npy", np.zeros((4, 3, 32, 32), np.uint8))
    elif change == "fewer-labels":
        np.save(folder / "labels.npy", np.zeros(3, int))
    elif change == "other-labels":
        np.save(folder / "labels.npy", np.full(100, 10))
    elif change == "cut":
        path = folder / "dark.npy"
        path.write_bytes(path.read_bytes()[:-5])
    elif change == "pickle":
        np.save(folder / "dark.npy", np.array([{}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ("", [], "--mean must be given with --std, as"),
        ("", [*STATISTICS, "--predictions", "p.csv"], "--predictions must be left out with a fol"),
        ("", [*STATISTICS, "--width", "2"], "--width must be left out with --eval, got 2"),
        ("no-labels", STATISTICS, "dark.npy must have dark_labels.npy or labels.npy beside it"),
        ("other-shape", STATISTICS, "dark.npy must be [N, 32, 32, 3] uint8, got [4, 3, 32, 32]"),
        ("fewer-labels", STATISTICS, "labels.npy must be [100] integers, got [3] int64"),
        ("other-labels", STATISTICS, "labels.npy must be in 0 .. 9, got 10 .. 10"),
        ("cut", STATISTICS, "dark.npy must be a whole .npy file"),
        ("pickle", STATISTICS, "dark.npy must be a whole .npy file"),
    ],
)
def test_bad_test_sets(change, flags, message, published, corrupted, capsys):
    broken_sets(corrupted, change)
    given = ["--eval", published, "--dataset", corrupted, "--device", "cpu", *flags]
    assert message in bad_input(given, capsys)


def test_option_b_is_refused_by_cuda_in_one_line(tmp_path, capsys):
    FastResNet(8, shortcut="B").save_pretrained(tmp_path)
    given = ["--eval", tmp_path, "--dataset", "shapes", "--implementation", "cuda"]
    assert "--shortcut must be A with implementation cuda, got 'B'" in bad_input(given, capsys)
