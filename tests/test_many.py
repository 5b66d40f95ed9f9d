"""Several runs at once: each with the bits of its run alone; sweeps, failures, stops, memory."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rehearsal import Rehearsal
from test_train import STEPS, TINY, checkpoint, metrics, run, tensors

from cifar_resnet_fast import TrainConfig, train
from cifar_resnet_fast.train import main
from cifar_resnet_fast.training import many
from cifar_resnet_fast.training.engine import EngineGroup
from cifar_resnet_fast.training.memory import BatchTooLargeError, networks_that_fit

CONFIG = TrainConfig(
    depth=8,
    dataset="shapes",
    limit=64,
    batch_size=16,
    epochs=3,
    lr=0.1,
    warmup_epochs=1.0,
    milestones=(2,),
    device="cpu",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of the runs of four seeds, each trained alone."""
    folder = tmp_path_factory.mktemp("alone")
    return {seed: run("--seed", seed, out=folder / str(seed)) for seed in range(4)}


def assert_same_run(ours, theirs):
    """The same checkpoint, rows and config but for what tells the time."""
    expected, got = tensors(checkpoint(theirs)), tensors(checkpoint(ours))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    timeless = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in rows
        ]
        for rows in (metrics(ours), metrics(theirs))
    ]
    assert timeless[0] == timeless[1]
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()


def captured(monkeypatch):
    rehearsal = Rehearsal()
    monkeypatch.setattr(many, "capture_for", lambda device: rehearsal)
    return rehearsal


@pytest.mark.parametrize("form", ["in turn", "captured"])
def test_at_once_has_the_bits_of_alone(form, alone, tmp_path, monkeypatch, capsys):
    rehearsal = captured(monkeypatch) if form == "captured" else None
    out = run("--runs", 4, "--at-once", 4, out=tmp_path / "runs")
    for seed, folder in alone.items():
        assert_same_run(out / f"seed-{seed}", folder)
        assert (out / f"seed-{seed}" / "curves.png").exists()
    if rehearsal is not None:
        assert rehearsal.branches == [4]
        evaluations = 4 * 3 * 4
        assert rehearsal.replays == 3 * STEPS + evaluations, "one launch a step"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracies"] == [metrics(f)[-1]["test_accuracy"] for f in alone.values()]
    shown = capsys.readouterr().out
    assert "seed-3: epoch 3/3" in shown
    assert "4 runs of ResNet-8: accuracy" in shown


def test_kill_and_resume(alone, tmp_path, monkeypatch):
    """Killed between the checkpoints of the first epoch, when some have one and some have not."""
    out = tmp_path / "runs"
    code = """
import os, signal, sys
import cifar_resnet_fast.training.run as run
from cifar_resnet_fast.train import main
save, saved = run.Run._save, []
def killing(self):
    save(self)
    saved.append(self)
    if len(saved) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
run.Run._save, run._SAVE_EVERY_SECONDS = killing, 0.0
main(sys.argv[1:])
"""
    arguments = [*TINY, "--runs", "4", "--at-once", "4", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code, *arguments], env=environment)
    assert killed.returncode == -signal.SIGKILL
    steps = [checkpoint(out / f"seed-{seed}")["step"] for seed in range(4)]
    assert steps == [2 * STEPS, 2 * STEPS, STEPS, STEPS]
    rehearsal = captured(monkeypatch)
    assert main(["--resume", str(out)]) == 0
    assert rehearsal.branches == [4, 2], "two end an epoch before the others"
    for seed, folder in alone.items():
        assert_same_run(out / f"seed-{seed}", folder)


def test_more_runs_than_at_once(alone, tmp_path):
    out = run("--runs", 3, "--at-once", 2, "--seed", 1, out=tmp_path / "runs")
    for seed in (1, 2, 3):
        assert_same_run(out / f"seed-{seed}", alone[seed])


def test_stop_saves_all(alone, tmp_path, monkeypatch, capsys):
    out, step, taken = tmp_path / "runs", EngineGroup.train_step, []

    def stopping(group):
        taken.append(None)
        if len(taken) == STEPS + 2:
            os.kill(os.getpid(), signal.SIGINT)
        step(group)

    with monkeypatch.context() as patch:
        patch.setattr(EngineGroup, "train_step", stopping)
        assert main([*TINY, "--runs", "2", "--at-once", "2", "--out", str(out)]) == 130
    said = "stopped 2 of 2 networks, each with its checkpoint; to continue: --resume"
    assert f"{said} {out}" in capsys.readouterr().err
    assert [checkpoint(out / f"seed-{seed}")["step"] for seed in (0, 1)] == [STEPS + 2] * 2
    # one alone, the other one with the group
    assert main(["--resume", str(out / "seed-1")]) == 0
    assert main(["--resume", str(out)]) == 0
    for seed in (0, 1):
        assert_same_run(out / f"seed-{seed}", alone[seed])


