"""The command line: what a run writes, exact resume, bad input, evaluation."""

import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields

import numpy
import pytest
import torch
from rehearsal import Rehearsal

from cifar_resnet_fast import FastResNet, export, load_checkpoint
from cifar_resnet_fast.train import main
from cifar_resnet_fast.training.config import GROUPS, TrainConfig, parse_flags
from cifar_resnet_fast.training.engine import Engine
from cifar_resnet_fast.training.recipes import RECIPES

# ResNet-8 on 64 drawn images: 4 steps an epoch, well under a second
TINY = (
    "--dataset shapes --limit 64 --depth 8 --batch-size 16 --epochs 3 --lr 0.1 --warmup-epochs 1 "
    "--milestones 2 --device cpu"
).split()
STEPS = 4


def run(*arguments, out):
    assert main([*TINY, *map(str, arguments), "--out", str(out)]) == 0
    return out


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def tensors(value, name=""):
    """All tensors in a nest of dictionaries and lists, by their place."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {}
    found = {}
    for key, item in value.items():
        found |= tensors(item, f"{name}.{key}")
    return found


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(out=tmp_path_factory.mktemp("runs") / "finished")


# --- what a run leaves -------------------------------------------------------------------------


def test_run_folder(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "metrics.jsonl",
    ]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((finished / "config.json").read_text())
    assert config["depth"] == 8
    assert config["dataset"] == "shapes"
    assert config["dtype"] == "fp32", "auto is written down as what it stood for"
    rows = metrics(finished)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.1, 0.01])
    for row in rows:
        assert 0 <= row["train_accuracy"] <= 1
        assert row["train_loss"] > 0
        assert row["images_per_second"] > 0


def commands_in(shown):
    """What the end of a training proposes, by its purpose."""
    lines = shown[shown.index("what you can do next:") :].splitlines()[1:]
    return {p.strip(): command.strip() for p, command in (line.split(":", 1) for line in lines)}


def test_what_a_run_proposes_at_its_end_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--data-root", "images of mine", out="a run")
    shown = capsys.readouterr().out
    assert "\ncurves: a run/curves.png\ncheckpoint: a run/checkpoint.pt\n" in shown
    commands = commands_in(shown)
    assert list(commands) == ["accuracy by class", "train on", "to ONNX"]
    words = {purpose: shlex.split(command) for purpose, command in commands.items()}
    assert all(w[:2] == [sys.executable, "-m"] for w in words.values())
    assert [w[2] for w in words.values()] == [
        "cifar_resnet_fast.train",
        "cifar_resnet_fast.train",
        "cifar_resnet_fast.export",
    ]
    rows = metrics(tmp_path / "a run")
    assert words["accuracy by class"][5:7] == ["--data-root", "images of mine"]
    assert main(words["accuracy by class"][3:]) == 0
    assert f"test accuracy {100 * rows[-1]['test_accuracy']:.2f} %" in capsys.readouterr().out
    assert export.main(words["to ONNX"][3:]) == 0
    assert (tmp_path / "checkpoint.onnx").is_file()
    assert main(words["train on"][3:]) == 0
    assert len(metrics(tmp_path / "a run")) == 6


def test_a_run_that_cannot_be_lengthened_does_not_propose_it(tmp_path, capsys):
    out = run("--schedule", "cosine", out=tmp_path / "run")
    commands = commands_in(capsys.readouterr().out)
    assert list(commands) == ["accuracy by class", "use in Python", "to ONNX"]
    namespace = {"FastResNet": FastResNet}
    assert eval(commands["use in Python"], namespace).depth == 8
    assert str(out) in commands["use in Python"]


def steps_of_trace(folder):
    """The names of the steps in a trace, in the order of their times."""
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = {e["name"]: e["ts"] for e in events if str(e.get("name")).startswith("step ")}
    return sorted(steps, key=steps.get)


def test_profile_leaves_a_trace_of_five_steps_and_the_same_bits(finished, tmp_path, capsys):
    out = run("--profile", out=tmp_path / "run")
    assert f"a trace of 5 steps is in {out / 'trace.json'}" in capsys.readouterr().out
    assert steps_of_trace(out) == [f"step {i} of 5" for i in range(1, 6)]
    content = json.loads((out / "trace.json").read_text())
    assert any("conv" in str(event.get("name")) for event in content["traceEvents"])
    expected, got = tensors(checkpoint(finished)), tensors(checkpoint(out))
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert "profile" not in json.loads((out / "config.json").read_text())


def test_profile_of_a_short_run(tmp_path, capsys):
    out = run("--profile", "--epochs", 2, out=tmp_path / "eight")  # 8 steps, of which 3 are left
    assert steps_of_trace(out) == [f"step {i} of 5" for i in range(1, 4)]
    capsys.readouterr()
    out = run("--profile", "--epochs", 1, "--milestones", out=tmp_path / "four")
    assert not (out / "trace.json").exists()
    assert "no trace is written: the first 5 steps are not recorded, and 4 are left" in (
        capsys.readouterr().out
    )


def test_profile_is_free_on_resume(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert main([*TINY, "--out", str(out)]) == 130
    assert main(["--resume", str(out), "--profile"]) == 0
    assert len(steps_of_trace(out)) == 5


def test_checkpoint_loads_as_a_network_and_scores_what_was_logged(finished, capsys):
    load_checkpoint(FastResNet(8), finished / "checkpoint.pt")
    # on the CPU, where it was trained: a GPU would evaluate in fp16
    arguments = ["--eval", str(finished / "checkpoint.pt"), "--limit", "64", "--device", "cpu"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"test accuracy {100 * metrics(finished)[-1]['test_accuracy']:.2f} %" in shown
    assert f"loss {metrics(finished)[-1]['test_loss']:.4f}" in shown


def test_published_checkpoint_is_evaluated(tmp_path, capsys):
    state = {f"module.{key}": value for key, value in FastResNet(14).state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 90.0}, tmp_path / "resnet14.th")
    arguments = ["--eval", tmp_path / "resnet14.th", "--dataset", "shapes", "--limit", "32"]
    for normalization in ("dataset", "imagenet"):
        assert main([*map(str, arguments), "--normalization", normalization]) == 0
        assert "ResNet-14 on shapes: test accuracy" in capsys.readouterr().out


def test_same_seed_same_bits_other_seed_other_weights(finished, tmp_path):
    again = run(out=tmp_path / "again")
    other = run("--seed", 1, out=tmp_path / "other")
    ours, same, different = (tensors(checkpoint(f)) for f in (finished, again, other))
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert not torch.equal(ours[".state_dict.conv1.weight"], different[".state_dict.conv1.weight"])


def test_several_runs(tmp_path, finished, capsys):
    out = run("--runs", 2, out=tmp_path / "runs")
    accuracies = [metrics(out / f"seed-{n}")[-1]["test_accuracy"] for n in (0, 1)]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracies"] == accuracies
    assert summary["mean"] == pytest.approx(sum(accuracies) / 2)
    deviation = abs(accuracies[0] - accuracies[1]) / math.sqrt(2)
    assert summary["standard_deviation"] == pytest.approx(deviation)
    assert "2 runs of ResNet-8: accuracy" in capsys.readouterr().out
    ours, first = tensors(checkpoint(finished)), tensors(checkpoint(out / "seed-0"))
    assert all(torch.equal(ours[name], first[name]) for name in ours)


def test_tensorboard(tmp_path):
    out = run("--tensorboard", out=tmp_path / "run")
    (events,) = (out / "tensorboard").iterdir()
    assert b"test_accuracy" in events.read_bytes()


def test_validation_split_is_taken_from_the_training_pictures(tmp_path, capsys):
    out = run("--validation", 16, out=tmp_path / "run")
    assert checkpoint(out)["data"]["train"] == 48
    assert "validation" in capsys.readouterr().out


# --- stopping and resuming -----------------------------------------------------------------------


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """The user presses Ctrl-C while step ``step`` (from 1) is running."""
    train_step, taken = Engine.train_step, []

    def stopping(engine, *arguments):
        taken.append(None)
        if len(taken) == step:
            os.kill(os.getpid(), number)
        train_step(engine, *arguments)

    monkeypatch.setattr(Engine, "train_step", stopping)


SETTINGS = {
    "plain": [],
    "ema-smoothing": ["--ema", "0.9", "--label-smoothing", "0.1"],
    "bf16": ["--dtype", "bf16"],
    "fp16": ["--dtype", "fp16"],
    "nesterov-cutout": ["--nesterov", "--decay-weights-only", "--cutout", "8"],
    "fast": ["--recipe", "fast", "--evaluate-every", "2", "--tta", "flip"],
    "best": ["--recipe", "best", "--unmixed-epochs", "1", "--evaluate-every", "3"],
    "mixed": [
        "--mixup",
        "1",
        "--cutmix",
        "0.5",
        "--crop-padding",
        "2",
        "--padding-mode",
        "reflect",
    ],
    "clip-floor": ["--clip", "0.5", "--ema", "0.9", "--ema-floor", "0.2"],
    "lookahead": ["--lookahead", "3", "--lookahead-share", "0.4"],
    "muon": ["--optimizer", "muon", "--nesterov", "--decay-weights-only"],
    "muon-norm-biases": ["--optimizer", "muon", "--norm-bias-lr-factor", "8"],
    "norm-biases": ["--norm-bias-lr-factor", "8"],
    "trivial-augment": ["--trivial-augment", "--cutout", "8"],
    "one-cycle": ["--schedule", "one-cycle", "--final-lr", "0.1"],
}


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ("plain", [1]),
        ("plain", [4]),  # the last step of an epoch: a stop at the boundary
        ("plain", [6]),
        ("plain", [2, 5, 4]),  # resumed and stopped again
        ("plain", [12]),  # the very last step: nothing is left to resume
        ("ema-smoothing", [7]),
        ("bf16", [7]),
        ("fp16", [7]),
        ("nesterov-cutout", [7]),
        ("fast", [6]),
        ("best", [7]),
        ("mixed", [6]),
        ("clip-floor", [7]),
        ("lookahead", [7]),
        ("muon", [7]),
        ("muon-norm-biases", [7]),
        ("norm-biases", [7]),
        ("trivial-augment", [7]),
        ("one-cycle", [5]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_resume_is_exact(tmp_path, monkeypatch, capsys, settings, stops):
    whole = run(*SETTINGS[settings], out=tmp_path / "whole")
    out, arguments = tmp_path / "stopped", [*TINY, *SETTINGS[settings]]
    arguments += ["--out", str(out)]
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            status = main(arguments)
        arguments = ["--resume", str(out)]
        assert status == (0 if stop == 3 * STEPS else 130)
    assert "Traceback" not in capsys.readouterr().err
    assert main(arguments) == 0
    ours, theirs = tensors(checkpoint(whole)), tensors(checkpoint(out))
    assert ours.keys() == theirs.keys()
    assert len(ours) > 60
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in metrics(folder)]
        for folder in (whole, out)
    ]
    assert timeless[0] == timeless[1]


# --- captured steps, rehearsed on the CPU --------------------------------------------------------


def captured_by(monkeypatch, capture):
    monkeypatch.setattr("cifar_resnet_fast.training.run.capture_for", lambda device: capture)


def assert_same_end(folder, finished):
    ours, theirs = tensors(checkpoint(folder)), tensors(checkpoint(finished))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_captured_run_is_the_eager_one_and_resumes(finished, tmp_path, monkeypatch):
    rehearsal, out = Rehearsal(), tmp_path / "run"
    captured_by(monkeypatch, rehearsal)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert main([*TINY, "--out", str(out)]) == 130
    assert main(["--resume", str(out)]) == 0
    assert rehearsal.replays == 3 * (STEPS + 4), "no step ran any other way"
    assert main(["--resume", str(out)]) == 0, "nothing is left to do, nor to capture"
    assert_same_end(out, finished)


def test_interrupt_during_capture(finished, tmp_path, monkeypatch, capsys):
    """The capture is finished, then a step, and the run stops with a checkpoint."""

    capture, out = Engine.capture, tmp_path / "run"

    def interrupted(engine, rehearsal):
        os.kill(os.getpid(), signal.SIGINT)
        return capture(engine, rehearsal)

    with monkeypatch.context() as patch:
        captured_by(patch, Rehearsal())
        patch.setattr(Engine, "capture", interrupted)
        assert main([*TINY, "--out", str(out)]) == 130
    assert "stopped after step 1; to continue: --resume" in capsys.readouterr().err
    assert checkpoint(out)["engine"]["step"] == 1
    assert main(["--resume", str(out)]) == 0
    assert_same_end(out, finished)


def test_capture_that_fails_is_one_line(finished, tmp_path, monkeypatch, capsys):
    def refused(function, warm_up, times=3):
        warm_up()
        raise RuntimeError("operation not permitted\nCUDA kernel errors might be ...")

    captured_by(monkeypatch, refused)
    out = run(out=tmp_path / "run")
    shown = capsys.readouterr().out
    assert shown.count("slower than captured: operation not permitted\n") == 1
    assert "CUDA kernel errors" not in shown
    assert_same_end(out, finished)


def test_stop_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 2, signal.SIGTERM)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 130
    assert (
        f"stopped after step 2; to continue: --resume {tmp_path / 'run'}"
        in capsys.readouterr().err
    )


def test_rows_after_the_checkpoint_are_dropped(finished, tmp_path):
    """Killed between an epoch's row and its checkpoint: the epoch is trained again."""
    out = run(out=tmp_path / "run")
    second = checkpoint(out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "step": 16, "lr": 1')
    assert main(["--resume", str(out)]) == 0
    assert [row["epoch"] for row in metrics(out)] == [1, 2, 3]
    assert checkpoint(out)["step"] == second["step"]


def test_several_runs_resume(tmp_path, monkeypatch):
    out = tmp_path / "runs"
    with monkeypatch.context() as patch:
        stop_at(patch, 3 * STEPS + 5)
        assert main([*TINY, "--runs", "2", "--out", str(out)]) == 130
    assert main(["--resume", str(out)]) == 0
    whole = run("--seed", 1, out=tmp_path / "whole")
    ours, theirs = tensors(checkpoint(whole)), tensors(checkpoint(out / "seed-1"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(json.loads((out / "summary.json").read_text())["accuracies"]) == 2


# --- recipes -------------------------------------------------------------------------------------


def test_flags_change_a_recipe_and_config_json_records_it(tmp_path):
    flags = ["--recipe", "fast", "--no-nesterov", "--ema-start", "1", "--epochs", "2"]
    out = run(*flags, "--evaluate-every", "5", "--tta", "flip", out=tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == "fast"
    given = {"nesterov": False, "ema_start": 1.0, "epochs": 2, "lr": 0.1, "warmup_epochs": 1.0}
    of_16 = {"batch_size": 16, "ema": pytest.approx(0.99 ** (16 / 1024 * 48 / 2))}
    for name, value in {**RECIPES["fast"], **of_16, **given}.items():
        assert config[name] == value, name
    first, last = metrics(out)
    assert not any(name.startswith("test_") for name in first)
    assert 0 <= last["test_accuracy"] <= 1
    assert 0 <= last["test_accuracy_flip"] <= 1
    assert (out / "curves.png").stat().st_size > 1000
    steps, rates = 2 * STEPS, [first["lr"], last["lr"]]
    fall = [0.95 * (step - STEPS) / STEPS for step in (STEPS, steps - 1)]
    assert rates == pytest.approx([0.1 * (1 - fall[0]), 0.1 * (1 - fall[1])])


def test_paper_is_the_defaults():
    assert TrainConfig.of_recipe("paper") == TrainConfig()
    with pytest.raises(ValueError, match="recipe must be one of paper, fast, best, got 'slow'"):
        TrainConfig.of_recipe("slow")


SHORT = {
    "paper": {"warmup_epochs": 0.25, "milestones": (4, 6), "lr": 1.2},
    "fast": {"warmup_epochs": 0.5, "ema_start": 8 / 3, "ema": 0.99**6, "lr": 1.2},
    "best": {"warmup_epochs": 0.25, "unmixed_epochs": 1, "ema": 0.999**20, "lr": 0.8},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shorter_run_has_the_same_shares(recipe):
    short = TrainConfig.of_recipe(recipe, epochs=8)
    for name, value in SHORT[recipe].items():
        assert getattr(short, name) == pytest.approx(value), name
    usual = TrainConfig.of_recipe(recipe)
    assert {name: getattr(usual, name) for name in RECIPES[recipe]} == RECIPES[recipe]
    given = TrainConfig.of_recipe(recipe, epochs=8, warmup_epochs=2.0, milestones=(3,), ema=0.5)
    assert (given.warmup_epochs, given.milestones, given.ema) == (2.0, (3,), 0.5)
    for epochs in (1, 2, 3, 1000):
        TrainConfig.of_recipe(recipe, epochs=epochs)  # no setting breaks its rule


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_batch_size_changes_the_rate_in_proportion(recipe):
    usual, half = TrainConfig.of_recipe(recipe), RECIPES[recipe]["batch_size"] // 2
    smaller = TrainConfig.of_recipe(recipe, batch_size=half)
    assert smaller.lr == pytest.approx(usual.lr / 2)
    assert smaller.ema == pytest.approx(usual.ema**0.5)
    assert smaller.warmup_epochs == usual.warmup_epochs
    assert TrainConfig.of_recipe(recipe, batch_size=half, lr=0.3).lr == 0.3


def test_flags_alone_change_nothing_else():
    """Without --recipe the settings are the paper's whatever the epochs: as before recipes."""
    values = vars(parse_flags(["--epochs", "8", "--batch-size", "64"])[0])
    assert values == {**vars(TrainConfig()), "epochs": 8, "batch_size": 64}
    named, _ = parse_flags("--recipe paper --epochs 8 --batch-size 64".split())
    assert (named.milestones, named.lr) == ((4, 6), pytest.approx(1.2 / 16))


def test_help_shows_each_flag_in_one_group_and_with_a_text(capsys):
    names = [item.name for item in fields(TrainConfig)]
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(names)
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n{title}:\n" in shown for title in GROUPS)
    for item in fields(TrainConfig):
        assert len(item.metadata["help"].split()) > 2, item.name


def test_what_is_switched_off_takes_its_settings_along():
    assert TrainConfig.of_recipe("fast", ema=0.0).ema_start == 0
    assert TrainConfig.of_recipe("fast", schedule="step").final_lr == 0
    assert TrainConfig.of_recipe("fast", momentum=0.0).nesterov is False
    assert TrainConfig.of_recipe("best", mixup=0.0).unmixed_epochs == 0
    assert TrainConfig.of_recipe("best", mixup=0.0, cutmix=1.0).unmixed_epochs == 20
    with pytest.raises(ValueError, match="ema_start must be .* left out without ema, got 3.0"):
        TrainConfig.of_recipe("fast", ema=0.0, ema_start=3.0)


def test_config_of_before_there_were_recipes_loads(finished):
    values = json.loads((finished / "config.json").read_text())
    known = TrainConfig.from_dict(values)
    new = "recipe schedule final_lr flip ema_start zero_init_last evaluate_every tta mixup cutmix "
    new = [
        *new.split(),
        "shortcut",
        "width",
        "unmixed_epochs",
        "crop_padding",
        "padding_mode",
        "optimizer",
        "muon_lr",
        "clip",
        "ema_floor",
        "lookahead",
        "lookahead_share",
        "norm_bias_lr_factor",
        "trivial_augment",
    ]
    for name in new:
        del values[name]
    assert TrainConfig.from_dict(values) == known


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        pytest.param("--shortcut B", {"shortcut": "B", "width": 1}, id="option-b"),
        pytest.param("--width 2", {"shortcut": "A", "width": 2}, id="width-2"),
    ],
)
def test_other_networks_of_the_family(flags, settings, tmp_path, capsys):
    """Trained, resumed bitwise and evaluated."""
    # two runs of one epoch and two more, as one of three
    whole = run(*flags.split(), out=tmp_path / "whole")
    says = "layers run one by one, not as one operation: layer2.0 has a shortcut with parameters"
    assert (says in capsys.readouterr().out) == (settings["shortcut"] == "B")
    part = run(*flags.split(), "--epochs", "2", "--milestones", "2", out=tmp_path / "part")
    assert main(["--resume", str(part), "--epochs", "3", "--device", "cpu"]) == 0
    expected = tensors(checkpoint(whole)["engine"])
    got = tensors(checkpoint(part)["engine"])
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    config = json.loads((whole / "config.json").read_text())
    assert {name: config[name] for name in settings} == settings
    model = FastResNet.from_pretrained(whole)
    assert {name: getattr(model, name) for name in settings} == settings
    capsys.readouterr()
    assert main(["--eval", str(whole), "--limit", "64", "--device", "cpu"]) == 0
    accuracy = 100 * metrics(whole)[-1]["test_accuracy"]
    assert f"test accuracy {accuracy:.2f} %" in capsys.readouterr().out


def test_config_of_another_run_is_taken_and_changed(finished, tmp_path, capsys):
    given = ["--config", finished / "config.json"]
    again, out = tmp_path / "again", tmp_path / "other"
    assert main([*map(str, given), "--device", "cpu", "--out", str(again)]) == 0
    assert_same_end(again, finished)
    changes = ["--device", "cpu", "--lr", "0.05", "--epochs", "1"]
    assert main([*map(str, given), *changes, "--out", str(out)]) == 0
    before = json.loads((finished / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after == {**before, "lr": 0.05, "epochs": 1, "device": "cpu"}
    for flag, value in (("--recipe", "fast"), ("--resume", finished), ("--eval", "x.pt")):
        assert f"{flag} must be left out with --config, got {value}" in bad_input(
            [*given, flag, value], capsys
        )


@pytest.mark.parametrize(
    "content", [None, "", "[]", "7", '{"lr": "high"}', '{"rate": 1}', b"\xff"]
)
def test_config_that_is_none(content, tmp_path, capsys):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = f"--config must be a run's config.json, got {path}: "
    assert message in bad_input(["--config", path], capsys)


@pytest.mark.parametrize(
    ("settings", "fitted"),
    [
        (["--schedule", "linear"], "schedule linear"),
        (["--recipe", "best"], "schedule cosine"),
        (["--mixup", "1", "--unmixed-epochs", "1"], "--unmixed-epochs 1"),
    ],
)
def test_schedule_of_a_resumed_run_is_its_own(settings, fitted, tmp_path, capsys):
    out = run(*settings, "--epochs", 2, out=tmp_path / "run")
    before = (out / "config.json").read_text()
    message = f"left out or be the resumed run's 2, to which its {fitted} is fitted, got 3"
    assert message in bad_input(["--resume", out, "--epochs", 3], capsys)
    assert (out / "config.json").read_text() == before
    assert main(["--resume", str(out), "--epochs", "2"]) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_to_their_end(recipe, tmp_path):
    """Each with nothing given but the size of the run."""
    small = "--dataset shapes --limit 64 --depth 8 --batch-size 16 --epochs 3 --device cpu"
    out = tmp_path / "run"
    assert main([*small.split(), "--recipe", recipe, "--out", str(out)]) == 0
    assert [row["epoch"] for row in metrics(out)] == [1, 2, 3]
    config = json.loads((out / "config.json").read_text())
    expected = TrainConfig.of_recipe(recipe, epochs=3, batch_size=16).to_dict()
    scaled = (
        "recipe lr warmup_epochs milestones schedule ema ema_start mixup unmixed_epochs cutout"
    )
    assert {name: config[name] for name in scaled.split()} == {
        name: expected[name] for name in scaled.split()
    }
    averaged, trained = checkpoint(out)["state_dict"], checkpoint(out)["engine"]["model"]
    same = all(torch.equal(trained[name], value) for name, value in averaged.items())
    assert same == (recipe == "paper"), "the averaged weights are evaluated"


def test_one_class_cannot_be_mixed(tmp_path, capsys):
    images, labels = numpy.zeros((16, 32, 32, 3), numpy.uint8), numpy.zeros(16, numpy.int64)
    path = tmp_path / "one.npz"
    numpy.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    for kind in ("mixup", "cutmix"):
        flags = [*TINY, "--dataset", path, f"--{kind}", "1", "--out", tmp_path / "run"]
        message = f"--{kind} must be 0 with training images of one class, got 1.0"
        assert message in bad_input(flags, capsys)


def test_mirror_images_of_a_checkpoint(finished, capsys):
    flags = ["--eval", str(finished / "checkpoint.pt"), "--limit", "64", "--tta", "flip"]
    assert main([*flags, "--device", "cpu"]) == 0
    assert "% with mirror images), loss" in capsys.readouterr().out


# --- bad input -----------------------------------------------------------------------------------


def bad_input(arguments, capsys):
    """The one line on stderr of a command that must fail with status 2."""
    with pytest.raises(SystemExit) as status:
        main([str(argument) for argument in arguments])
    assert status.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1, shown
    return shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--depth 21", "--depth must be 6n + 2 and at least 8"),
        ("--shortcut C", "--shortcut: invalid choice: 'C'"),
        ("--shortcut B --implementation cuda", "--shortcut must be A with implementation cuda"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--width 101", "--width must be at most 100, got 101"),
        ("--width 2 --implementation cuda", "--width must be 1 with implementation cuda, got 2"),
        ("--depth twenty", "--depth: invalid int value: 'twenty'"),
        ("--dataset cifar11", "--dataset must be one of auto, cifar10"),
        ("--dataset none.npz", "--dataset none.npz must be a file"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--batch-size 65", "--batch-size must be in 1 .. 64, the number of images, got 65"),
        ("--lr -0.1", "--lr must be more than 0, got -0.1"),
        ("--lr nan", "--lr must be more than 0, got nan"),
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--momentum 1", "--momentum must be at least 0 and less than 1, got 1.0"),
        ("--milestones 5 3", "--milestones must be rising epochs"),
        ("--validation 64", "--validation must be smaller than the 64"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--loss-scale 0", "--loss-scale must be more than 0, got 0.0"),
        ("--nesterov --momentum 0", "--nesterov must be off if momentum is 0"),
        ("--recipe slow", "--recipe: invalid choice: 'slow'"),
        ("--schedule up", "--schedule: invalid choice: 'up'"),
        ("--final-lr 0.1", "--final-lr must be left out with schedule step, got 0.1"),
        ("--schedule linear --final-lr 2", "--final-lr must be a share of the peak, 0 .. 1"),
        (
            "--schedule cosine --warmup-epochs 3",
            "--warmup-epochs must be less than the 3 epochs with schedule cosine, got 3.0",
        ),
        ("--ema-start 1", "--ema-start must be less than the 3 epochs, and left out without ema"),
        ("--ema 0.9 --ema-start 3", "--ema-start must be less than the 3 epochs"),
        ("--crop-padding 32", "--crop-padding must be in 0 .. 31, got 32"),
        ("--padding-mode edge", "--padding-mode: invalid choice: 'edge'"),
        ("--padding-mode reflect --crop-padding 0", "--padding-mode must be zeros with a crop"),
        ("--cutmix 1 --batch-size 1", "--cutmix must be 0 with batches of one image, which have"),
        ("--optimizer muon --momentum 0", "--momentum must be more than 0 with optimizer muon"),
        ("--muon-lr 0", "--muon-lr must be more than 0, got 0.0"),
        ("--muon-lr 0.1", "--muon-lr must be left out without --optimizer muon, got 0.1"),
        ("--lookahead-share 0.4", "--lookahead-share must be left out without --lookahead, got 0"),
        ("--clip -1", "--clip must be 0 or more, got -1.0"),
        ("--norm-bias-lr-factor 0", "--norm-bias-lr-factor must be in 1e-6 .. 1e6, got 0.0"),
        ("--norm-bias-lr-factor nan", "--norm-bias-lr-factor must be in 1e-6 .. 1e6, got nan"),
        ("--ema-floor 0.5", "--ema-floor must be at least 0 and less than ema 0.0, got 0.5"),
        ("--ema 0.9 --ema-floor 0.9", "--ema-floor must be at least 0 and less than ema 0.9"),
        ("--lookahead -1", "--lookahead must be 0 or more, got -1"),
        ("--lookahead-share 0", "--lookahead-share must be more than 0 and at most 1, got 0.0"),
        ("--optimizer adam", "--optimizer: invalid choice: 'adam'"),
        ("--mixup 1.5", "--mixup must be in 0 .. 1, got 1.5"),
        ("--cutmix -1", "--cutmix must be in 0 .. 1, got -1.0"),
        ("--unmixed-epochs 1", "--unmixed-epochs must be less than the 3 epochs, and left out"),
        ("--mixup 1 --unmixed-epochs 3", "--unmixed-epochs must be less than the 3 epochs"),
        ("--evaluate-every 0", "--evaluate-every must be at least 1, got 0"),
        ("--cutout -1", "--cutout must be 0 or more, got -1"),
        ("--seed -1", "--seed must be in 0 .. 2**63 - 1, got -1"),
        ("--implementation cuda", "--implementation must be one that can run here, got cuda: "),
        (
            "--implementation cuda --dtype fp32",
            "--dtype must be fp16, bf16 or auto with implementation cuda, got 'fp32'",
        ),
        ("--speed 3", "unrecognized arguments: --speed 3"),
        ("--eval none.pt", "none.pt must be a file, a folder"),
        ("--resume none", "--resume must name the folder of a run"),
        ("--resume=", "--resume must be a name that is not empty, got ''"),
        ("--out=", "--out must be a name that is not empty"),
        ("--eval=", "--eval must be a name that is not empty"),
        ("--data-root=", "--data-root must be a name that is not empty"),
        ("--data-url=", "--data-url must be a name that is not empty"),
        ("--data-url http://host/file", "--data-url must be left out with dataset shapes, which"),
        (
            "--dataset cifar10 --data-url cifar.tar.gz",
            "--data-url must begin with http://, https:// or file://, got 'cifar.tar.gz'",
        ),
        ("--dataset=", "--dataset must be a name that is not empty"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in bad_input([*TINY, *arguments.split()], capsys)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_cuda_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "--device must be cpu or auto" in bad_input([*TINY, "--device", "cuda"], capsys)


def test_cifar10_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cifar_resnet_fast.data.sources._by_speed", lambda file, whys: [])
    arguments = ["--dataset", "cifar10", "--data-root", tmp_path, "--out", tmp_path / "run"]
    shown = bad_input(arguments, capsys)
    assert "put cifar-10-python.tar.gz, or what is in it, into" in shown
    assert ".npz file or a folder" in shown


def test_out_that_holds_a_run_is_kept(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    shown = bad_input([*TINY, "--out", finished], capsys)
    assert "--out must be a new or an empty folder" in shown
    assert f"--resume {finished}" in shown
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    shown = bad_input([*TINY, "--out", tmp_path / "file" / "run"], capsys)
    assert "--out must be a folder that can be written" in shown
    assert "must be a new or an empty folder" in bad_input(
        [*TINY, "--out", tmp_path / "file"], capsys
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_checkpoint_of_another_network(finished, capsys):
    path = finished / "checkpoint.pt"
    shown = bad_input(["--eval", path, "--depth", 20], capsys)
    assert "--depth must be left out or be the checkpoint's 8, got 20" in shown


def test_checkpoint_of_another_class_count(tmp_path, capsys):
    torch.save(FastResNet(8, 100).state_dict(), tmp_path / "hundred.pt")
    shown = bad_input(["--eval", tmp_path / "hundred.pt", "--dataset", "shapes"], capsys)
    assert "--dataset must have the checkpoint's 100 classes, shapes has 10" in shown


def test_checkpoint_with_settings_of_no_sense(tmp_path, capsys):
    content = {"state_dict": FastResNet(8).state_dict(), "config": 3, "mean": "high", "std": 1}
    torch.save(content, tmp_path / "odd.pt")
    arguments = ["--eval", tmp_path / "odd.pt", "--dataset", "shapes", "--limit", 16]
    assert "must have three numbers as its mean" in bad_input(arguments, capsys)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("mean", math.nan, "finite numbers as its mean"),
        ("std", 0.0, "above 0 as its std"),
        ("std", -0.2, "above 0 as its std"),
        ("std", math.inf, "finite numbers above 0 as its std"),
    ],
)
def test_statistics_that_cannot_be(key, value, rule, tmp_path, capsys):
    content = {"state_dict": FastResNet(8).state_dict(), "mean": [0.5] * 3, "std": [0.2] * 3}
    content[key] = [0.3, 0.3, value]
    torch.save(content, tmp_path / "odd.pt")
    arguments = ["--eval", tmp_path / "odd.pt", "--dataset", "shapes", "--limit", 16]
    assert rule in bad_input(arguments, capsys)


def test_eval_takes_auto_for_the_data_that_the_run_had(finished, capsys):
    arguments = ["--eval", str(finished / "checkpoint.pt"), "--dataset", "auto", "--limit", "64"]
    assert main(arguments) == 0
    assert "ResNet-8 on shapes" in capsys.readouterr().out


def test_corrupt_checkpoint(finished, tmp_path, capsys):
    data = (finished / "checkpoint.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: len(data) // 2])
    assert f"checkpoint {path}" in bad_input(["--eval", path], capsys)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert main([*TINY, "--out", str(tmp_path / "run")]) == 130
    return tmp_path / "run"


# --- the folder of a run -------------------------------------------------------------------------


def test_a_second_process_is_refused(stopped, tmp_path, monkeypatch, capsys):
    """While a run trains, neither --resume nor --out of another one has its folder."""
    capsys.readouterr()
    script = f"import sys; from cifar_resnet_fast.train import main; sys.exit(main({TINY}))"
    command = [sys.executable, "-c", script.replace("main([", "main(sys.argv[1:] or [")]
    train_step, refused = Engine.train_step, []

    def meanwhile(engine):
        if not refused:
            for flag in ("--resume", "--out"):
                done = subprocess.run(
                    [*command, flag, str(stopped)], capture_output=True, text=True, timeout=120
                )
                assert done.returncode == 2
                refused.append(done.stderr)
        train_step(engine)

    monkeypatch.setattr(Engine, "train_step", meanwhile)
    assert main(["--resume", str(stopped)]) == 0
    assert refused[0] == (
        f"error: only one process can train in {stopped}, and process {os.getpid()} on "
        f"{socket.gethostname()} does\n"
    )
    assert "must be a new or an empty folder" in refused[1]
    assert [row["epoch"] for row in metrics(stopped)] == [1, 2, 3]
    assert not (stopped / ".lock").exists()


def test_the_lock_of_a_killed_process_holds_nobody_up(stopped, monkeypatch):
    (stopped / ".lock").write_text("process 1 on elsewhere\n")
    (stopped / ".checkpoint.pt.123.tmp").write_bytes(b"x" * 1000)
    (stopped / ".config.json.123.tmp").write_bytes(b"{")
    assert main(["--resume", str(stopped)]) == 0
    assert [path.name for path in stopped.iterdir() if path.name.startswith(".")] == []


def test_two_that_claim_a_folder_at_once(tmp_path, capsys):
    from cifar_resnet_fast.training.folder import hold

    with hold(tmp_path):
        shown = bad_input([*TINY, "--out", tmp_path], capsys)
    assert f"only one process can train in {tmp_path}, and process {os.getpid()} on" in shown
    assert list(tmp_path.iterdir()) == []


def test_killed_before_the_run_began(tmp_path, capsys):
    """What a process leaves that is killed while config.json is written."""
    (tmp_path / ".config.json.123.tmp").write_bytes(b"{")
    (tmp_path / ".lock").touch()
    shown = bad_input(["--resume", tmp_path], capsys)
    assert f"to begin a run there: --out {tmp_path}" in shown
    run(out=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_checkpoint_that_is_gone(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoint.pt").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    shown = bad_input(["--resume", folder], capsys)
    assert f"and no {folder / 'checkpoint.pt'}" in shown
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "line", ["3", "[]", '{"epoch": 2}', "{", "[" * 5000, '{"step": 8, "epoch": "two"}', "\0\xff"]
)
def test_metrics_edited_by_hand(stopped, line, capsys):
    path = stopped / "metrics.jsonl"
    kept = path.read_text()
    path.write_text(line + "\n" + kept, encoding="latin-1")
    assert main(["--resume", str(stopped)]) == 0
    assert f"1 lines of {path} are not rows and were dropped" in capsys.readouterr().out
    assert [row["epoch"] for row in metrics(stopped)] == [1, 2, 3]
    assert path.read_text().startswith(kept)


def test_finished_run_without_its_rows(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "metrics.jsonl").unlink()
    assert main(["--resume", str(folder)]) == 0
    accuracy = metrics(finished)[-1]["test_accuracy"]
    assert f"test accuracy {100 * accuracy:.2f} % after 3 epochs" in capsys.readouterr().out


def test_curves_of_a_data_set_with_any_name(tmp_path, recwarn):
    from cifar_resnet_fast.training.logbook import draw_curves

    row = {"epoch": 1, "step": 4, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5}
    row |= {"test_loss": 1.0, "test_accuracy": 0.5}
    draw_curves(
        tmp_path / "curves.png", [row], "ResNet-8 on \u7d75\u753b $\\frac{ \U0001f600", "test"
    )
    assert not recwarn.list
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_resume_with_other_settings(stopped, capsys):
    capsys.readouterr()
    shown = bad_input(["--resume", stopped, "--lr", "0.5"], capsys)
    assert "--lr must be left out or be the resumed run's 0.1, got 0.5" in shown


def test_resume_from_a_damaged_checkpoint(stopped, capsys):
    capsys.readouterr()
    path = stopped / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    assert f"checkpoint {path}" in bad_input(["--resume", stopped], capsys)
    assert path.read_bytes() == data[:-1000]


def test_resume_from_another_runs_checkpoint(stopped, tmp_path, capsys):
    other = run("--depth", 14, out=tmp_path / "other")
    capsys.readouterr()
    (stopped / "checkpoint.pt").write_bytes((other / "checkpoint.pt").read_bytes())
    shown = bad_input(["--resume", stopped], capsys)
    assert "does not fit the run: depth must be 8, as in config.json, got 14" in shown


def test_resume_with_other_data(stopped, capsys):
    capsys.readouterr()
    path = stopped / "config.json"
    path.write_text(path.read_text().replace('"limit": 64', '"limit": 60'))
    assert "data set is not the one" in bad_input(["--resume", stopped], capsys)


def test_damaged_config(stopped, capsys):
    capsys.readouterr()
    for damage in ("{", '{"depth": "8"}', '{"speed": 1}', "[]", '{"depth": 9}'):
        (stopped / "config.json").write_text(damage)
        assert "config.json is damaged" in bad_input(["--resume", stopped], capsys)


# --- failures on the way -------------------------------------------------------------------------


def test_loss_that_is_not_finite(tmp_path, monkeypatch, capsys):
    train_step, taken = Engine.train_step, []

    def diverging(engine, *arguments):
        taken.append(None)
        train_step(engine, *arguments)
        if len(taken) >= 6:
            engine.metrics[0, (engine.done - 1) % STEPS] = math.nan

    monkeypatch.setattr(Engine, "train_step", diverging)
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out)]) == 1
    shown = capsys.readouterr().err
    assert "the loss is nan at step 6 (epoch 1.50)" in shown
    assert f"{out / 'checkpoint.pt'} keeps the last good state" in shown
    assert checkpoint(out)["step"] == STEPS


def test_skipped_steps_are_counted_and_shown(tmp_path, capsys):
    out = run("--dtype", "fp16", "--loss-scale", "1e9", out=tmp_path / "run")
    assert [row["skipped_steps"] for row in metrics(out)] == [4, 8, 12]
    shown = capsys.readouterr().out
    assert (
        "4 steps of epoch 2 were skipped: their gradients overflowed at loss scale 1e+09" in shown
    )
    usual = run("--dtype", "fp16", "--epochs", "1", out=tmp_path / "usual")
    assert metrics(usual)[0]["skipped_steps"] == 0
    assert json.loads((usual / "config.json").read_text())["loss_scale"] == 1024


def test_a_real_divergence_leaves_no_bad_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TINY, "--lr", "1e30", "--warmup-epochs", "0", "--out", str(out)]) == 1
    assert "training stopped, nothing was saved yet" in capsys.readouterr().err
    assert not (out / "checkpoint.pt").exists()


@pytest.mark.parametrize(("every", "steps"), [(10.0, [4, 12]), (0.0, [4, 8, 12])])
def test_checkpoints_of_short_epochs_are_left_out(tmp_path, monkeypatch, every, steps):
    from cifar_resnet_fast.training import run as run_module

    save, saved = run_module.save_checkpoint, []

    def recorded(path, content):
        saved.append(content["engine"]["step"])
        save(path, content)

    monkeypatch.setattr(run_module, "save_checkpoint", recorded)
    monkeypatch.setattr(run_module, "_SAVE_EVERY_SECONDS", every)
    run(out=tmp_path / "run")
    assert saved == steps


def test_full_disk(tmp_path, monkeypatch, capsys):
    from cifar_resnet_fast.training import run as run_module

    save, calls = run_module.save_checkpoint, []

    def full(path, content):
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        save(path, content)

    monkeypatch.setattr(run_module, "save_checkpoint", full)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


# --- what the user sees ------------------------------------------------------------------------


def test_plain_lines_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "cifar_resnet_fast.train", *TINY, "--out", tmp_path / "run"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/3", "2/3", "3/3"]
    assert "test accuracy" in lines[3]
    assert len(lines) == 10  # the last six name the run's files and the next commands
    assert "\x1b" not in shown.stdout


def test_live_bar_on_a_terminal(tmp_path):
    import pty

    command = [sys.executable, "-m", "cifar_resnet_fast.train", *TINY, "--out", tmp_path / "run"]
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140"}
    process = subprocess.Popen(command, stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait(timeout=120) == 0
    text = shown.decode()
    for piece in ("epoch 1/3", "━", "images/s", "loss", "/12"):
        assert piece in text
