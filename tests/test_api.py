"""``train()`` from Python: what it gives, how it stops, and where it runs."""

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import metrics, tensors

import cifar_resnet_fast
from cifar_resnet_fast import FastResNet, TrainConfig, train
from cifar_resnet_fast.data.datasets import load_dataset
from cifar_resnet_fast.training.run import Run, RunStopped

ROOT = Path(cifar_resnet_fast.__file__).parents[1]
TINY = TrainConfig(
    depth=8,
    dataset="shapes",
    limit=32,
    batch_size=16,
    epochs=2,
    lr=0.1,
    warmup_epochs=1.0,
    milestones=(2,),
    device="cpu",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return train(replace(TINY, out=str(tmp_path_factory.mktemp("runs") / "whole")))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(ours, theirs):
    """The same bits in all that the checkpoints hold, but for the time that it took."""
    ours, theirs = tensors(checkpoint(ours)), tensors(checkpoint(theirs))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_result(result):
    assert result.metrics == metrics(result.folder)
    assert [row["epoch"] for row in result.metrics] == [1, 2]
    assert result.accuracy == result.metrics[-1]["test_accuracy"]
    assert not result.model.training
    for key, value in checkpoint(result.folder)["state_dict"].items():
        assert torch.equal(result.model.state_dict()[key], value), key


def test_command_line_is_the_same_run(result, tmp_path):
    flags = "--depth 8 --dataset shapes --limit 32 --batch-size 16 --epochs 2 --lr 0.1".split()
    flags += ["--warmup-epochs", "1", "--milestones", "2", "--device", "cpu"]
    assert train.main([*flags, "--out", str(tmp_path / "flags")]) == 0
    assert_same_run(tmp_path / "flags", result.folder)
    ours, theirs = ((f / "config.json").read_text() for f in (tmp_path / "flags", result.folder))
    assert ours == theirs


def test_result_becomes_a_pretrained_network(result, tmp_path):
    result.model.save_pretrained(tmp_path)
    card = FastResNet.from_pretrained(tmp_path).card
    assert card["accuracy"] == result.accuracy
    assert card["class_names"] == list(load_dataset("shapes", "", 1).classes)
    assert card["dataset"] == "shapes"
    assert card["training"]["lr"] == 0.1
    assert len(card["mean"]) == len(card["std"]) == 3


def test_dataset_of_ones_own(tmp_path):
    whole = load_dataset("shapes", "", 32)
    half = replace(whole, name="half", x_train=whole.x_train[:16], y_train=whole.y_train[:16])
    made = train(replace(TINY, epochs=1, out=str(tmp_path / "half")), dataset=half)
    assert made.metrics[-1]["step"] == 1
    assert json.loads((made.folder / "config.json").read_text())["dataset"] == "half"
    again = train(TrainConfig(resume=str(made.folder), epochs=2), dataset=half)
    assert [row["step"] for row in again.metrics] == [1, 2]


# --- stopping and going on ---------------------------------------------------------------------


def test_on_epoch_sees_each_row_and_may_stop(result, tmp_path):
    seen = []

    def enough(row):
        seen.append(row)
        return row["epoch"] == 1

    stopped = train(replace(TINY, out=str(tmp_path / "stopped")), on_epoch=enough)
    assert seen == stopped.metrics
    assert len(seen) == 1
    assert stopped.accuracy == seen[0]["test_accuracy"]
    train(TrainConfig(resume=str(stopped.folder)))
    assert_same_run(stopped.folder, result.folder)


def test_on_epoch_that_raises(tmp_path):
    class PrunedError(Exception):
        pass

    def prune(row):
        raise PrunedError

    with pytest.raises(PrunedError):
        train(replace(TINY, out=str(tmp_path / "pruned")), on_epoch=prune)
    assert len(metrics(tmp_path / "pruned")) == 1


def test_interrupt_is_a_keyboard_interrupt(tmp_path, monkeypatch):
    def stopped(self, on_epoch):
        raise RunStopped("stopped after step 1")

    monkeypatch.setattr(Run, "train", stopped)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1"):
        train(replace(TINY, out=str(tmp_path / "run")))


def test_finished_run_takes_more_epochs(result, tmp_path):
    short = train(replace(TINY, epochs=1, out=str(tmp_path / "short")))
    longer = train(TrainConfig(resume=str(short.folder), epochs=2))
    assert [row["epoch"] for row in longer.metrics] == [1, 2]
    assert_same_run(longer.folder, result.folder)
    assert json.loads((short.folder / "config.json").read_text())["epochs"] == 2
    with pytest.raises(ValueError, match="epochs must be at least the resumed run's 2, got 1"):
        train(TrainConfig(resume=str(short.folder), epochs=1))


def test_resume_finds_the_data_from_any_folder(tmp_path, monkeypatch):
    import numpy as np

    data = load_dataset("shapes", "", 64)
    arrays = {name: getattr(data, name).numpy() for name in ("x_train", "y_train", "x_test")}
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", **arrays, y_test=data.y_test.numpy())
    config = replace(TINY, dataset="mine.npz", epochs=1, out=str(tmp_path / "run"))
    made = train(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(train(TrainConfig(resume=str(made.folder), epochs=2)).metrics) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": "x.pt"}, "eval must be left to the command line, got x.pt"),
        ({"resume": "a", "out": "b"}, "out must be left out with resume, got b"),
    ],
)
def test_what_only_the_command_line_does(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(replace(TINY, **changes))


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    folders = {train(replace(TINY, epochs=1)).folder for _ in range(3)}
    assert len(folders) == 3


# --- where it runs -----------------------------------------------------------------------------


def test_in_another_thread(tmp_path, result):
    made = []
    thread = threading.Thread(
        target=lambda: made.append(train(replace(TINY, out=str(tmp_path / "thread"))))
    )
    thread.start()
    thread.join()
    assert_same_run(made[0].folder, result.folder)


@pytest.mark.parametrize(
    "environment",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "module://ipykernel.pylab.backend_inline"},
        {"MPLBACKEND": "nonsense"},
        {"COLUMNS": "0"},
        {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "FORCE_COLOR": "1"},
    ],
    ids=["jupyter", "colab", "unknown-backend", "no-columns", "ascii-terminal"],
)
def test_environments(environment, tmp_path):
    flags = "--depth 8 --dataset shapes --limit 16 --batch-size 16 --epochs 1 --device cpu".split()
    done = subprocess.run(
        [sys.executable, "-m", "cifar_resnet_fast.train", *flags, "--out", tmp_path / "run"],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "run" / "curves.png").exists()


