"""Training steps and forward passes: the package's, and plain PyTorch's beside them (layer 4).

Plain PyTorch is the same network of PyTorch's own operations: eager or under torch.compile, in
float32 or with autocast, perhaps replayed from a CUDA graph, on one batch that is there already.
The package's step is the engine's, which also makes its batch. All start from the same weights and
the same batch.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_resnet_fast import ops
from cifar_resnet_fast.data.loader import Loader
from cifar_resnet_fast.processes import Processes
from cifar_resnet_fast.resnet import FastResNet
from cifar_resnet_fast.training.capture import CudaGraphs, capture_for
from cifar_resnet_fast.training.engine import DTYPES, Engine
from cifar_resnet_fast.verification.budget import Unavailable, check, import_rival

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
LOSS_SCALE = 1024.0  # of float16: keeps small gradients
EPOCH_STEPS = 48  # of the recipe: so often the package draws an epoch
_SCHEDULED_STEPS = 100_000  # more than are ever timed
PACKAGE = ("auto", *(name for name in ops.IMPLEMENTATIONS if name != "reference"))
CHECKED_PICTURES = 128  # of a training step: float64 needs eight times the memory or more


@dataclass(frozen=True)
class Problem:
    """Which network, on how many pictures, in which dtype, where."""

    depth: int
    batch: int
    dtype: str
    device: torch.device

    def model(self, implementation: str) -> FastResNet:
        """The network with its first weights, the same ones every time, in float32."""
        torch.manual_seed(0)
        return FastResNet(self.depth, implementation=implementation).to(self.device)

    def loader(self, dtype: torch.dtype, augmented: bool = True) -> Loader:
        """Over random pictures, the same ones every time."""
        count = self.batch * (EPOCH_STEPS if self.device.type == "cuda" else 1)
        pictures, labels = _random_pictures(count)
        mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
        return Loader(
            pictures,
            labels,
            mean,
            std,
            batch_size=self.batch,
            device=self.device,
            dtype=dtype,
            augmented=augmented,
        )

    def pictures(self) -> tuple[Tensor, Tensor]:
        """[N, 3, 32, 32] float32 and [N] int64: the loader's first batch."""
        loader = self.loader(torch.float32)
        loader.prepare(0)
        step = torch.zeros((), dtype=torch.int64, device=self.device)
        images, labels = loader.batch(step)
        return images, labels


