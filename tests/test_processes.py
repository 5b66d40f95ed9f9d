"""Several processes on one machine, under torchrun with gloo, as users start them."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cifar_resnet_fast
from cifar_resnet_fast import processes, train
from cifar_resnet_fast.data.loader import Loader
from cifar_resnet_fast.processes import Processes, ProcessLostError, all_reduce
from cifar_resnet_fast.train import main
from cifar_resnet_fast.training import run
from cifar_resnet_fast.training.engine import Engine

# 64 drawn pictures: 4 steps of 16 an epoch
TINY = (
    "--dataset shapes --limit 64 --depth 8 --batch-size 16 --epochs 2 --lr 0.05 --warmup-epochs 1 "
    "--milestones --device cpu"
).split()

LOSSES = ("train_loss", "test_loss")

# what each process does in place of `python -m cifar_resnet_fast.train`
SAME_WEIGHTS = """
import sys, torch
import torch.distributed as dist
from cifar_resnet_fast import processes, train
from cifar_resnet_fast.training import run

finish = run.Run._finish_epoch

def checked(self, *arguments):
    finish(self, *arguments)
    ours = self.engine.optimizer.parameters
    theirs = ours.clone()
    dist.broadcast(theirs, src=0)
    assert torch.equal(ours, theirs), "the processes have grown apart"
    torch.save(ours, f"{sys.argv[1]}/weights-{self.processes.rank}-{self.step}.pt")

run.Run._finish_epoch = checked

# the operation itself, in float64, against the reference on both batches together
from cifar_resnet_fast import ops, reference

def operation(rank):
    generator = torch.Generator().manual_seed(0)
    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    x, shortcut, dout = 0.5 * draw(6, 5, 7, 6) - 2.3, draw(6, 4, 4, 3), draw(6, 4, 4, 3)
    weight, bn_weight, bn_bias = draw(4, 5, 3, 3), draw(4), draw(4)
    running = [draw(4), draw(4).abs()]
    half = slice(3 * rank, 3 * rank + 3)
    found = []
    for part, call in ((slice(None), reference.conv_bn_relu), (half, ops.conv_sync_bn_relu)):
        given = [x[part], shortcut[part], weight, bn_weight, bn_bias]
        given = [t.clone().requires_grad_() for t in given]
        statistics = [t.clone() for t in running]
        out = call(given[0], *given[2:], *statistics, stride=2, shortcut=given[1], relu=True,
                   momentum=0.1, eps=1e-5)
        dx, dshortcut, *rest = torch.autograd.grad(out, given, dout[part])
        if part is half:
            for gradient in rest:
                dist.all_reduce(gradient)
        else:
            out, dx, dshortcut = out[half], dx[half], dshortcut[half]
        found.append([out, dx, dshortcut, *rest, *statistics])
    for right, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)
    print("operation compared")

begin = run.Run.train
def compared(self, *arguments):
    operation(self.processes.rank)
    return begin(self, *arguments)
run.Run.train = compared
sys.exit(train.main(sys.argv[2:]))
"""
# the second process dies at once, or answers nothing any more
LOST = """
import os, signal, sys, time
from cifar_resnet_fast import train
from cifar_resnet_fast.training import engine

step = engine.Engine.train_step

def lost(self):
    if self.done == 6 and self._processes.rank == 1:
        if sys.argv[1] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
    step(self)

engine.Engine.train_step = lost
sys.exit(train.main(sys.argv[2:]))
"""
RUN = """
import sys
from cifar_resnet_fast import train
sys.exit(train.main(sys.argv[1:]))
"""
IS_TOLD_TO_STOP = """
import os, signal, sys
from cifar_resnet_fast import train
from cifar_resnet_fast.training import engine

step = engine.Engine.train_step

def stopped(self):
    if self.done == 2 and self._processes.rank == 1:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    step(self)

