"""The engine: a captured step is the eager one, and capturing leaves no trace."""

import sys

import pytest
import torch
from rehearsal import Rehearsal

from cifar_resnet_fast import FastResNet
from cifar_resnet_fast.data.loader import Loader
from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.processes import Processes
from cifar_resnet_fast.training.capture import CudaGraphs, Readback
from cifar_resnet_fast.training.engine import Engine, EngineGroup

STEPS, EPOCHS = 3, 2  # 3 batches of 4 an epoch, one picture left over


pytestmark = pytest.mark.usefixtures("one_thread")


def make_engine(device="cpu", dtype=torch.float32, loader=None, implementation="auto", **settings):
    torch.manual_seed(0)
    device = torch.device(device)
    images = torch.randint(0, 256, (13, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (13,))
    statistics = torch.full((3,), 0.5), torch.full((3,), 0.25)
    loading = {"batch_size": 4, "device": device, "dtype": dtype, **(loader or {})}
    return Engine(
        FastResNet(8, implementation=implementation),
        Loader(images, labels, *statistics, **loading),
        Loader(images, labels, *statistics, **loading, augmented=False),
        device=device,
        dtype=dtype,
        schedule=0.1 / (1 + torch.arange(STEPS * EPOCHS)),
        processes=Processes(),
        **{"seed": 7, "momentum": 0.9, "weight_decay": 1e-4, **settings},
    )


def evaluate(engine):
    engine.start_evaluation()
    return engine.evaluation()


def tensors(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value.clone()}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, item in pairs:
        if isinstance(item, (torch.Tensor, dict, list, tuple)):
            found |= tensors(item, f"{name}.{key}")
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def capture_on(device):
    return CudaGraphs() if device.type == "cuda" else Rehearsal()


VARIANTS = {
    "plain": {},
    "everything": {
        "nesterov": True,
        "decay_vectors": False,
        "label_smoothing": 0.1,
        "loss_scale": 128.0,
        "ema": 0.9,
        "loader": {"cutout": 8},
    },
    "recipe": {
        "nesterov": True,
        "ema": 0.9,
        "ema_start": 2,
        "mirrored": True,
        "loader": {"flip": "alternating"},
    },
    "clip-floor": {"clip": 0.5, "ema": 0.9, "ema_floor": 0.2},
    "lookahead": {"lookahead": 2},
    "muon": {"muon_rate": 0.5, "nesterov": True},
    "norm-biases": {"norm_bias_factor": 8.0, "decay_vectors": False},
    "mixed": {"loader": {"mixup": 1.0, "cutmix": 1.0}},
    "mixed-window": {"loader": {"mixup": 1.0, "resident": False}},
    "trivial-augment": {"loader": {"trivial_augment": True, "mixup": 1.0}},
    "bf16": {"dtype": torch.bfloat16},
    "window": {"loader": {"resident": False}},
}


def train(engine, steps=STEPS * EPOCHS):
    """The state after each step, and what the evaluations gave."""
    scores, states = [], []
    while engine.done < steps:
        engine.train_step()
        states.append(tensors(engine.state_dict()))
        if engine.done % STEPS == 0:
            scores.append(evaluate(engine))
    return states, scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_steps_are_the_eager_ones(variant, monkeypatch):
    eager, captured = make_engine(**VARIANTS[variant]), make_engine(**VARIANTS[variant])
    rehearsal = Rehearsal()
    assert captured.capture(rehearsal) is None
    assert rehearsal.operations > 100
    states, scores = train(eager)

    def unreachable(*_, **__):
        raise AssertionError("a replay runs no Python of the step")

    monkeypatch.setattr(Engine, "run_step", unreachable)
    monkeypatch.setattr(FastResNet, "forward", unreachable)
    monkeypatch.setattr(Loader, "batch", unreachable)
    replayed, replayed_scores = train(captured)
    for ours, theirs in zip(replayed, states, strict=True):
        assert_same(ours, theirs)
    assert replayed_scores == scores
    assert rehearsal.replays == EPOCHS * (STEPS + 4), "13 pictures are evaluated in 4 batches"


def chosen(implementation, monkeypatch):
    """Have a step's operations but for the layers run in this implementation."""
    for module in ("_load_batch", "_sgd", "_record_step", "_linear_cross_entropy"):
        module = sys.modules[f"cifar_resnet_fast.ops.{module}"]
        monkeypatch.setattr(module, "choose", lambda *_: implementation)
    if implementation == "triton" and not torch.cuda.is_available():
        # where each interpreted program is slow, whatever its size
        monkeypatch.setattr("cifar_resnet_fast.kernels.sgd.BLOCK", 32768)


def test_triton_kernels_are_replayed(device, monkeypatch):
    """The batch and the update by kernels, interpreted or on a GPU; the layers in PyTorch."""
    settings = {"loader": {"cutout": 8}, "implementation": "reference"}

    chosen("reference", monkeypatch)
    usual, _ = train(make_engine(device, **settings), 2)
    chosen("triton", monkeypatch)
    engine = make_engine(device, **settings)
    assert engine.capture(capture_on(device)) is None
    states, _ = train(engine, 2)
    for ours, theirs in zip(states, usual, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_trunk_is_replayed(kernels_run, device):
    """The CUDA kernels of the network's body, in the emulation, behind the bindings of a GPU."""
    kernels_run("cuda")
    settings = {"dtype": torch.float16, "loss_scale": 128.0, "implementation": "cuda"}
    eager, captured = make_engine(device, **settings), make_engine(device, **settings)
    assert captured.capture(capture_on(device)) is None
    states, scores = train(eager, STEPS)
    replayed, replayed_scores = train(captured, STEPS)
    for ours, theirs in zip(replayed, states, strict=True):
        assert_same(ours, theirs)
    assert replayed_scores == scores
    assert int(eager.optimizer.skipped) == 0
    usual, _ = train(make_engine(device, **settings | {"implementation": "reference"}), STEPS)
    loss = [state[".metrics"][0, STEPS - 1] for state in (states[-1], usual[-1])]
    torch.testing.assert_close(*loss, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("at", [0, 4], ids=["new", "resumed"])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_capturing_leaves_no_trace(variant, at):
    engine = make_engine(**VARIANTS[variant])
    train(engine, at)
    before, score = tensors(engine.state_dict()), evaluate(engine)
    assert engine.capture(Rehearsal()) is None
    assert_same(tensors(engine.state_dict()), before)
    assert evaluate(engine) == score
    assert engine.done == at


def test_warm_up_sees_no_label():
    engine = make_engine()
    # any use as a class is an error
    engine._training._labels = torch.full_like(engine._training._labels, 10**6)

    def only_warms_up(function, warm_up, times=3):
        warm_up()
        return function

    assert engine.capture(only_warms_up) is None
    with pytest.raises(IndexError, match="out of bounds"):
        engine.train_step()


def specialised(value):
    """What of an argument makes Triton compile another kernel."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return value


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("at", [0, STEPS * EPOCHS - 1], ids=["new", "last-step"])
def test_warm_up_launches_all_that_is_captured(at, implementation, device, monkeypatch):
    """A kernel is loaded at its first launch, which a capture need not allow."""
    engine = make_engine(device, ema=0.9, implementation="reference")
    train(engine, at)
    chosen(implementation, monkeypatch)
    start, launched, compared = launch.launch, set(), []

    def seen(kernel, grid, **arguments):
        name = kernel.fn.__name__
        launched.add((name, *((key, specialised(value)) for key, value in arguments.items())))
        start(kernel, grid, **arguments)

    def capture(function, warm_up, times=3):
        found = []
        for work in (warm_up, function):
            launched.clear()
            with torch.profiler.profile() as profile:
                work()
            operations = {event.name for event in profile.events() if "::" in event.name}
            found.append((operations, set(launched)))
        compared.append(found)
        return function

    monkeypatch.setattr(launch, "launch", seen)
    assert engine.capture(capture) is None
    assert len(compared) == 2, "steps and evaluation"
    for warmed, captured in compared:
        assert len(captured[0]) > 10
        assert captured[0] <= warmed[0]
        assert captured[1] <= warmed[1]
    kernels = {name for name, *_ in compared[0][1][1]}
    assert ("_record_step_kernel" in kernels) == (implementation == "triton")


class AsksTheDevice(FastResNet):
    def forward(self, x):
        return super().forward(x * 1 if x.sum() > 0 else x)


def test_capture_that_fails_leaves_eager_steps(monkeypatch):
    usual, _ = train(make_engine())
    engine = make_engine()
    engine.model.__class__ = AsksTheDevice
    reason = engine.capture(Rehearsal())
    assert reason.startswith("operation not permitted when stream is capturing: aten._local_scal")
    assert "\n" not in reason
    states, _ = train(engine)
    for ours, theirs in zip(states, usual, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x[torch.tensor(1)],
    ],
    ids=["item", "nonzero", "mask", "unique", "equal", "host-tensor", "index-by-value"],
)
def test_the_rehearsal_refuses_what_a_graph_would(refused):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted"):
        Rehearsal()(lambda: refused(x), lambda: None)


def test_the_rehearsal_repeats_no_python():
    """What Python counts stays as it was when captured; what the device counts goes on."""
    counter, out, calls = torch.zeros(1), torch.zeros(2), []

    def function():
        calls.append(None)
        counter.add_(1)
        out[:1].fill_(len(calls))
        out[1:].copy_(counter * 2)

    replay = Rehearsal()(function, function, times=1)
    replay()
    replay()
    assert len(calls) == 2
    assert out.tolist() == [2, 2 * 4]


def test_capture_that_fails_without_a_message_is_named():
    def refused(function, warm_up, times=3):
        raise RuntimeError

    assert make_engine().capture(refused) == "RuntimeError"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA out of memory. (originally from call(...) API call failed at ops.h)"),
    ],
    ids=["torch", "extension"],
)
def test_out_of_memory_is_no_reason_to_go_on(error):
    engine = make_engine()
    before = tensors(engine.state_dict())

    def full(function, warm_up, times=3):
        warm_up()
        raise error

    with pytest.raises(type(error)):
        engine.capture(full)
    assert_same(tensors(engine.state_dict()), before)


def test_metrics_are_those_of_the_steps():
    engine = make_engine(ema=0.5)
    for step in range(STEPS * EPOCHS):
        engine._training.prepare(step, 7)
        images, labels = engine._training.batch(torch.tensor(step))
        with torch.no_grad():
            logits = engine.model.train()(
                images
            )  # moves the running statistics, which no loss has
        engine.train_step()
        engine.ask_metrics()
        assert engine.metrics_arrived()
        loss, hits, skipped = engine.read_metrics()[:, step % STEPS].tolist()
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
        assert hits == (logits.argmax(1) == labels).sum()
        assert skipped == 0
        # already that of the step to come
        assert engine.optimizer.lr == engine._schedule[min(step + 1, STEPS * EPOCHS - 1)]


def test_evaluation_is_the_models():
    engine = make_engine()
    train(engine, 2)
    loader = engine._evaluator._loader
    for _ in range(2):
        loss, accuracy = evaluate(engine)
        model = engine.model.eval()
        batches = [loader.batch(torch.tensor(step)) for step in range(4)]
        images = torch.cat([images for images, _ in batches])[:13]
        labels = torch.cat([labels for _, labels in batches])[:13]
        with torch.no_grad():
            logits = model(images)
        right = torch.nn.functional.cross_entropy(logits, labels).item()
        assert loss == pytest.approx(right, rel=1e-6)
        assert accuracy == (logits.argmax(1) == labels).sum().item() / 13


def test_average_starts_as_a_copy():
    engine = make_engine(ema=0.9, ema_start=2)
    flats = engine._averaged.flats
    for step in range(STEPS * EPOCHS):
        before = [flat.clone() for flat in flats]
        engine.train_step()
        for average, source, last in zip(flats, engine._flats, before, strict=True):
            if step > 2 and average.is_floating_point():
                source = torch.lerp(last, source, torch.tensor(0.1))
                torch.testing.assert_close(average, source, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(average, source), step


def test_mirror_images_are_scored_too():
    engine = make_engine(mirrored=True)
    train(engine, 2)
    loader, model = engine._evaluator._loader, engine.model
    loss, accuracy, both = evaluate(engine)
    assert (loss, accuracy) == evaluate(make_engine_at(engine))
    model.eval()
    hits = 0
    for step in range(4):
        images, labels = loader.batch(torch.tensor(step))
        with torch.no_grad():
            logits = model(images) + model(images.flip(3))
        hits += (logits.argmax(1) == labels).sum().item()
    assert both == hits / 13


def make_engine_at(engine):
    """Another one in the same state, which scores no mirror images."""
    other = make_engine()
    other.load_state_dict(engine.state_dict())
    return other


def test_modules_stay_on_the_flat_buffers():
    engine = make_engine(ema=0.9)
    for model, flats in (
        (engine.model, engine._flats),
        (engine.evaluated_model, engine._averaged.flats),
    ):
        homes = {flat.untyped_storage().data_ptr() for flat in flats}
        assert len(homes) == 3, "parameters, statistics, counters"
        for tensor in (*model.parameters(), *model.buffers()):
            assert tensor.untyped_storage().data_ptr() in homes


def test_readback_keeps_what_was_asked_for():
    source = torch.zeros(3)
    readback = Readback(source)
    readback.ask()
    source.fill_(1)
    assert readback.arrived()
    assert not readback.values().any()


def test_readback_waits_as_it_is_told():
    """On a GPU with several processes a wait has a limit."""
    waited = []
    readback = Readback(torch.zeros(3), waited.append)
    readback._event = "the copy"
    readback.values()
    assert waited == ["the copy"]
    engine = make_engine()
    assert engine._readback._wait == engine._processes.wait


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_graph_steps_are_the_eager_ones(variant, device):
    eager = make_engine(device, **VARIANTS[variant])
    captured = make_engine(device, **VARIANTS[variant])
    before = tensors(captured.state_dict())
    assert captured.capture(CudaGraphs()) is None
    assert_same(tensors(captured.state_dict()), before)
    states, scores = train(eager)
    replayed, replayed_scores = train(captured)
    for ours, theirs in zip(replayed, states, strict=True):
        assert_same(ours, theirs)
    assert replayed_scores == scores


@pytest.mark.gpu
@pytest.mark.own_process
def test_cuda_graph_refuses_and_the_steps_go_on(device):
    engine = make_engine(device)
    engine.model.__class__ = AsksTheDevice
    assert engine.capture(CudaGraphs()) is not None
    states, _ = train(engine)
    assert all(state[".metrics"].isfinite().all() for state in states)


@pytest.mark.gpu
def test_a_step_is_one_launch(device):
    """Between two readings the host does nothing but launch the graph."""
    engine = make_engine(device)
    assert engine.capture(CudaGraphs()) is None
    engine.train_step()
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        engine.train_step()
    calls = [event.name for event in profile.events() if event.name.startswith("cu")]
    launches = [name for name in calls if "Launch" in name or "Memcpy" in name]
    assert launches == ["cudaGraphLaunch"]


# --- several at once ---------------------------------------------------------------------------


def of_seed(seed, **settings):
    """An engine whose weights, batches, rate and settings are not those of another seed."""
    engine = make_engine(seed=seed, **settings)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1 + seed / 100)
    return engine


MEMBERS = (
    {"weight_decay": 1e-3},
    {"ema": 0.9, "loader": {"cutout": 8}},
    {"nesterov": True, "label_smoothing": 0.1},
    {"loader": {"mixup": 1.0, "cutmix": 1.0}},
)


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "in turn"])
def test_steps_at_once_are_the_steps_alone(captured, monkeypatch):
    alone = [of_seed(seed, **settings) for seed, settings in enumerate(MEMBERS)]
    group = [of_seed(seed, **settings) for seed, settings in enumerate(MEMBERS)]
    before = [tensors(engine.state_dict()) for engine in group]
    together, rehearsal = EngineGroup(group), Rehearsal()
    if captured:
        assert together.capture(rehearsal) is None
        assert rehearsal.branches == [4]
        for engine, state in zip(group, before, strict=True):
            assert_same(tensors(engine.state_dict()), state)
        monkeypatch.setattr(FastResNet, "forward", None)  # a replay runs no Python of the step
    replayed = []
    for _ in range(STEPS + 1):  # into the second epoch
        together.train_step()
        replayed.append([tensors(engine.state_dict()) for engine in group])
    monkeypatch.undo()
    assert rehearsal.replays == captured * (STEPS + 1), "one launch a step"
    for states in replayed:
        for engine, state in zip(alone, states, strict=True):
            engine.train_step()
            assert_same(tensors(engine.state_dict()), state)


def test_rehearsal_sees_branches_that_touch_each_other():
    shared, rehearsal = torch.ones(1), Rehearsal()

    def add():
        shared.mul_(2)
        shared.add_(1)

    def read():
        shared.mul_(3)
        shared.add_(2)

    replay = rehearsal(rehearsal.side_by_side([add, read]), lambda: None)
    after_capture = shared.clone()
    shared.fill_(1)
    replay()
    assert not torch.equal(shared, after_capture)


def test_steps_at_once_that_cannot_be_captured_run_in_turn(monkeypatch):
    engines = [of_seed(0), of_seed(1)]
    together = EngineGroup(engines)

    class Refusing(Rehearsal):
        def __call__(self, function, warm_up, times=3):
            warm_up()
            raise RuntimeError("operation not permitted\nmore")

    assert together.capture(Refusing()) == "operation not permitted"
    other = of_seed(0)
    together.train_step()
    other.train_step()
    assert_same(tensors(engines[0].state_dict()), tensors(other.state_dict()))