# the step's and the check's: 150 MB at batch 1024, which take most of a second to draw
@functools.lru_cache(maxsize=2)
def _random_pictures(count: int) -> tuple[Tensor, Tensor]:
    """[count, 32, 32, 3] uint8 and [count] int64 on the CPU, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return pictures, torch.randint(10, (count,), generator=generator)


@dataclass(frozen=True)
class Plain:
    """How plain PyTorch runs: dtype None is autocast in the problem's, else all of it is in it.

    With ``tensorrt`` TensorRT runs it, by torch.compile's backend of torch_tensorrt.
    """

    dtype: torch.dtype | None = None
    channels_last: bool = True
    graph: bool = False
    compile_mode: str | None = None
    tensorrt: bool = False


FP32 = Plain(torch.float32, channels_last=False)
EXACT = Plain(torch.float64)
EAGER = Plain()
PLAIN = {
    "eager fp32": FP32,
    "eager": EAGER,
    "eager graph": Plain(graph=True),
    "compile graph": Plain(graph=True, compile_mode="default"),
    # torch.compile's own graphs would copy the pictures; ours holds the whole step
    "compile max-autotune graph": Plain(graph=True, compile_mode="max-autotune-no-cudagraphs"),
}


class TrainingStep:
    """One training step: forward, loss, backward, SGD. ``replays``: from a graph of its own."""

    def __init__(self, step: Callable[[], Tensor], model: FastResNet, replays: bool = False):
        self._step, self._model, self.replays = step, model, replays

    def __call__(self) -> Tensor:
        """Take a step; returns its loss."""
        return self._step()

    def first_update(self) -> dict[str, Tensor]:
        """Take the first step; how it changes the weights, all of them in one row."""

        def weights() -> Tensor:
            return torch.cat([p.detach().flatten() for p in self._model.parameters()])

        before = weights().clone()
        self()
        return {"update": weights() - before}


def verify_step(problem: Problem, name: str) -> None:
    """Raise WrongResult if the first step is further from float64 than eager may be."""
    small = replace(problem, batch=min(problem.batch, CHECKED_PICTURES))
    ours = make_step(small, name).first_update()
    eager, exact = (plain_step(small, how).first_update() for how in (EAGER, EXACT))
    check(ours, eager, exact, maximum=False)


def make_step(problem: Problem, name: str) -> TrainingStep:
    """The training step of a name of ``PACKAGE`` or ``PLAIN``."""
    return package_step(problem, name) if name in PACKAGE else plain_step(problem, PLAIN[name])


def plain_step(problem: Problem, how: Plain) -> TrainingStep:
    """A training step in plain PyTorch."""
    model, images, labels = _plain_network(problem, how)
    model.train()
    fused = problem.device.type == "cuda"
    optimizer = torch.optim.SGD(
        model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused
    )
    scale = LOSS_SCALE if how.dtype is None and problem.dtype == "fp16" else 1.0
    forward = _compiled(model, how)

    def step() -> Tensor:
        with _autocast(problem, how):
            logits = forward(images)
        loss = F.cross_entropy(logits if logits.dtype == torch.double else logits.float(), labels)
        optimizer.zero_grad()
        (loss * scale).backward()
        if scale != 1:
            torch._foreach_mul_(
                [p.grad for p in model.parameters() if p.grad is not None], 1 / scale
            )
        optimizer.step()
        return loss.detach()

    if not how.graph:
        return TrainingStep(step, model)
    initial = [value.clone() for value in model.state_dict().values()]

    def restart() -> None:
        """As if no step had been taken: momentum starts from the first gradient either way."""
        for value, first in zip(model.state_dict().values(), initial, strict=True):
            value.copy_(first)
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()

    replay = _captured(step)
    restart()
    return TrainingStep(replay, model, replays=True)


def package_engine(
    problem: Problem, implementation: str, *, seed: int = 0, captured: bool = True
) -> Engine:
    """The package's engine, as ``cifar_resnet_fast.train`` has it, before its first step.

    Args:
        seed: of the batches; the first weights are the same every time
        captured: replay a CUDA graph, if the device has such

    Raises:
        Unavailable: the network does not run in ``implementation`` here
        RuntimeError: it fails, or a CUDA graph cannot hold it
    """
    dtype = DTYPES[problem.dtype]
    engine = Engine(
        problem.model(implementation),
        problem.loader(dtype),
        problem.loader(dtype, augmented=False),
        device=problem.device,
        dtype=dtype,
        schedule=torch.full((_SCHEDULED_STEPS,), LR),
        seed=seed,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        loss_scale=LOSS_SCALE if problem.dtype == "fp16" else 1.0,
        processes=Processes(problem.device.type),
    )
    with _unavailable(), torch.no_grad(), _autocast(problem, EAGER):
        engine.model.eval()(torch.zeros(1, 3, 32, 32, device=problem.device, dtype=dtype))
    capture = capture_for(problem.device) if captured else None
    reason = engine.capture(capture) if capture is not None else None
    if reason is not None:  # it would train on without a graph
        raise RuntimeError(f"the step cannot be captured: {reason}")
    return engine


def package_step(problem: Problem, implementation: str) -> TrainingStep:
    """The package's training step; raises as ``package_engine``."""
    engine = package_engine(problem, implementation)

    def step() -> Tensor:
        engine.train_step()
        return engine.metrics[0, (engine.done - 1) % engine.metrics.shape[1]]

    return TrainingStep(step, engine.model, replays=problem.device.type == "cuda")


