"""The trunk's kernels, one by one: ``python -m bench.trunk``.

Every kernel of ``ops._trunk.schedule`` at each place where the network has it, and the weights'
preparation: ``cuda``, ``triton`` and plain PyTorch, unfused (``eager``). A training step of a
ResNet-20, which has every place that deeper networks have, runs on an implementation's kernels and
each call is kept with its tensors; one is then held against float64 and timed by repeating it. So
a kernel gets what it gets in the network: sums and slabs that its predecessor left, in a form of
their own, which is why these are no cases of ``bench.kernels``.

A step of an implementation is timed, not a launch. ``cuda`` has one for each: it merges the sums
that the kernel before left, and adds up that one's weight gradient, in its first microseconds.
(Only behind the stem's gradient, the last, there is a launch that adds up its own.) ``triton``
launches several: it merges the sums, adds up the weight gradient, and makes option A's shortcut.

The calls stand back to back in a CUDA graph, so the time is that of one in a chain, as in the
network: on Hopper a kernel of ``cuda`` may start before the one before it has ended, and one of
the backward pass adds up the slabs that the call before it wrote, while they are in cache. Before
a convolution there is always another launch than the weights' preparation, which it would not
wait for (csrc/trunk.h).
"""

import copy
import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from bench import roofline, traffic
from bench.cards import Card
from bench.cases import Draw
from bench.kernels import EAGER, parse, sizes
from bench.measure import Call, check, without_tf32
from bench.suite import Suite, Unavailable, flags
from bench.traffic import SIDES, Sizes, Work
from cifar_resnet_fast import ops
from cifar_resnet_fast.ops._trunk import autograd as trunk_autograd
from cifar_resnet_fast.ops._trunk import plain as plain_kernels
from cifar_resnet_fast.ops._trunk import schedule
from cifar_resnet_fast.reference import Unit
from cifar_resnet_fast.resnet import STAGE_CHANNELS
from cifar_resnet_fast.training.engine import DTYPES

IMPLEMENTATIONS = ("cuda", "triton", EAGER)
DEPTH = 20
WEIGHTS_DEPTH = 56
RESULTS = {  # of the methods; the sums are seen in what the next kernel makes of them
    "stem_forward": ("y", "sums"),
    "f1": ("x", "norm", "y", "sums"),
    "f2": ("norm", "y", "sums"),
    "head_forward": ("norm", "pooled", "mask"),
    "head_backward": ("dz", "sums"),
    "b2": ("dz", "sums"),
    "b1": ("dz", "sums"),
    "stem_backward": (),
}


@dataclass(frozen=True)
class Place:
    """Where the network has a kernel.

    kernel, place: names, for people
    position: in ``roofline.trunk`` of a ResNet-20; None: the weights of a ResNet-56
    """

    kernel: str
    place: str
    position: int | None

    def work(self, batch: int | None, dtype: str) -> Work:
        if self.position is None:
            numbers = sum(9 * C * K for C, K in roofline.convolutions(WEIGHTS_DEPTH))
            return traffic.weights(Sizes(1, dtype), numbers)
        return launches(batch, dtype)[self.position]


def launches(batch: int, dtype: str) -> list[Work]:
    """Those of ``record``'s calls."""
    forward, backward = roofline.trunk(DEPTH, batch, dtype)
    return forward + backward


def places() -> list[Place]:
    """The weights, and then each kernel at each place once, in the order of a training step."""
    first = {}
    for position, work in enumerate(launches(1, "fp16")):
        first.setdefault((work.kernel, work.place), position)
    scheduled = [Place(*names, position) for names, position in first.items()]
    return [Place("weights", f"ResNet-{WEIGHTS_DEPTH}", None), *scheduled]


# --- a training step, call by call --------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A training step's inputs; ``dpooled`` is what comes back to the pooled activation."""

    units: list[Unit]
    pictures: Tensor
    dpooled: Tensor


