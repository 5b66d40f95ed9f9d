"""Kernels are checked before the first run on a card and a build, and not again."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types

import emulation
import pytest
import torch

from cifar_resnet_fast import info, ops, train
from cifar_resnet_fast.ops import _dispatch as choice
from cifar_resnet_fast.training.config import TrainConfig, parse_flags
from cifar_resnet_fast.verification import first_run, verdicts
from cifar_resnet_fast.verification.first_run import verify_run
from cifar_resnet_fast.verification.runner import Outcome
from cifar_resnet_fast.verification.verdicts import FAILED, NOT_POSSIBLE, OK, Verdicts

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CARD = {"card": "a card", "driver": "1", "torch": "2", "triton": "3", "python": "4", "build": "5"}


@pytest.fixture(autouse=True)
def own_machine(tmp_path, monkeypatch):
    """A card that can run all implementations, a cache folder of the test's own, no distrust."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "identity", lambda device: dict(CARD))
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(choice, "_DISTRUSTED", {})
    monkeypatch.setattr(choice, "why_not_extension", lambda device: None)
    monkeypatch.setattr(choice, "why_not_triton", lambda device: None)


@pytest.fixture
def checked(monkeypatch):
    """The names of the checks that were run; those in ``bad`` fail, in ``hindered`` cannot be."""
    ran = types.SimpleNamespace(names=[], bad=(), hindered=())

    def run_checks(checks, device, **_):
        outcomes = []
        for check in checks:
            ran.names.append(check.name)
            verdict, reason = OK, "3 cases"
            if check.kernel in ran.bad:
                verdict, reason = FAILED, "crashed: SIGSEGV"
            if check.kernel in ran.hindered:
                verdict, reason = NOT_POSSIBLE, "out of memory"
            outcomes.append(Outcome(check.name, verdict, reason))
        return outcomes

    monkeypatch.setattr(first_run, "run_checks", run_checks)
    return ran


ALL = [
    "trunk, cuda, fp16, quick",
    "load_batch, triton, fp16, quick",
    "linear_cross_entropy, triton, fp32, quick",
    "record_step, triton, fp32, quick",
    "sgd, triton, fp32, quick",
]


# --- verdicts -----------------------------------------------------------------------------------


def test_verdicts_are_kept():
    pytest.importorskip("platformdirs")
    found = {"a": (OK, "2 cases"), "b": (FAILED, "crashed: SIGSEGV"), "c": (NOT_POSSIBLE, "why")}
    Verdicts(GPU).keep(found)
    verdicts._known.clear()  # as in another process
    kept = Verdicts(GPU)
    assert (kept.of("a").verdict, kept.of("a").reason) == (OK, "2 cases")
    assert (kept.of("b").verdict, kept.of("b").reason) == (FAILED, "crashed: SIGSEGV")
    assert kept.of("c") is None
    kept.keep({"b": (OK, "")})
    assert [(name, verdict.verdict) for name, verdict in Verdicts(GPU).items()] == [
        ("a", OK),
        ("b", OK),
    ]
    content = json.loads(kept.path.read_text())
    assert content["card"] == "a card"


@pytest.mark.parametrize("name", ["card", "driver", "torch", "triton", "build"])
def test_verdicts_are_of_one_machine_and_build(name, monkeypatch):
    Verdicts(GPU).keep({"a": (OK, "")})
    monkeypatch.setattr(verdicts, "identity", lambda device: {**CARD, name: "another"})
    assert Verdicts(GPU).of("a") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"verdicts": 3}', '{"verdicts": {"a": 1}}'])
def test_a_damaged_file_holds_no_verdicts(content):
    pytest.importorskip("platformdirs")
    kept = Verdicts(GPU)
    kept.keep({"a": (OK, "")})
    verdicts._known.clear()
    kept.path.write_text(content)
    assert Verdicts(GPU).items() == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    pytest.importorskip("platformdirs")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kept = Verdicts(GPU)
    kept.keep({"a": (OK, "")})
    assert "cannot be written" in kept.why_not_kept
    assert kept.path is None
    assert Verdicts(GPU).of("a").verdict == OK  # in this process


def test_without_platformdirs_nothing_is_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setattr(verdicts.importlib.util, "find_spec", lambda name: None)
    kept = Verdicts(GPU)
    kept.keep({"a": (OK, "")})
    assert kept.why_not_kept == "the package platformdirs is not installed"
    assert Verdicts(GPU).of("a").verdict == OK
    verdicts._known.clear()
    assert Verdicts(GPU).of("a") is None


