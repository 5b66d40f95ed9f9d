"""Runs killed at random moments and resumed: the weights are bitwise those of an undisturbed run.

SIGKILL, SIGTERM and SIGINT at random times, to one process or to one of two under torchrun, again
and again until the run ends. Three kills of each by default; KILL_RUNS=100 tries that many, half
of them under torchrun (``make kill-test RUNS=100``).
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

KILLS = int(os.environ.get("KILL_RUNS", 6))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FILES = ["checkpoint.pt", "config.json", "curves.png", "metrics.jsonl"]
# about three seconds of training; a checkpoint after each epoch, so that kills meet its writing
TRAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the package does if it is imported by -m
from cifar_resnet_fast import train
from cifar_resnet_fast.training import run
run._SAVE_EVERY_SECONDS = 0.0
train._command_line()
"""
TINY = (
    "--dataset shapes --limit 64 --depth 8 --batch-size 16 --epochs 20 --lr 0.05 "
    "--warmup-epochs 1 --milestones 10 --device cpu --timeout 60"
).split()


def command(script: Path, processes: int, *arguments) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(processes)]
    return [*start, str(script), *map(str, arguments)]


def children_of(process: int) -> list[int]:
    """Its direct children, by /proc."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def start(script, processes, *arguments):
    package = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command(script, processes, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package},
    )


def tensors(value, name=""):
    """All tensors in a nest of dictionaries, by their place."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    found = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        found |= tensors(item, f"{name}.{key}")
    return found


@pytest.mark.timeout(36000)
@pytest.mark.parametrize("processes", [1, 2], ids=["alone", "torchrun"])
def test_killed_runs_resume_with_the_same_bits(tmp_path, processes):
    script = tmp_path / "script.py"
    script.write_text(TRAIN)
    began = time.monotonic()
    whole = start(script, processes, *TINY, "--out", tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    length = time.monotonic() - began
    right = tensors(torch.load(tmp_path / "whole/checkpoint.pt", weights_only=True))
    assert len(right) > 60
    draw, kills, run = random.Random(0), 0, tmp_path / "run"
    while kills < KILLS / 2:
        resumed = (run / "config.json").exists()
        how = ("--resume", run) if resumed else (*TINY, "--out", run)
        process = start(script, processes, *how)
        # long enough a moment to come into any part of a run, from imports to the end
        moment = time.monotonic() + draw.uniform(0, length)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.005)
        number = draw.choice(SIGNALS)
        if process.poll() is None:
            # torchrun itself cannot clean up after a SIGKILL: then one of its processes gets it
            target = draw.choice(children_of(process.pid) or [process.pid]) * (processes > 1)
            os.kill(target or process.pid, number)
            kills += 1
        _, shown = process.communicate(timeout=120)
        if process.returncode == 0:
            assert_undisturbed(run, right)
            shutil.rmtree(run)
        elif processes == 1:
            assert "Traceback" not in shown, shown
            assert process.returncode in (130, -number), shown
    if run.exists():
        how = ("--resume", run) if (run / "config.json").exists() else (*TINY, "--out", run)
        last = start(script, processes, *how)
        assert last.wait(timeout=300) == 0, last.stderr.read()
        assert_undisturbed(run, right)


def assert_undisturbed(run: Path, right: dict[str, torch.Tensor]) -> None:
    assert sorted(path.name for path in run.iterdir()) == FILES
    ours = tensors(torch.load(run / "checkpoint.pt", weights_only=True))
    assert ours.keys() == right.keys()
    for name, value in right.items():
        assert torch.equal(ours[name], value), name
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 20
