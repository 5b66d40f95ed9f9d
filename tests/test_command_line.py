"""The command line as a process: interrupted, cut off, or given nonsense."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cifar_resnet_fast import FastResNet, ops

TRAIN = [sys.executable, "-m", "cifar_resnet_fast.train"]
TINY = (
    "--dataset shapes --limit 64 --depth 8 --batch-size 16 --epochs 3 --lr 0.1 --warmup-epochs 1 "
    "--milestones 2 --device cpu"
).split()
EXTENSION = "cifar_resnet_fast/_C.abi3.so"  # loaded after PyTorch, before the modules that train
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def finished(command, **options):
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        **options,
    )


def assert_one_line(done, status=2):
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr[:-1].isprintable()


def test_control_characters_of_a_key_are_escaped(tmp_path):
    state = FastResNet(8).state_dict()
    torch.save({**state, "\x1b[2Jextra\n": torch.ones(1)}, tmp_path / "odd.pt")
    done = finished([*TRAIN, "--eval", tmp_path / "odd.pt", "--dataset", "shapes", "--limit", 64])
    assert_one_line(done)
    assert r"\x1b[2Jextra\n" in done.stderr


def test_what_torch_warns_of_is_not_before_our_line(tmp_path):
    state = FastResNet(8).state_dict()
    state["conv1.weight"] = state["conv1.weight"].permute(1, 2, 3, 0)[0, 0].to_sparse_csr()
    torch.save(state, tmp_path / "sparse.pt")
    done = finished([*TRAIN, "--eval", tmp_path / "sparse.pt", "--dataset", "shapes"])
    assert_one_line(done)
    assert "got a sparse_csr one" in done.stderr


@pytest.mark.parametrize("imported", ["libc10.so", "libtorch_python.so", EXTENSION])
def test_an_interrupt_while_importing_is_no_traceback(tmp_path, imported):
    if imported == EXTENSION and ops.WHY_NOT_LOADED["_C"] is not None:
        pytest.skip(f"{imported} is not loaded: {ops.WHY_NOT_LOADED['_C']}")
    process = subprocess.Popen(
        [*TRAIN, *TINY, "--epochs", "1000", "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while imported not in maps.read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert shown == ""


def test_interrupted_twice(tmp_path):
    process = subprocess.Popen(
        [*TRAIN, *TINY, "--epochs", "1000", "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    process.stdout.readline()  # the first epoch has ended
    for _ in range(4):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown.count("\n") == 1, shown
    assert not (tmp_path / "run/.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_stops_as_sigterm_does(tmp_path, number):
    process = subprocess.Popen(
        [*TRAIN, *TINY, "--epochs", "1000", "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    process.stdout.readline()
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after step" in shown
    assert (tmp_path / "run/checkpoint.pt").exists()


def test_info_into_a_closed_pipe():
    command = f"{sys.executable} -m cifar_resnet_fast.info | head -1"
    done = finished(["bash", "-c", command])
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_bad_input_under_torchrun_is_said_once_and_is_the_last_that_is_read():
    done = finished(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "cifar_resnet_fast.train", "--lr", "-1"),
        ]
    )
    assert done.returncode != 0
    line = "error: --lr must be more than 0, got -1.0"
    assert done.stderr.splitlines().count(line) == 1
    assert line in "".join(done.stderr.splitlines(keepends=True)[-4:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--depth 12000000000000000002", "--depth must be at most 12002"),
        ("--epochs 100000000", "--epochs must be at most 1000000"),
        ("--epochs 1000000 --batch-size 1", "--epochs must be at most 262144 at 64 steps each"),
        ("--cutout 33", "--cutout must be at most 32"),
        ("--weight-decay 1e300", "--weight-decay must be at most 1000000.0"),
        ("--timeout 1e300", "--timeout must be at most 1000000.0"),
        ("--runs 10001", "--runs must be at most 10000"),
        (
            "--runs 5001 --sweep lr=0.1,0.2",
            "--runs must be at most 5000 for 2 combinations",
        ),
        ("--lr 1e31", "--lr must be at most 1e+30"),
        ("--dataset=--", "--dataset must have a value, got '--'"),
        ("--lr=--", "--lr must have a value, got '--'"),
    ],
)
def test_flags_beyond_all_sense(arguments, message, tmp_path, capsys):
    from cifar_resnet_fast.train import main

    began = time.monotonic()
    with pytest.raises(SystemExit) as status:
        main([*TINY, "--out", str(tmp_path / "run"), *arguments.split()])
    assert status.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 10