engine.Engine.train_step = stopped
sys.exit(train.main(sys.argv[1:]))
"""


def torchrun(tmp_path, script, *arguments, processes=2):
    """Start processes; without torchrun's own restarts and with one thread each."""
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), path, *map(str, arguments)]
    package = str(Path(cifar_resnet_fast.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


pytestmark = pytest.mark.usefixtures("one_thread")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main([*TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def spread(alone, tmp_path_factory):
    """By epoch and loss: the largest change that another order of a batch's images makes.

    The mathematics is the same, so the change is rounding, amplified by the steps so far. Eight
    steps amplify it to 4e-4 or 1e-3 of the loss, depending on the processor.
    """
    batch = Loader.batch
    found = [dict.fromkeys(LOSSES, 0.0) for _ in rows(alone)]
    for places in (1, 3, 5, 8, 11):

        def rolled(loader, step, places=places):
            images, labels = batch(loader, step)
            images = images.roll(places, 0).contiguous(memory_format=torch.channels_last)
            return images, labels.roll(places, 0)

        folder = tmp_path_factory.mktemp("rolled") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loader, "batch", rolled)
            assert main([*TINY, "--out", str(folder)]) == 0
        for largest, mine, yours in zip(found, rows(folder), rows(alone), strict=True):
            for name in LOSSES:
                largest[name] = max(largest[name], abs(mine[name] - yours[name]))
    return found


def assert_same_curve(ours, theirs, spread):
    """Losses differ at most twice as much as by another order of the images."""
    for mine, yours, allowed in zip(ours, theirs, spread, strict=True):
        assert mine["step"] == yours["step"]
        for name in LOSSES:
            rounding = torch.finfo(torch.float32).eps * yours[name]
            assert abs(mine[name] - yours[name]) <= 2 * allowed[name] + rounding, name
        for name in ("train_accuracy", "test_accuracy"):
            assert mine[name] == pytest.approx(yours[name], abs=1.01 / 64)


def test_two_processes_train_as_one(alone, spread, tmp_path):
    """With synchronised normalisation; weights are compared between the processes on the way."""
    out = tmp_path / "run"
    done = torchrun(tmp_path, SAME_WEIGHTS, tmp_path, *TINY, "--sync-bn", "--out", out)
    assert done.returncode == 0, done.stderr
    assert_same_curve(rows(out), rows(alone), spread)
    for step in (4, 8):
        ours = [torch.load(tmp_path / f"weights-{rank}-{step}.pt") for rank in (0, 1)]
        assert torch.equal(*ours)
    assert done.stdout.count("operation compared") == 2
    assert done.stdout.count("epoch 1/2") == 1, "one process shows what happens"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in alone.iterdir()
    )


def test_stop_of_one_stops_all_and_another_number_goes_on(alone, spread, tmp_path, capsys):
    """The second of two is told to stop; one process alone resumes from the checkpoint."""
    out = tmp_path / "run"
    arguments = [*TINY[:-2], "--epochs", "3", "--sync-bn", "--out", out, "--device", "cpu"]
    arguments[arguments.index("--batch-size") :][:2] = ["--batch-size-per-process", "8"]
    stopped = torchrun(tmp_path, IS_TOLD_TO_STOP, *arguments)
    assert stopped.returncode != 0
    assert f"to continue: --resume {out}" in stopped.stderr
    assert stopped.stderr.count("to continue") == 1
    assert json.loads((out / "config.json").read_text())["batch_size"] == 16
    assert rows(out)[-1]["step"] == 4, "agreed at the end of the epoch"
    assert torch.load(out / "checkpoint.pt")["processes"] == 2
    capsys.readouterr()
    assert main(["--resume", str(out)]) == 0
    assert "resumed by" not in capsys.readouterr().out, "the statistics are over all images"
    assert [row["step"] for row in rows(out)] == [4, 8, 12]
    assert_same_curve(rows(out)[:2], rows(alone), spread)


def test_another_number_of_processes_is_said(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out)]) == 0
    capsys.readouterr()
    resumed = torchrun(tmp_path, RUN, "--resume", out)
    assert resumed.returncode == 0, resumed.stderr
    assert (
        resumed.stdout.count(
            "by 2 processes after 1: batch normalisation is over 8 images instead of 16, so"
        )
        == 1
    )


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_process_that_is_lost(how, tmp_path):
    """In epoch 2; the other one says so and ends, and the checkpoint of epoch 1 is whole."""
    out = tmp_path / "run"
    began = time.monotonic()
    lost = torchrun(tmp_path, LOST, how, *TINY, "--timeout", 15, "--out", out)
    assert time.monotonic() - began < 150, "an end, not a hang"
    assert lost.returncode != 0
    assert "error: another process of the run has stopped or does not answer" in lost.stderr
    assert "files that were written before are complete" in lost.stderr
    assert torch.load(out / "checkpoint.pt")["engine"]["step"] == 4


