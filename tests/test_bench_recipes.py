"""Recipes against each other: the statistics, the plan, and a comparison that is stopped."""

import json
import math

import pytest
import torch

from bench import recipes
from bench.recipes import main, two_sided, welch
from cifar_resnet_fast.training.config import parse_flags
from cifar_resnet_fast.training.logbook import read_metrics

# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 30.0])
def test_chances_of_students_t_in_closed_form(t):
    assert two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)
    assert two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-9)
    assert two_sided(t, 1e6) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-2, abs=1e-12)


@pytest.mark.parametrize(("freedom", "t"), [(5, 2.570582), (10, 2.228139), (30, 2.042272)])
def test_five_percent_of_the_tables(freedom, t):
    assert two_sided(t, freedom) == pytest.approx(0.05, rel=1e-5)


def test_welch_on_an_example_by_hand():
    """Means 2 and 5, squared errors 1/3 and 4/3: t = 3 / sqrt(5/3), 2.941 degrees of freedom."""
    found = welch([1.0, 2.0, 3.0], [3.0, 5.0, 7.0])
    assert found.difference == 3
    assert found.error == pytest.approx(math.sqrt(5 / 3))
    freedom = (5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    assert found.p == pytest.approx(two_sided(3 / math.sqrt(5 / 3), freedom))
    assert two_sided(2.3238, 2) > found.p > two_sided(2.3238, 3)
    assert welch([1.0, 1.0], [2.0, 2.0]).p is None


def test_p_is_uniform_if_nothing_differs():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn((1000, 2, 4), generator=generator).tolist()
    small = sum(welch(first, second).p < 0.1 for first, second in samples)
    assert abs(small - 100) < 5 * 9.5  # binomial; Welch's approximation is somewhat conservative


# --- comparisons ---------------------------------------------------------------------------------

FLAGS = (
    "--dataset shapes --limit 32 --depth 8 --batch-size 16 --epochs 2 --lr 0.1 --device cpu "
    "--warmup-epochs 1"
)
ARMS = ["--arm", "plain: --milestones 1", "--arm", "fast: --recipe fast --ema-start 1 --tta flip"]


@pytest.mark.usefixtures("one_thread")
def test_a_comparison_that_is_stopped_goes_on(tmp_path, monkeypatch, capsys):
    command = [str(tmp_path), *ARMS, "--flags", FLAGS, "--target", "0.01"]
    started, train = [], recipes.train.main

    def stopping(arguments):
        started.append(arguments)
        return 130 if len(started) == 3 else train(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recipes.train, "main", stopping)
        assert main([*command, "--seeds", "2"]) == 130
        assert json.loads((tmp_path / "results.json").read_text())["arms"][0]["seeds"] == [0]
        assert main([*command, "--seeds", "2"]) == 0
    seeds = [a[a.index("--seed") + 1] for a in started]
    assert seeds == ["0", "0", "1", "1", "1"], "seed by seed, and nothing twice"
    plain, fast = json.loads((tmp_path / "results.json").read_text())["arms"]
    for row in (plain, fast):
        last = [read_metrics(tmp_path / row["arm"] / f"seed-{s}")[0][-1] for s in (0, 1)]
        assert row["accuracies"] == [r["test_accuracy"] for r in last]
        assert row["mean"] == pytest.approx(sum(row["accuracies"]) / 2)
        difference = abs(row["accuracies"][0] - row["accuracies"][1])
        assert row["standard_error"] == pytest.approx(difference / 2)
    assert plain["welch"] is None
    assert fast["welch"]["difference"] == pytest.approx(fast["mean"] - plain["mean"])
    assert plain["mean_flip"] is None
    assert 0 <= fast["mean_flip"] <= 1
    text = (tmp_path / "results.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines()[2:4]] == ["| plain", "| fast"]
    assert "Fewer than 20 seeds" in text
    assert (tmp_path / "results.png").stat().st_size > 1000
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--arm", "plain: --lr 0.2"])
    assert "--arm plain must have the flags that it has in" in capsys.readouterr().err


def test_no_run_begins_that_would_end_too_late(tmp_path, monkeypatch, capsys):
    """Runs of 50 s by a clock of our own: four fit into 4 minutes, a fifth would end after."""
    now, done = [0.0], set()
    monkeypatch.setattr(recipes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(recipes, "finished", lambda place: place in done or None)

    def run_seed(place, flags, seed):
        now[0] += 50
        done.add(place)

    monkeypatch.setattr(recipes, "run_seed", run_seed)
    arms = {"a": [], "b": []}
    assert recipes.run_arms(tmp_path, arms, seeds=9, minutes=4.0) is None
    assert sorted(p.relative_to(tmp_path).as_posix() for p in done) == [
        f"{arm}/seed-{seed}" for arm in "ab" for seed in (0, 1)
    ]
    assert "stopped before a, seed 2: 3.3 of 4 minutes" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_begins_again(tmp_path, monkeypatch):
    place, calls = tmp_path / "seed-0", []
    place.mkdir()
    (place / "config.json").write_text("{}")
    monkeypatch.setattr(recipes.train, "main", calls.append)
    recipes.run_seed(place, ["--lr", "1"], 3)
    assert not place.exists()
    place.mkdir()
    (place / "checkpoint.pt").touch()
    recipes.run_seed(place, ["--lr", "1"], 3)
    out = ["--lr", "1", "--seed", "3", "--out", str(place)]
    assert calls == [out, ["--resume", str(place)]]


def test_arms_that_are_ready(tmp_path, monkeypatch):
    """By their names or all of them, and each is a training that can be begun."""
    seen = []

    def run_arms(folder, arms, seeds, minutes):
        seen.append(arms)

    monkeypatch.setattr(recipes, "run_arms", run_arms)
    flags = ["--flags", "--depth 56"]
    chosen = ["--arm", "fast", "--arm", "fast-muon", "--arm", "short: --recipe fast --epochs 24"]
    assert main([str(tmp_path / "chosen"), *chosen, *flags]) == 0
    assert main([str(tmp_path / "all"), *flags]) == 0
    assert list(seen[0]) == ["fast", "fast-muon", "short"]
    assert list(seen[1]) == list(recipes.ARMS)
    configs = {name: parse_flags(given)[0] for name, given in {**seen[0], **seen[1]}.items()}
    assert all(config.depth == 56 for config in configs.values())
    fast, muon = configs["fast"], configs["fast-muon"]
    assert (fast.epochs, fast.optimizer) == (48, "sgd")
    assert (muon.epochs, muon.optimizer, muon.muon_lr, muon.lr) == (38, "muon", 0.24, 1.2)
    best, crops = configs["best"], configs["best-crops"]
    assert (best.cutout, best.mixup, best.unmixed_epochs) == (16, 1.0, 20)
    assert (crops.cutout, crops.mixup, crops.unmixed_epochs, crops.epochs) == (0, 0.0, 0, 160)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arm", "a b: --lr 1"], "--arm: must be NAME: FLAGS"),
        (["--arm", "a"], "--arm: must be NAME: FLAGS"),
        (["--arm", "a: --lr 1", "--arm", "a: --lr 2"], "--arm must have a name of its own"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0.0"),
    ],
)
def test_bad_input(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        main([str(tmp_path / "new"), *flags])
    assert status.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