def test_notebook_has_a_progress_bar(tmp_path, monkeypatch):
    import rich.console

    from cifar_resnet_fast.training.logbook import Logbook

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    settings = {"epochs": 1, "steps_per_epoch": 1, "start_step": 0, "evaluated": "test"}
    logbook = Logbook(tmp_path, title="", tensorboard=False, **settings)
    assert not logbook._progress.disable


def example(title: str) -> str:
    """The Python of a section of docs/training.md."""
    text = (ROOT / "docs" / "training.md").read_text()
    return re.search(rf"## {title}\n\n```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_optuna_example_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    code = example("Optuna")
    tiny = {n: getattr(TINY, n) for n in ("depth", "dataset", "limit", "batch_size", "device")}
    tiny |= {"epochs": 2, "warmup_epochs": 1, "milestones": (), "validation": 8}
    shorter = re.sub(r"^SETTINGS = .*$", f"SETTINGS = {tiny}", code, flags=re.MULTILINE)
    shorter = shorter.replace("n_trials=20", "n_trials=3")
    assert shorter.count("validation") == 1, "the settings are replaced"
    monkeypatch.chdir(tmp_path)
    exec(compile(shorter, "docs/training.md", "exec"), {})
    assert "'lr':" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.parametrize("title", ["Ray Tune", "submitit"])
def test_the_other_examples_are_short_and_name_what_there_is(title):
    lines = [line for line in example(title).splitlines() if line.strip()]
    assert len(lines) <= 15
    compile("\n".join(lines), title, "exec")
    named = re.findall(r"TrainConfig\(([^)]*)\)", "\n".join(lines))
    for setting in re.findall(r"(\w+)=", " ".join(named)):
        assert hasattr(TINY, setting), setting