# --- one of two, without the other: what the two exchange stays what it is ----------------------


@pytest.fixture
def one_of_two(monkeypatch, tmp_path):
    """Runs of this process take themselves for the first of two."""

    class OneOfTwo(Processes):
        def __init__(self, device="cpu", timeout=300.0):
            super().__init__(device, timeout)
            self.count, self._local_rank, self._host_group = 2, 0, None

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(train, "Processes", OneOfTwo)
    yield OneOfTwo
    if dist.is_initialized():
        dist.destroy_process_group()


class Graph:
    """Stands in for a captured graph; counts those that something still holds."""

    held = weakref.WeakSet()
    made = 0

    def __init__(self, function):
        self._function = function
        self._circle = self  # such as callbacks make
        Graph.made += 1
        Graph.held.add(self)

    def replay(self):
        self._function()


@pytest.fixture
def graphs(monkeypatch):
    """The stand-ins; and what was left of them whenever the processes parted, and how."""

    def capture(function, warm_up, times=3):
        warm_up()
        return Graph(function).replay

    parted = []

    def leave(self, failed=False):
        parted.append((len(Graph.held), failed))

    monkeypatch.setattr(run, "capture_for", lambda device: capture)
    monkeypatch.setattr(Processes, "leave", leave)
    monkeypatch.setattr(Graph, "made", 0)
    gc.collect()
    assert not Graph.held
    gc.disable()  # or the circles could go by chance
    yield parted
    gc.enable()


def at_step(number, act, monkeypatch):
    """Act in place of that step, in the frames of its replay."""
    step = Engine.run_step

    def acting(engine, dummy=False):
        if engine.done == number and not dummy:
            act()
        step(engine, dummy)

    monkeypatch.setattr(Engine, "run_step", acting)


def raised(error):
    def act():
        raise error

    return act


def test_graphs_are_gone_when_the_processes_part_at_the_end(one_of_two, graphs, tmp_path):
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 0
    assert Graph.made == 2, "steps and evaluation"
    assert graphs == [(0, False)]


def test_graphs_are_gone_after_several_runs(one_of_two, graphs, monkeypatch, tmp_path):
    found, begin = [], run.Run.train

    def counted(self, *arguments):
        found.append(len(Graph.held))
        return begin(self, *arguments)

    monkeypatch.setattr(run.Run, "train", counted)
    assert main([*TINY, "--runs", "2", "--out", str(tmp_path / "runs")]) == 0
    assert Graph.made == 4
    assert found == [0, 0], "before each run"
    assert graphs == [(0, False)]


def test_graphs_are_gone_when_the_user_stops(one_of_two, graphs, monkeypatch, tmp_path):
    at_step(6, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    arguments = [*TINY[:-2], "--epochs", "3", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 130
    assert graphs == [(0, False)]


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("CUDA error"), KeyboardInterrupt(), OSError("no space left")],
    ids=lambda error: type(error).__name__,
)
def test_graphs_are_gone_after_an_error(error, one_of_two, graphs, monkeypatch, tmp_path):
    """While the error is on its way, with all frames that it came through."""
    at_step(6, raised(error), monkeypatch)
    config = train.TrainConfig(
        dataset="shapes",
        limit=64,
        depth=8,
        batch_size=16,
        epochs=2,
        device="cpu",
        out=str(tmp_path / "run"),
    )
    with pytest.raises(type(error)):
        train.train(config)
    assert Graph.made == 2
    assert graphs == [(0, True)]


