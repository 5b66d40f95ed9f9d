"""The self-check: every kernel has one, and a check that fails, crashes or hangs costs itself."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import emulation
import planted_checks
import pytest
import torch
from rehearsal import Rehearsal

from cifar_resnet_fast import ops, selfcheck
from cifar_resnet_fast.processes import ProcessLostError
from cifar_resnet_fast.verification import checks, exchange, networks, repeats
from cifar_resnet_fast.verification.budget import (
    Compared,
    Unavailable,
    WrongResult,
    assert_same_bits,
)
from cifar_resnet_fast.verification.checks import Check
from cifar_resnet_fast.verification.networks import Problem
from cifar_resnet_fast.verification.runner import Outcome, run_checks
from cifar_resnet_fast.verification.verdicts import FAILED, NOT_POSSIBLE, OK, Verdicts

CPU = torch.device("cpu")
needs_emulation = pytest.mark.skipif(
    ops.WHY_NOT_LOADED["_C"] is not None or emulation.compiler() is None,
    reason="needs the extension and a C++ compiler",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Verdicts are kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- each in its own way ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endings():
    """What became of the planted checks, one worker after the other, and what was reported."""
    reported = []
    began = time.monotonic()
    outcomes = run_checks(
        planted_checks.catalogue(CPU), CPU, catalogue="planted_checks", report=reported.append
    )
    assert outcomes == reported
    assert time.monotonic() - began < 200
    return {outcome.name: outcome for outcome in outcomes}


@pytest.mark.parametrize(
    ("name", "verdict", "reason"),
    [
        ("right", OK, "as it should be"),
        ("wrong", FAILED, "wrong result: y: norm of the error must be at most 1, got 2"),
        ("crash", FAILED, "crashed: SIGSEGV"),
        ("hang", FAILED, "hung: no answer in 2 s"),
        (
            "fail",
            FAILED,
            "error: RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
        ("full", NOT_POSSIBLE, "out of memory"),
        ("end", FAILED, "crashed: exit status 3 (said before the end)"),
        ("unavailable", NOT_POSSIBLE, "there is none of that here"),
        ("chatter", OK, ""),
        ("measured", OK, ""),
    ],
)
def test_each_ending_is_reported_as_that(name, verdict, reason, endings):
    assert set(endings) == {run.__name__ for run in planted_checks.ENDINGS}
    outcome = endings[name]
    assert (outcome.verdict, outcome.reason) == (verdict, reason)
    assert ("traceback" in outcome.data) == (name == "fail")
    assert len(outcome.line().splitlines()) == 1
    assert all(part in outcome.line() for part in (verdict, name, reason))


def test_figures_come_back(endings):
    pid = endings["measured"].data["pid"]
    assert pid != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # no process is left behind


def test_several_workers_give_the_outcomes_in_order():
    wanted = [c for c in planted_checks.catalogue(CPU) if c.name in ("right", "crash", "measured")]
    outcomes = run_checks(wanted, CPU, jobs=3, catalogue="planted_checks")
    assert [(o.name, o.verdict) for o in outcomes] == [
        ("right", OK),
        ("crash", FAILED),
        ("measured", OK),
    ]


def test_a_worker_that_cannot_start_fails_the_check():
    (outcome,) = run_checks([Check("right", lambda: None)], CPU, catalogue="no_such_module")
    assert outcome.verdict == FAILED
    assert outcome.reason.startswith("its process did not start: crashed: exit status 1")
    assert "No module named 'no_such_module'" in outcome.reason


# --- the catalogue ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_kernel_of_every_implementation_has_a_check(device):
    found = [check.name for check in checks.catalogue(torch.device(device))]
    assert len(found) == len(set(found))
    for operation, implementations in ops.OPERATIONS.items():
        for name in implementations:
            dtypes = ("fp16", "bf16", "fp32")
            if (operation, name) == ("trunk", "cuda"):
                dtypes = ("fp16", "bf16")
            if operation in checks.FLOAT32_ALONE:
                dtypes = ("fp32",)
            if device == "cpu" and name == "triton":  # whose interpreter has no bfloat16
                dtypes = tuple(dtype for dtype in dtypes if dtype != "bf16")
            for dtype in dtypes:
                wanted = checks.kernel_check_name(operation, name, dtype)
                assert (wanted in found) == (name != "reference"), wanted


def test_every_operation_has_cases():
    assert {case.operation for case in checks.operations.CASES} == ops.OPERATIONS.keys() - {
        "trunk"
    }


@needs_emulation
@pytest.mark.parametrize(
    ("planted", "verdict", "reason"),
    [
        ("", OK, "kernels in their places"),
        ("wrong", FAILED, "wrong result: f2 32x32x16, batch 1: y: norm of the error must be"),
        ("crash", FAILED, "crashed: SIGSEGV"),
        ("hang", FAILED, "hung: no answer in 20 s"),
    ],
)
def test_a_planted_kernel_is_reported_as_that(planted, verdict, reason, monkeypatch):
    """The CUDA kernels, emulated: one of them wrong; the check after it is done all the same."""
    emulation.load_operations()  # built here, not within the limit
    monkeypatch.setenv("PLANTED", planted)
    names = ("trunk, cuda, fp16", "shortcut_a, cuda, fp16")
    wanted = [
        dataclasses.replace(check, limit=20.0 if planted == "hang" else 600.0)
        for check in checks.catalogue(CPU)
        if check.name in names
    ]
    wanted.sort(key=lambda check: names.index(check.name))
    trunk_outcome, other = run_checks(wanted, CPU, catalogue="planted_kernels")
    assert trunk_outcome.verdict == verdict, trunk_outcome.reason
    assert reason in trunk_outcome.reason
    assert (other.verdict, other.reason) == (OK, "4 cases")


@pytest.mark.skipif(
    ops.why_not("triton", CPU, "sgd") is not None, reason="needs Triton's interpreter"
)
@pytest.mark.parametrize(
    "operation", ["shortcut_a", "load_batch", "linear_cross_entropy", "record_step", "sgd"]
)
def test_interpreted_kernels_pass(operation):
    wanted = [
        check
        for check in checks.kernel_checks(CPU)
        if (check.operation, check.implementation) == (operation, "triton")
    ]
    assert wanted
    for check in wanted:
        assert "case" in check.run()


def test_evaluation_is_held_to_a_budget_without_tf32(monkeypatch):
    """Eager's error, of which the budget is made, would be that of 10 bits."""
    usual, seen = ops.trunk, []

    def looking(*arguments, **named):
        seen.append(torch.backends.cudnn.allow_tf32)
        return usual(*arguments, **named)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as it is by default
    monkeypatch.setattr(checks.ops, "trunk", looking)
    checks._evaluated(checks.trunk.draw(8, 1, torch.float32, CPU), "reference")
    assert seen == [False] * 3
    assert torch.backends.cudnn.allow_tf32