def plain_inference(problem: Problem, how: Plain) -> tuple[Callable[[], Tensor], bool]:
    """A forward pass in evaluation in plain PyTorch, and whether it replays a graph of its own."""
    model, images, _ = _plain_network(problem, how)
    _settle(model, images)
    forward = _compiled(model.eval(), how)

    @torch.no_grad()
    def run() -> Tensor:
        with _autocast(problem, how):
            return forward(images)

    return (_captured(run), True) if how.graph else (run, False)


def tensorrt_inference(problem: Problem) -> tuple[Callable[[], Tensor], bool]:
    """A forward pass in evaluation by TensorRT, in a CUDA graph of its own.

    Returns as ``plain_inference``.

    Raises:
        Unavailable: torch_tensorrt cannot be imported
    """
    torch_tensorrt = import_rival("torch_tensorrt", "torch-tensorrt")
    torch_tensorrt.runtime.set_cudagraphs_mode(True)
    run, _ = plain_inference(problem, Plain(DTYPES[problem.dtype], tensorrt=True))
    return run, True


def package_inference(problem: Problem, implementation: str) -> tuple[Callable[[], Tensor], bool]:
    """The package's forward pass in evaluation, on a GPU in a CUDA graph; as ``plain_inference``.

    Raises:
        Unavailable: the network does not run in ``implementation`` here
    """
    model, (images, _) = problem.model(implementation), problem.pictures()
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    settled = problem.model("reference")
    _settle(settled, images)
    model.load_state_dict(settled.state_dict())
    model.eval()

    @torch.no_grad()
    def run() -> Tensor:
        with _autocast(problem, EAGER):
            return model(images)

    with _unavailable():
        run()
    return (_captured(run), True) if problem.device.type == "cuda" else (run, False)


def _plain_network(problem: Problem, how: Plain) -> tuple[FastResNet, Tensor, Tensor]:
    model, (images, labels) = problem.model("reference"), problem.pictures()
    form = torch.channels_last if how.channels_last else torch.contiguous_format
    dtype = how.dtype or torch.float32
    model = model.to(dtype).to(memory_format=form)
    return model, images.to(dtype, memory_format=form), labels


@torch.no_grad()
def _settle(model: FastResNet, images: Tensor) -> None:
    """Set the running statistics to the pictures' own, so that activations keep their size.

    Computed in float32 whatever the model's dtype is: all of them then have the same.
    """
    twin = FastResNet(model.depth, implementation="reference").to(images.device)
    twin.load_state_dict(model.state_dict())
    for module in twin.train().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    more = torch.Generator(images.device).manual_seed(2)
    shape = (64, *images.shape[1:])  # one picture alone has no variance to speak of
    twin(torch.randn(shape, device=images.device, generator=more))
    model.load_state_dict(twin.state_dict())


def _compiled(model: FastResNet, how: Plain) -> Callable[[Tensor], Tensor]:
    if how.compile_mode is None and not how.tensorrt:
        return model
    torch._dynamo.reset()  # a function's code is compiled only so often before it runs eagerly
    if how.tensorrt:
        # in the model's own dtypes; and what cannot be built fails, or PyTorch would run it
        options: dict[str, Any] = {
            "use_explicit_typing": True,
            "pass_through_build_failures": True,
        }
        return torch.compile(
            model, backend="torch_tensorrt", fullgraph=True, dynamic=False, options=options
        )
    return torch.compile(model, fullgraph=True, dynamic=False, mode=how.compile_mode)


def _autocast(problem: Problem, how: Plain) -> contextlib.AbstractContextManager:
    if how.dtype is not None or problem.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(problem.device.type, dtype=DTYPES[problem.dtype])


def _captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` as one launch of a CUDA graph; its result is overwritten by the next launch."""
    results: list[Tensor] = []  # what it returned last is what the graph writes

    def function() -> None:
        results[:] = [run()]

    launch = CudaGraphs()(function, warm_up=function)

    def replay() -> Tensor:
        launch()
        return results[0]

    return replay


@contextlib.contextmanager
def _unavailable():
    """What ``ops`` says of an implementation that cannot run here, or not this, as Unavailable."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        if "cannot run" not in str(error) and "for implementation" not in str(error):
            raise
        raise Unavailable(str(error)) from None