def draw(
    depth: int, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    draw = Draw(device, torch.Generator(device).manual_seed(seed))
    units = [
        Unit(
            weight=(2 / (9 * C)) ** 0.5 * draw.vector(K, C, 3, 3),
            bn_weight=1 + 0.1 * draw.vector(K),
            bn_bias=0.1 * draw.vector(K),
            running_mean=torch.zeros(K, device=device),
            running_var=torch.ones(K, device=device),
            momentum=0.1,
            eps=1e-5,
        )
        for C, K in roofline.convolutions(depth)
    ]
    pictures = draw.activation(batch, 3, SIDES[0], SIDES[0], dtype=dtype)
    return Problem(units, pictures, draw.vector(batch, STAGE_CHANNELS[-1]))


@dataclass(frozen=True)
class Step:
    """A call of one of ``schedule.Kernels``' methods, to be repeated.

    kernels: as they were when it came
    units: theirs, whose running statistics it updates
    method, arguments: of the call, by name
    """

    kernels: schedule.Kernels
    units: list[Unit]
    method: str
    arguments: dict[str, Tensor | int | None]

    def on(self, kernels: schedule.Kernels) -> tuple | None:
        return getattr(kernels, self.method)(**self.arguments)


class Recorder:
    """Kernels that add every call to ``steps``."""

    def __init__(self, kernels: schedule.Kernels, units: list[Unit], steps: list[Step]):
        self._kernels, self._units, self._steps = kernels, units, steps

    def __getattr__(self, name: str):
        value = getattr(self._kernels, name)
        if name not in RESULTS:
            return value

        def recorded(*args, **kwargs):
            arguments = inspect.signature(value).bind(*args, **kwargs).arguments
            self._steps.append(Step(copy.copy(self._kernels), self._units, name, arguments))
            return value(*args, **kwargs)

        return recorded


def record(module: ModuleType, problem: Problem) -> list[Step]:
    """The calls of a training step on the kernels of ``module``, in ``roofline.trunk``'s order."""
    units, steps = problem.units, []
    pictures = module.pictures_for_kernels(problem.pictures, problem.pictures.dtype)
    kernels = Recorder(module.Kernels(units, pictures), units, steps)
    _, kept = schedule.forward(kernels, pictures, len(units), keep=True)
    kernels = Recorder(module.Kernels(units, pictures, kept), units, steps)
    schedule.backward(kernels, problem.dpooled, pictures, kept)
    return steps


# --- whether it is right ------------------------------------------------------------------------


def verify(steps: list[Step], position: int) -> None:
    """Raise WrongResult where a step is further from float64 than eager PyTorch may be.

    Eager PyTorch and float64 get the very tensors of the call, but sums of their own. Where a
    ReLU's input is nearly zero its mask is chance, and what depends on that is not compared. The
    gradients may be finished by the next step only, so that follows.
    """
    step, following = (*steps[position : position + 2], None)[:2]
    with without_tf32():
        eager, exact = on_plain_kernels(step, False), on_plain_kernels(step, True)
        ours, theirs, truth = results(step, following), results(eager), results(exact)
    given = exact.arguments
    if step.method == "b2":
        z = plain_kernels.before_relu(given["y_before"], given["norm_before"])
    elif step.method == "head_forward":
        z = plain_kernels.before_relu(given["y"], truth["norm"], given["shortcut"])
    else:
        check(ours, theirs, truth, maximum=True)
        return
    name = "mask" if step.method == "head_forward" else "dz"
    # statistics may be of y before it was rounded, and float32 has last bits
    decided = z.abs() > max(torch.finfo(ours[name].dtype).eps, 1e-5)
    check(
        *({**found, name: found[name] * decided} for found in (ours, theirs, truth)), maximum=True
    )


def on_plain_kernels(step: Step, exact: bool) -> Step:
    """The same on plain PyTorch's kernels and on copies, in the same dtype or in float64."""

    def converted(value):
        wide = exact and isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if wide else value

    units = [Unit(*(converted(t).clone() for t in u[:5]), u.momentum, u.eps) for u in step.units]
    given = {name: converted(value) for name, value in step.arguments.items()}
    if "pictures" in given:
        given["pictures"] = given["pictures"][:, :3]
    if "mask" in given:
        given["mask"] = plain_kernels.positive(given["mask"])
    if "dz" in given:
        given["sums"] = plain_kernels.gradient_sums_of(given["dz"], given["y"], given["norm"])
    elif "sums" in given:
        given["sums"] = plain_kernels.sums_of(given["y"])
    like = given["y"] if "y" in given else given["pictures"]
    return Step(plain_kernels.Kernels(units, like), units, step.method, given)


def results(step: Step, following: Step | None = None) -> dict[str, Tensor]:
    """What a call leaves, by name, and the gradients and running statistics that it sees to.

    Vectors are rounded to the activations' dtype, for they are sums of these: float32's own last
    bits are the order of additions.
    """
    kernels = copy.copy(step.kernels)
    found = dict(zip(RESULTS[step.method], step.on(kernels) or (), strict=True))
    found.pop("sums", None)
    i = step.arguments.get("i", 0)
    vectors = {}
    if "norm" in found:
        before = step.units[i - 1]  # of the head, which has no unit of its own, the last
        vectors = {
            "norm": found["norm"],
            "running_mean": before.running_mean,
            "running_var": before.running_var,
        }
    if step.method in ("b2", "b1", "stem_backward"):
        if following is not None:
            following.on(kernels)
        found["dweight"], vectors["dbn_weight"], vectors["dbn_bias"] = kernels.gradients[i]
    activation = next(step.arguments[n] for n in ("y", "pictures") if n in step.arguments)
    if "mask" in found:
        vectors["mask"] = plain_kernels.positive(found["mask"])
    return found | {name: value.to(activation.dtype) for name, value in vectors.items()}


# --- how long it takes --------------------------------------------------------------------------


def module_of(name: str, suite: Suite, dtype: str) -> ModuleType:
    """Where an implementation has its kernels.

    Raises:
        Unavailable: they do not run on this device, or not in this dtype
    """
    if name == EAGER:
        return plain_kernels
    if not suite.on_gpu:
        raise Unavailable("without a GPU only eager is measured")
    reason = ops.why_not(name, suite.device, "trunk")
    if name == "cuda" and dtype == "fp32":
        reason = "the trunk's kernels of cuda take fp16 and bf16"
    if reason is not None:
        raise Unavailable(reason)
    return trunk_autograd.kernels_of(name)


def measure(
    suite: Suite, card: Card, place: Place, name: str, batch: int | None, dtype: str
) -> None:
    """Verify an implementation's kernel at a place, then time it."""
    case = {
        "kernel": place.kernel,
        "place": place.place,
        "dtype": dtype,
        "batch": batch,
        "implementation": name,
    }
    with suite.attempt([case]):
        module = module_of(name, suite, dtype)
        prepare = preparer(module, place, batch, DTYPES[dtype], suite.device)
        work = place.work(batch, dtype)
        suite.time(case, title(case), prepare, card, work.bytes, work.flops)


def preparer(
    module: ModuleType,
    place: Place,
    batch: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[int], Call]:
    """For ``time_calls``: the kernel at ``place``, each call with tensors of its own.

    All are on the same kernels, so that each adds up the slabs that the call before it left.

    Raises:
        WrongResult: it does not compute what it should. The weights are right where both
            convolutions that read the last of them are, forward and backward
    """
    if place.position is None:
        problem = draw(WEIGHTS_DEPTH, 4, dtype, device)
        steps, last = record(module, problem), len(problem.units) - 1
        for position in (last, last + 3):  # its F2 and its B2; between them is the head
            verify(steps, position)

        def prepare(seed: int) -> Call:
            problem = draw(WEIGHTS_DEPTH, 1, dtype, device, seed=seed)
            pictures = module.pictures_for_kernels(problem.pictures, dtype)
            return lambda: module.Kernels(problem.units, pictures).weights

    else:
        steps = record(module, draw(DEPTH, batch, dtype, device))
        verify(steps, place.position)
        first = steps[place.position]
        chain = copy.copy(first.kernels)
        before = [chain]

        def prepare(seed: int) -> Call:
            step = first
            if seed > 0:
                step = record(module, draw(DEPTH, batch, dtype, device, seed=seed))[place.position]

            def call():
                made = step.on(chain)
                if device.type == "cpu" or not torch.cuda.is_current_stream_capturing():
                    before[:] = [copy.copy(chain)]  # a graph's first call goes on from this
                return made

            return call

    return prepare


def title(row: dict) -> str:
    """A case for people."""
    return (
        f"{row['kernel']:22} {row['place']:10} {row['dtype']} {row['batch'] or '':5} "
        f"{row['implementation']:7}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = flags("trunk", __doc__.partition("\n\n")[2])
    options = parse(parser, arguments, IMPLEMENTATIONS)
    suite = Suite("trunk", options)
    card = suite.measured_card()
    dtypes, batches = sizes(suite, options)
    problems = []
    for place in places():
        of_place = (None,) if place.position is None else batches
        problems += itertools.product((place,), dtypes, of_place)
    wanted = options.implementation or IMPLEMENTATIONS
    for (place, dtype, batch), name in suite.progress(list(itertools.product(problems, wanted))):
        measure(suite, card, place, name, batch, dtype)
    return suite.finish()


if __name__ == "__main__":
    sys.exit(main())