# --- a run --------------------------------------------------------------------------------------


def test_a_first_run_checks_and_the_second_does_not(checked):
    said = []
    assert verify_run("auto", "fp16", GPU, say=said.append) == []
    assert checked.names == ALL
    (line,) = said
    assert "trunk on cuda, load_batch on triton, linear_cross_entropy on triton, " in line
    assert "sgd on triton: 5 ok in" in line
    assert verify_run("auto", "fp16", GPU, say=said.append) == []
    assert (checked.names, len(said)) == (ALL, 1)
    verify_run("auto", "bf16", GPU, say=said.append)  # other kernels, but for sgd's
    assert checked.names[5:] == ["trunk, cuda, bf16, quick", "load_batch, triton, bf16, quick"]


def test_float32_is_not_checked_on_kernels_that_do_not_take_it(checked):
    verify_run("auto", "fp32", GPU, say=lambda line: None)
    assert checked.names[0] == "trunk, triton, fp32, quick"


def test_a_wider_network_is_not_checked_on_kernels_that_do_not_take_it(checked):
    verify_run("auto", "fp16", GPU, "trunk", 2, say=lambda line: None)
    assert checked.names[0] == "trunk, triton, fp16, quick"


def test_auto_takes_the_next_implementation(checked):
    checked.bad = ("trunk, cuda, fp16",)
    for _ in range(2):  # it is said at every run, and checked once
        said = []
        choice._DISTRUSTED.clear()
        assert verify_run("auto", "fp16", GPU, say=said.append) == [("trunk", "cuda")]
        assert said[-1 if len(said) == 1 else 1] == (
            "trunk runs on triton, not on cuda: check 'trunk, cuda, fp16' failed: crashed: SIGSEGV"
        )
        assert ops.choose("auto", GPU, "trunk") == "triton"
    assert checked.names == [*ALL, "trunk, triton, fp16, quick"]
    with pytest.raises(RuntimeError, match="cannot run trunk on cuda: check 'trunk, cuda, fp16'"):
        ops.choose("cuda", GPU, "trunk")


def test_auto_ends_at_the_reference(checked):
    checked.bad = ("trunk, cuda, fp16", "trunk, triton, fp16", "sgd, triton, fp32")
    failed = verify_run("auto", "fp16", GPU, say=lambda line: None)
    assert sorted(failed) == [("sgd", "triton"), ("trunk", "cuda"), ("trunk", "triton")]
    assert ops.choose("auto", GPU, "trunk") == ops.choose("auto", GPU, "sgd") == "reference"


def test_one_that_is_asked_for_and_fails_is_an_error(checked):
    checked.bad = ("trunk, cuda, fp16",)
    with pytest.raises(ValueError, match="^implementation must be one .* got cuda: check 'trunk"):
        verify_run("cuda", "fp16", GPU, say=lambda line: None)


def test_what_cannot_be_checked_is_said_and_trusted(checked):
    checked.hindered = ("trunk, cuda, fp16",)
    said = []
    assert verify_run("auto", "fp16", GPU, say=said.append) == []
    assert "trunk, cuda, fp16, quick not possible: out of memory" in said[0]
    verify_run("auto", "fp16", GPU, say=said.append)  # and tried again
    assert checked.names == [*ALL, ALL[0]]


def test_the_reference_is_always_trusted(checked):
    verify_run("reference", "fp16", GPU, say=lambda line: None)
    assert checked.names == ALL[1:]
    with pytest.raises(ValueError, match="must be another than the reference"):
        ops.distrust("reference", "trunk", "why")


@pytest.mark.skipif(
    ops.WHY_NOT_LOADED["_C"] is not None or emulation.compiler() is None,
    reason="needs the extension and a C++ compiler",
)
def test_a_planted_kernel_is_not_run(monkeypatch):
    """From the wrong kernel, emulated, in a process of its own, to the reference."""
    emulation.load_operations()
    monkeypatch.setenv("PLANTED", "wrong")

    def kernels(*_):
        name = "cuda" if choice.why_not("cuda", GPU, "trunk") is None else "reference"
        return {"trunk": name}

    monkeypatch.setattr(first_run, "kernels_of_run", kernels)
    said = []
    assert verify_run("auto", "fp16", CPU, catalogue="planted_kernels", say=said.append) == [
        ("trunk", "cuda")
    ]
    assert said[1].startswith(
        "trunk runs on reference, not on cuda: check 'trunk, cuda, fp16' failed: wrong result: "
    )