def test_quick_checks_are_of_what_a_run_uses():
    kernels = {"trunk": "cuda", "load_batch": "triton", "sgd": "triton", "shortcut_a": "reference"}
    quick = checks.quick_checks(torch.device("cuda"), kernels, "bf16")
    assert [check.name for check in quick] == [
        "trunk, cuda, bf16, quick",
        "load_batch, triton, bf16, quick",
        "sgd, triton, fp32, quick",
    ]
    assert checks._batches(torch.device("cuda"), "cuda", quick=True) == (checks.QUICK_BATCH,)


def sums(error, ours=1.0, size=16, seed=0):
    """A float32 sum over pixels, ``dbn_bias``, whose errors are ``ours`` times eager's."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(size, generator=generator).double()
    noise = error * torch.randn(2, size, generator=generator).double()
    mine, eager = (exact + ours * noise[0]).float(), (exact + noise[1]).float()
    return Compared("dbn_bias", mine, eager, exact)


def test_sums_in_float32_are_held_to_the_budget_together():
    """Over a few channels of one place it is chance whose order of additions was the better."""
    places = [sums(1e-5, ours=4.0 if seed == 0 else 1.0, seed=seed) for seed in range(20)]
    with pytest.raises(WrongResult, match="dbn_bias: norm of the error"):
        places[0].check()
    held = checks._Held("fp32")
    for number, place in enumerate(places):
        held.check([dataclasses.replace(place, measures=("norm",))], f"place {number}", 3)
    held.check_sums()


def test_what_is_not_chance_is_seen():
    held = checks._Held("fp32")
    for seed in range(20):
        held.check([sums(1e-5, ours=4.0, seed=seed)], f"place {seed}", 3)
    with pytest.raises(WrongResult, match=r"all places, the worst place \d+, batch 3: dbn_bias"):
        held.check_sums()
    held = checks._Held("fp32")
    for seed in range(20):
        result = sums(1e-5, seed=seed)
        if seed == 7:
            result = dataclasses.replace(result, ours=result.ours * 1.005)
        held.check([result], f"place {seed}", 3)
    with pytest.raises(WrongResult, match="the worst place 7, batch 3: dbn_bias: norm of the"):
        held.check_sums()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t * float("nan"), "must be finite"),
        (lambda t: t[:-1], "must have shape"),
        (lambda t: t.half(), "must be of eager's dtype"),
    ],
)
def test_the_form_of_a_sum_is_checked_where_it_is(spoil, words):
    result = sums(1e-5)
    result = dataclasses.replace(result, ours=spoil(result.ours))
    with pytest.raises(WrongResult, match=f"stem, batch 1: dbn_bias {words}"):
        checks._Held("fp32").check([result], "stem", 1)


def test_other_results_are_held_place_by_place():
    other = dataclasses.replace(sums(1e-5, ours=4.0), name="dz")
    for dtype, result in (("fp32", other), ("fp16", sums(1e-5, ours=4.0))):
        with pytest.raises(WrongResult, match="stem, batch 1: d.*: norm of the error"):
            checks._Held(dtype).check([result], "stem", 1)


# --- steps --------------------------------------------------------------------------------------

SMALL = Problem(8, 4, "fp32", CPU)


@pytest.fixture
def rehearsed(monkeypatch):
    """A stand-in for CUDA graphs on the CPU."""
    monkeypatch.setattr(repeats, "_needs_graphs", lambda problem: None)
    monkeypatch.setattr(networks, "capture_for", lambda device: Rehearsal())
    monkeypatch.setattr(repeats, "REPLAYS", 5)
    monkeypatch.setattr(repeats, "RUN_STEPS", 3)


@pytest.mark.usefixtures("rehearsed")
@pytest.mark.parametrize("run", [repeats.captured_as_not, repeats.replays, repeats.same_run])
def test_steps_that_repeat_pass(run):
    run(SMALL, "auto")


class Forgetful(Rehearsal):
    """Graphs whose every third replay does nothing."""

    def __call__(self, *arguments, **named):
        replay = super().__call__(*arguments, **named)

        def sometimes():
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls % 3:
                replay()

        return sometimes


@pytest.mark.usefixtures("rehearsed")
@pytest.mark.parametrize("run", [repeats.captured_as_not, repeats.replays])
def test_replays_that_differ_are_seen(run, monkeypatch):
    monkeypatch.setattr(networks, "capture_for", lambda device: Forgetful())
    with pytest.raises(WrongResult, match="must be bitwise equal"):
        run(SMALL, "auto")


@pytest.mark.usefixtures("rehearsed")
def test_a_run_that_does_not_repeat_is_seen(monkeypatch):
    made = []

    def engine(*arguments, **named):
        found = networks.package_engine(*arguments, **named)
        made.append(found)
        if len(made) == 2:
            found.optimizer.momenta[7] = 1e-3
        return found

    monkeypatch.setattr(repeats, "package_engine", engine)
    with pytest.raises(WrongResult, match="3 steps with seed 0, twice: .* must be bitwise equal"):
        repeats.same_run(SMALL, "auto")


@pytest.mark.usefixtures("rehearsed")
def test_a_seed_without_effect_is_seen(monkeypatch):
    monkeypatch.setattr(
        repeats,
        "package_engine",
        lambda problem, name, seed: networks.package_engine(problem, name, seed=0),
    )
    with pytest.raises(WrongResult, match="seeds 0 and 1 must differ"):
        repeats.same_run(SMALL, "auto")


def test_nan_is_no_same_bit():
    nan = {"loss": torch.tensor([1.0, float("nan")])}
    with pytest.raises(WrongResult, match="1 of 2 elements differ"):
        assert_same_bits("steps", nan, {"loss": torch.tensor([1.0, 0.0])})


def test_without_a_gpu_there_are_no_graphs():
    for run in (repeats.captured_as_not, repeats.replays):
        with pytest.raises(Unavailable, match="CUDA graphs need a CUDA GPU"):
            run(SMALL, "auto")


def test_two_processes_exchange():
    """The program that all GPUs run, on two processes of the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "cifar_resnet_fast.verification.exchange", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr


def test_a_sum_that_does_not_come_is_an_error(monkeypatch):
    """Reading it would wait for ever: nothing but the device sees the sum in a graph."""

    class Silent:
        rank, count, device = 0, 2, CPU

        def __init__(self, *_, **__):
            pass

        def all_reduce(self, tensor):
            pass

        def wait(self):
            raise ProcessLostError("the GPU has waited for it for 60 s")

    monkeypatch.setattr(exchange, "Processes", Silent)
    with pytest.raises(ProcessLostError):
        exchange.main("cpu")


# --- the command --------------------------------------------------------------------------------


def test_the_command_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as on a user's machine
    path = tmp_path / "report.json"
    assert selfcheck.main(["--device", "cpu", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    out = capsys.readouterr().out
    every = [*checks.kernel_checks(CPU), *checks.step_checks(CPU), *checks.timings(CPU)]
    names = [check.name for check in every]
    assert [row["name"] for row in report["checks"]] == names
    lines = out.splitlines()
    for row in report["checks"]:
        assert row["verdict"] in (OK, NOT_POSSIBLE)
        assert row["reason"] or row["verdict"] == OK
        assert sum(line[13:].startswith(row["name"] + " ") for line in lines) == 1
    done = {row["name"] for row in report["checks"] if row["verdict"] == OK}
    assert {"step, auto", "same run twice, auto"} <= done
    assert report.keys() >= {"card", "driver", "torch", "triton", "python", "build", "date"}
    assert lines[-1].endswith(str(path))
    kept = dict(Verdicts(CPU).items())
    assert kept["shortcut_a, cuda, fp16"].verdict == OK
    assert kept.keys() <= set(names)
    assert "step, auto" not in kept  # of kernels alone


def test_a_failed_check_fails_the_command(tmp_path, monkeypatch, capsys):
    outcomes = [Outcome("step, cuda", FAILED, "crashed: SIGSEGV"), Outcome("sgd, triton", OK)]
    monkeypatch.setattr(selfcheck, "run_all", lambda device: outcomes)
    assert selfcheck.main(["--device", "cpu", "--out", str(tmp_path / "r.json")]) == 1
    assert "1 ok, 1 failed, 0 not possible" in capsys.readouterr().out


def test_nothing_wrong_is_timed(monkeypatch):
    """And the others are."""
    ran = []

    def run_some(found, device, **_):
        ran.append([check.name for check in found])
        return [Outcome(c.name, FAILED if c.name == "step, cuda" else OK) for c in found]

    monkeypatch.setattr(selfcheck, "run_checks", run_some)
    outcomes = {o.name: o for o in selfcheck.run_all(torch.device("cuda"))}
    assert "time of a step, cuda" not in ran[1]
    assert {"copy bandwidth", "time of a step, triton"} <= set(ran[1])
    skipped = outcomes["time of a step, cuda"]
    assert (skipped.verdict, skipped.reason) == (NOT_POSSIBLE, "failed before: step, cuda")


def test_table():
    outcomes = [
        Outcome("copy bandwidth", OK, data={"gb_s": 3000.0}),
        Outcome(
            "time of a step, cuda",
            OK,
            data={"ms": 4.35, "images_per_second": 235402, "gb": 8.7},
        ),
        Outcome("time of a step, triton", FAILED, "hung"),
    ]
    head, line = selfcheck.table(outcomes)
    assert head.endswith("a copy reaches 3,000 GB/s")
    assert line.split() == "cuda 4.350 ms 235,402 images/s 67% of the copy's bandwidth".split()
    assert selfcheck.table(outcomes[1:]) == []


def test_bytes_of_a_step_are_those_of_the_roofline():
    from bench import roofline

    forward, backward = roofline.trunk(20, 8, "fp16")
    assert checks.step_bytes(Problem(20, 8, "fp16", CPU)) == sum(
        work.activation_bytes for work in forward + backward
    )


def test_the_file_must_be_writable(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "run_all", lambda device: [])
    path = tmp_path / "none" / "report.json"
    assert selfcheck.main(["--device", "cpu", "--out", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: --out must be a file that can be written:")


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path):
    """In at most two minutes, every kernel right."""
    path = tmp_path / "report.json"
    began = time.monotonic()
    assert selfcheck.main(["--out", str(path)]) == 0
    assert time.monotonic() - began < 120