def test_a_network_that_is_not_finite_stops_alone(alone, tmp_path, monkeypatch, capsys):
    rehearsal = captured(monkeypatch)
    out, step, broken = tmp_path / "runs", EngineGroup.train_step, []

    def breaking(group):
        last = group._engines[-1]
        if not broken and last.done == STEPS + 1:
            broken.append(last.optimizer.parameters.fill_(math.nan))
        step(group)

    monkeypatch.setattr(EngineGroup, "train_step", breaking)
    arguments = [*TINY, "--runs", "3", "--at-once", "3", "--out", str(out)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out / 'seed-2'}: the loss is nan at step {STEPS + 2}")
    assert error.count("\n") == 1
    assert rehearsal.branches == [3, 2]
    for seed in (0, 1):
        assert_same_run(out / f"seed-{seed}", alone[seed])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seeds"] == [0, 1]
    assert summary["failed_seeds"] == [2]


# --- sweeps ------------------------------------------------------------------------------------


def test_sweep(tmp_path, capsys):
    sweep = ["--sweep", "lr=0.05,0.1", "weight-decay=0,1e-4", "--runs", 2, "--epochs", 1]
    sweep += ["--milestones"]
    out = run(*sweep, "--at-once", 4, out=tmp_path / "sweep")
    names = {path.name for path in out.iterdir() if path.is_dir()}
    assert names == {
        f"lr={lr}_weight-decay={decay}_seed-{seed}"
        for lr in ("0.05", "0.1")
        for decay in ("0", "1e-4")
        for seed in (0, 1)
    }
    rows = json.loads((out / "summary.json").read_text())["settings"]
    assert [row["setting"] for row in rows] == [
        f"lr={lr}_weight-decay={decay}" for lr in ("0.05", "0.1") for decay in ("0", "1e-4")
    ]
    for row in rows:
        finals = [
            metrics(out / f"{row['setting']}_seed-{seed}")[-1]["test_accuracy"] for seed in (0, 1)
        ]
        assert row["accuracies"] == finals
        assert row["mean"] == pytest.approx(sum(finals) / 2)
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"  lr=0.05_weight-decay=0     {100 * rows[0]['mean']:.2f} % +- " in shown
    single = ("--lr", 0.05, "--weight-decay", 0, "--seed", 1, "--epochs", 1, "--milestones")
    assert_same_run(out / "lr=0.05_weight-decay=0_seed-1", run(*single, out=tmp_path / "alone"))
    assert main(["--resume", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["settings"] == rows


SWEEPS = {
    "a setting of the data": (["depth=8,14"], "sweep must have name=value,value with names of lr"),
    "no value": (["lr"], "sweep must have values for lr, got ''"),
    "no number": (["lr=fast"], "sweep must have values for lr, got 'fast'"),
    "no truth": (["nesterov=1"], "sweep must have values for nesterov, got '1'"),
    "a rule": (["lr=1,-1"], "sweep: lr must be more than 0, got -1.0"),
    "a value twice": (["lr=1,1.0"], "sweep must have each name and value once, got 'lr=1,1.0'"),
    "a name twice": (["lr=1", "lr=2"], "sweep must have each name and value once, got 'lr=2'"),
    "too many": (
        [f"{name}={','.join(map(str, range(1, 41)))}" for name in ("lr", "loss-scale")],
        "sweep must have at most 1000 combinations, got 1600",
    ),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_bad_sweep(name, tmp_path, capsys):
    sweep, message = SWEEPS[name]
    with pytest.raises(SystemExit) as ended:
        main([*TINY, "--out", str(tmp_path / "x"), "--sweep", *sweep])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --{message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


# --- bad input ---------------------------------------------------------------------------------

BAD = {
    "one run": (["--at-once", "2"], "must be left out without --runs or --sweep, got 2"),
    "too many": (
        ["--runs", "2", "--at-once", "3"],
        "must be at most the number of runs, 2, got '3'",
    ),
    "none": (["--runs", "2", "--at-once", "0"], "must be auto or a number of at least 1, got '0'"),
    "a word": (["--runs", "2", "--at-once", "all"], "must be auto or a number of at least 1"),
    "a trace": (["--runs", "2", "--at-once", "2", "--profile"], "must be left out with --profile"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_at_once(name, tmp_path, capsys):
    arguments, message = BAD[name]
    with pytest.raises(SystemExit) as ended:
        main([*TINY, "--out", str(tmp_path / "x"), *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --at-once {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_several_processes_have_no_networks_at_once():
    with pytest.raises(ValueError, match="at_once must be left out with 2 processes, not one"):
        replace(CONFIG, runs=2, at_once="2").check_at_once(2, processes=2)


# --- from Python -------------------------------------------------------------------------------


def test_a_list_of_configs(alone, tmp_path):
    configs = [replace(CONFIG, seed=s, out=str(tmp_path / str(s))) for s in (0, 1)]
    configs.append(replace(CONFIG, cutout=8, ema=0.9, out=str(tmp_path / "other")))
    results = train(configs, at_once=3)
    for seed in (0, 1):
        assert_same_run(results[seed].folder, alone[seed])
        assert results[seed].failure is None
        assert results[seed].accuracy == metrics(alone[seed])[-1]["test_accuracy"]
    other = train(replace(configs[2], out=str(tmp_path / "again")))
    assert_same_run(other.folder, results[2].folder)
    again = train([TrainConfig(resume=str(r.folder)) for r in results], at_once="auto")
    assert [r.accuracy for r in again] == [r.accuracy for r in results]


def test_runs_from_python(alone, tmp_path):
    results = train(replace(CONFIG, runs=2, out=str(tmp_path / "runs")), at_once=2)
    assert [r.folder.name for r in results] == ["seed-0", "seed-1"]
    for seed, result in enumerate(results):
        assert_same_run(result.folder, alone[seed])
    assert (tmp_path / "runs" / "summary.json").exists()


def test_bad_lists(tmp_path):
    def bad(message, configs, **settings):
        with pytest.raises(ValueError, match=f"^{message}"):
            train(configs, **settings)
        assert not list(tmp_path.iterdir()), "nothing is left behind"

    two = [replace(CONFIG, seed=s, out=str(tmp_path / str(s))) for s in (0, 1)]
    bad("config must be at least one config, got an empty list", [])
    bad("config must be of one run each in a list, got 2 runs", [replace(two[0], runs=2)])
    bad("at_once must be at most the number of runs, 2, got '3'", two, at_once=3)
    bad("on_epoch must be left out with several runs", two, on_epoch=print)
    unlike = [two[0], replace(two[1], batch_size=8)]
    bad("batch_size must be the same in all configs of a list, got 16 and 8", unlike)
    bad("at_once must be left out without --runs or --sweep, got 2", two[0], at_once=2)


# --- memory ------------------------------------------------------------------------------------


def test_networks_that_fit():
    # 0.9 of 1000 is usable; each takes 100 and 40, and an evaluation 40 beside them
    assert networks_that_fit(100, 40, 1000) == (900 + 100 - 40) // 140 == 6
    assert networks_that_fit(100, 40, 0) == 0


class _Card:
    """A device of CUDA's type with so much memory, for the plan alone."""

    def __init__(self, available):
        self.processes = self.device = self
        self.type = "cuda"
        self.data = self.training = self.engine = self.config = self
        self.part_size = self.batch_size = 16
        self.count, self._available = 1, available

    def planned_bytes(self, pictures):
        return 100, 40, self._available


def test_the_plan_says_what_fits(capsys):
    assert many.number_at_once("auto", _Card(1000), 8) == 6
    assert "6 of 8 networks at once; 6 fit into the GPU's memory" in capsys.readouterr().out
    assert many.number_at_once("auto", _Card(1000), 4) == 4
    assert many.number_at_once("auto", _Card(0), 4) == 1
    message = "at_once must be at most 6, as many networks as fit into the GPU's memory, got 7"
    with pytest.raises(ValueError, match=f"^{message}$"):
        many.number_at_once("7", _Card(1000), 8)


class _SmallCard(_Card):
    """One that has memory for so many images, and for none while the step is planned."""

    def planned_bytes(self, pictures):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def release(self):
        return self._available

    def step_bytes(self, pictures):
        if 10 * pictures > self._available:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 10 * pictures


def test_a_network_that_does_not_fit_alone_is_one_line():
    message = "^batch_size must fit into the GPU's memory, got 16: about .*; at most 10 fit$"
    with pytest.raises(BatchTooLargeError, match=message):
        many.number_at_once("auto", _SmallCard(100), 8)


def test_auto_on_a_cpu_is_one(tmp_path, capsys):
    run("--runs", 2, "--at-once", "auto", "--epochs", 1, "--milestones", out=tmp_path / "runs")
    assert "one network at a time: on a CPU" in capsys.readouterr().out


def test_memory_that_runs_out_all_the_same_is_one_line(tmp_path, monkeypatch, capsys):
    def step(group):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(EngineGroup, "train_step", step)
    out = tmp_path / "runs"
    assert main([*TINY, "--runs", "2", "--at-once", "2", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error == "error: --at-once must be less than 2, which do not fit: CUDA out of memory.\n"


def test_one_data_set_in_memory(tmp_path, monkeypatch):
    seen = []
    step = EngineGroup.train_step

    def looking(group):
        seen.append({e._training._images.data_ptr() for e in group._engines})
        assert len({e._training._draws.data_ptr() for e in group._engines}) == 2
        step(group)

    monkeypatch.setattr(EngineGroup, "train_step", looking)
    run("--runs", 2, "--at-once", 2, "--epochs", 1, "--milestones", out=tmp_path / "runs")
    assert all(len(places) == 1 for places in seen)