def test_layers_that_run_one_by_one_are_checked_as_such(checked):
    assert verify_run("auto", "fp16", GPU, "conv_bn_relu", say=lambda line: None) == []
    assert checked.names == ["conv_bn_relu, triton, fp16, quick", *ALL[1:]]


# --- train and info -----------------------------------------------------------------------------


class Others:
    """The processes of a run, on GPUs; ``lost`` are pairs that fail in another one."""

    def __init__(self, count=1, lost=()):
        self.device, self.count, self._lost = GPU, count, iter(lost)
        self.first_here_first = contextlib.nullcontext

    def any(self, wish):
        return next(self._lost, False) or wish


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, [("auto", "fp16", GPU, "trunk", 1)]),
        ({"width": 2}, [("auto", "fp16", GPU, "trunk", 2)]),
        ({"shortcut": "B"}, [("auto", "fp16", GPU, "conv_bn_relu", 1)]),
        ({"implementation": "triton", "dtype": "bf16"}, [("triton", "bf16", GPU, "trunk", 1)]),
        ({"no_selfcheck": True}, []),
    ],
)
def test_train_verifies(given, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(first_run, "verify_run", lambda *a: calls.append(a) or [])
    config = TrainConfig(**{"dtype": "fp16", **given})
    train._verify_kernels(config, Others())
    assert calls == asked


def test_what_fails_in_another_process_is_distrusted_here(monkeypatch):
    monkeypatch.setattr(first_run, "verify_run", lambda *a: [])
    train._verify_kernels(TrainConfig(dtype="fp16"), Others(2, lost=[True, False]))
    assert ops.choose("auto", GPU, "trunk") == "triton"
    assert ops.choose("auto", GPU, "sgd") == "triton"


def test_on_a_cpu_nothing_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(first_run, "verify_run", None)
    arguments = "--device cpu --dataset shapes --limit 32 --depth 8 --epochs 1 --batch-size 16"
    arguments += " --milestones --no-selfcheck"
    assert train.main([*arguments.split(), "--out", str(tmp_path / "run")]) == 0
    assert "no_selfcheck" not in json.loads((tmp_path / "run/config.json").read_text())


def test_the_flag_has_no_opposite(capsys):
    config, given = parse_flags(["--no-selfcheck"])
    assert config.no_selfcheck
    assert given == {"no_selfcheck": True}
    assert "no_selfcheck" not in parse_flags([])[1]
    with pytest.raises(ValueError, match="unrecognized arguments: --no-no-selfcheck"):
        parse_flags(["--no-no-selfcheck"])
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    assert "--no-no-" not in capsys.readouterr().out


def test_info_shows_the_verdicts(monkeypatch):
    pytest.importorskip("platformdirs")
    assert info.verdict_lines(GPU) == [
        "  self-check: not run on this card and build yet: cifar_resnet_fast.selfcheck"
    ]
    Verdicts(GPU).keep({"trunk, cuda, fp16": (FAILED, "hung"), "sgd, triton, fp32": (OK, "")})
    head, *lines = info.verdict_lines(GPU)
    assert head.startswith("  self-check, in ")
    assert lines[0].startswith("    sgd, triton, fp32: ok on 20")
    assert lines[1].startswith("    trunk, cuda, fp16: failed on 20")
    assert lines[1].endswith(": hung")
    monkeypatch.setattr(verdicts.importlib.util, "find_spec", lambda name: None)
    assert "platformdirs is not installed" in info.verdict_lines(GPU)[0]


@pytest.mark.gpu
def test_on_a_gpu_the_first_run_checks(tmp_path):
    """In processes of their own, as a user starts them; the second is checked only if it must."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "cifar_resnet_fast.train", "--dataset", "shapes"]
    command += "--limit 256 --depth 8 --epochs 1 --batch-size 64 --milestones --out".split()
    shown = [
        subprocess.run(
            [*command, str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("first", "second")
    ]
    checked = ["kernels checked, for the first time" in text for text in shown]
    kept = importlib.util.find_spec("platformdirs") is not None
    assert checked == [True, not kept]
    assert all("failed" not in text for text in shown)