def test_graphs_are_gone_when_another_process_is(one_of_two, graphs, monkeypatch, tmp_path):
    at_step(6, raised(ProcessLostError("another process has stopped")), monkeypatch)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 1
    assert graphs == [(0, True)]


def test_after_a_failed_capture_of_the_evaluation_no_graph_of_steps_is_left(
    one_of_two, graphs, monkeypatch, tmp_path, capsys
):
    usual, captures = run.capture_for("cpu"), []

    def capture(function, warm_up, times=3):
        captures.append(function)
        if len(captures) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return usual(function, warm_up, times)

    monkeypatch.setattr(run, "capture_for", lambda device: capture)
    at_step(0, lambda: graphs.append(len(Graph.held)), monkeypatch)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 0
    assert Graph.made == 1
    assert graphs == [0, (0, False)]
    assert "slower than captured: operation not permitted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda error"),
        torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_steps_go_on_uncaptured_where_the_exchange_cannot_be_captured(
    error, one_of_two, graphs, monkeypatch, tmp_path, capsys
):
    """The sum raises while a capture is under way, and only then."""
    capturing, sums, exchange = [], [], dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        if capturing:
            raise error
        sums.append(tensor.numel())
        exchange(tensor, *arguments, **options)

    def capture(function, warm_up, times=3):
        warm_up()
        capturing.append(True)
        try:
            function()
        finally:
            capturing.clear()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(processes, "_is_capturing", lambda: bool(capturing))
    monkeypatch.setattr(run, "capture_for", lambda device: capture)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert f"steps run one kernel at a time, slower than captured: {error}" in shown
    assert [row["step"] for row in rows(tmp_path / "run")] == [4, 8]
    assert sums.count(max(sums)) == 1 + 8, "one warm-up, and all steps"


COMMUNICATION = {
    "nccl": dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1"),
    "store": dist.DistStoreError("wait timeout after 2000ms, keys: /default_pg/0"),
    "network": dist.DistNetworkError("failed to recv, got 0 bytes"),
    "gloo": RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"
    ),
    "gloo-after": RuntimeError("Application timeout caused pair closure"),
}
OWN = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "device": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "tensor": RuntimeError("Tensors must be contiguous"),
}


@pytest.mark.parametrize("error", COMMUNICATION.values(), ids=COMMUNICATION)
def test_errors_of_communication_are_a_lost_process(error, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_: raised(error)())
    with pytest.raises(ProcessLostError) as lost:
        all_reduce(torch.ones(1))
    assert str(lost.value) == (
        f"another process of the run has stopped or does not answer ({error})"
    )


@pytest.mark.parametrize("error", OWN.values(), ids=OWN)
def test_other_errors_are_no_lost_process(error, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_: raised(error)())
    with pytest.raises(type(error)) as own:
        all_reduce(torch.ones(1))
    assert own.value is error


@pytest.mark.parametrize("error", COMMUNICATION.values(), ids=COMMUNICATION)
def test_no_process_is_lost_during_a_capture(error, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_: raised(error)())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError) as own:
        all_reduce(torch.ones(1))
    assert own.value is error


@pytest.fixture
def gpu(monkeypatch):
    """A GPU and a clock that stand in: an event is reached at the time that ``ends`` has next."""
    clock = types.SimpleNamespace(now=100.0, ends=[], polls=0)

    class Event:
        def __init__(self, **_):
            self._end = clock.now + clock.ends.pop(0)

        def record(self):
            pass

        def query(self):
            clock.polls += 1
            return clock.now >= self._end

        def synchronize(self):
            raise AssertionError("nothing ends this wait")

    def sleep(seconds):
        clock.now += seconds

    clock.monotonic, clock.sleep = lambda: clock.now, sleep
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Processes, "_waits_with_limit", lambda self: self.count > 1)
    return clock


