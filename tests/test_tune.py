"""The tuner: its search, and that it says what it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.kernels.launch import Config
from tools import tune

START = Config(64, 32, 64, 4, 4, 3)


def test_search_finds_the_best_and_passes_over_what_does_not_run():
    tried = []

    def measure(config):
        tried.append(config)
        if config.num_warps == 8:
            return None
        # 2 stages help, but only at 128 pixels
        return 10 - 3 * (config.block_p == 128) * (1 + (config.num_stages == 2))

    assert tune.search(START, measure) == (Config(128, 32, 64, 4, 4, 2), 4)
    assert len(tried) == len(set(tried)), "measured twice"


def test_search_needs_a_start_that_runs():
    with pytest.raises(RuntimeError, match="the first configuration is wrong or does not fit"):
        tune.search(START, lambda config: None)


def test_says_what_it_needs():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tools.tune"],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "tools.tune needs a CUDA GPU that runs Triton: no GPU is visible\n"


def test_bad_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", "--batch-size", "0"])
    with pytest.raises(SystemExit) as stop:
        tune.main()
    assert stop.value.code == 2
    assert "--batch-size must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuned_kernels_are_right(monkeypatch):
    monkeypatch.setattr(launch, "TABLE", {})
    monkeypatch.setattr(tune, "SETTINGS", {"block_p": (32, 64), "programs_per_sm": (2, 4)})
    problems = tune.problems(16, 16, 8, 1, 16, torch.float16)
    for operation, (C, K, call) in problems.items():
        key = (operation, C, K, torch.float16, launch.capability(torch.device("cuda", 0)))
        expected = [t.clone() for t in call()]
        config, time = tune.tune(operation, key, call, torch.float16)
        assert time > 0
        assert launch.TABLE[key] == config
        assert tune.agree(call(), expected, torch.float16)