def test_a_wait_has_a_limit(one_of_two, gpu):
    gpu.ends = [float("inf")]
    with pytest.raises(ProcessLostError, match=r"\(the GPU has waited for it for 30 s\)"):
        one_of_two(timeout=30.0).wait()
    assert 130 <= gpu.now < 130.1


def test_the_limit_is_for_each_mark(one_of_two, gpu):
    """Ten steps of 20 s, all launched at once, are no silence of 30 s."""
    found = one_of_two(timeout=30.0)
    gpu.ends = [20.0 * (step + 1) for step in range(10)]
    for _ in range(9):
        found.mark()
    found.wait()
    assert 300 <= gpu.now < 300.1
    gpu.ends = [20.0, 51.0, 60.0]
    found.mark()
    found.mark()
    with pytest.raises(ProcessLostError):
        found.wait()
    assert 350 <= gpu.now < 350.1


def test_marks_that_are_reached_are_not_kept(one_of_two, gpu):
    found = one_of_two()
    gpu.ends = [0.0] * 100
    for _ in range(100):
        found.mark()
    assert len(found._marks) == 1


def test_one_process_waits_as_long_as_it_takes(gpu):
    waited = types.SimpleNamespace(synchronize=lambda: gpu.ends.append("waited"))
    Processes().mark()
    Processes().wait()
    Processes().wait(waited)
    assert gpu.ends == ["waited"]


def test_the_group_is_left_after_the_device_work(one_of_two, gpu, monkeypatch):
    left = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(gpu.now))
    gpu.ends = [5.0]
    one_of_two().leave()
    assert len(left) == 1
    assert left[0] >= 105
    gpu.ends = [float("inf")]
    with pytest.raises(ProcessLostError):
        one_of_two().leave()
    assert len(left) == 1
    monkeypatch.undo()
    one_of_two().leave(failed=True)
    assert not dist.is_initialized(), "cut without a wait"


@pytest.mark.parametrize(
    ("evaluates", "event"),
    [(True, 1), (True, 4), (True, 6), (True, 8), (False, 1), (False, 4), (False, 5)],
)
def test_silence_in_the_last_steps_of_an_epoch_ends_the_run(
    evaluates, event, one_of_two, gpu, monkeypatch, tmp_path, capsys
):
    """The device reaches all events but that one: of four steps, and of what follows."""
    gpu.ends = [0.0] * (event - 1) + [float("inf")] * 100
    sent = []
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: sent.append(event))
    settings = ["--timeout", "40"] + ([] if evaluates else ["--evaluate-every", "2"])
    assert main([*TINY, *settings, "--out", str(tmp_path / "run")]) == 1
    assert "does not answer (the GPU has waited for it for 40 s)" in capsys.readouterr().err
    assert 140 <= gpu.now < 140.1
    assert rows(tmp_path / "run") == [], "before the epoch's row"
    assert bool(sent) == (event > 5), "no other exchange waits behind a step that does not end"


def test_one_process_exchanges_nothing():
    processes = Processes()
    tensor = torch.ones(3)
    processes.all_reduce(tensor)
    processes.spread(tensor)
    assert tensor.tolist() == [1, 1, 1]
    assert processes.tell("word") == "word"
    assert processes.any(True)
    assert not processes.any(False)
    with processes.first_here_first():
        processes.leave()


def test_rules(monkeypatch, tmp_path, capsys):
    for arguments, message in (
        (["--sync-bn", "--implementation", "cuda"], "--sync-bn must be off with"),
        (
            ["--batch-size-per-process", "8"],
            "--batch-size must be left out if --batch-size-",
        ),
        (["--timeout", "0"], "--timeout must be more than 0"),
    ):
        with pytest.raises(SystemExit):
            main([*TINY, *arguments, "--out", str(tmp_path / "run")])
        assert message in capsys.readouterr().err
