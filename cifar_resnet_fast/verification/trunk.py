"""The trunk's kernels, one by one, as a training step calls them (layer 4).

A training step runs on an implementation's kernels and each call is kept with its tensors; one of
them is then held against float64. So a kernel gets what it gets in the network: sums and slabs
that its predecessor left, in a form of their own.
"""

import copy
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cifar_resnet_fast.ops import Unit
from cifar_resnet_fast.ops._trunk import plain as plain_kernels
from cifar_resnet_fast.ops._trunk import schedule
from cifar_resnet_fast.resnet import STAGE_CHANNELS
from cifar_resnet_fast.verification.budget import Compared, compared, without_tf32
from cifar_resnet_fast.verification.operations import SIDES, Draw

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
class Problem:
    """A training step's inputs; ``dpooled`` is what comes back to the pooled activation."""

    units: list[Unit]
    pictures: Tensor
    dpooled: Tensor


def draw(
    depth: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    side: int = SIDES[0],
) -> Problem:
    """A training step of ResNet-``depth`` on images of ``side`` x ``side`` pixels."""
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
        for C, K in convolutions(depth)
    ]
    pictures = draw.activation(batch, 3, side, side, dtype=dtype)
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
    arguments: dict[str, Any]

    def on(self, kernels: schedule.Kernels) -> tuple:
        """What the call gives on ``kernels``; empty if it only sees to gradients."""
        return getattr(kernels, self.method)(**self.arguments) or ()


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


def convolutions(depth: int) -> list[tuple[int, int]]:
    """(input channels, output channels) of every convolution of ResNet-``depth``, in order."""
    found = [(3, STAGE_CHANNELS[0])]
    for C, K in zip((STAGE_CHANNELS[0], *STAGE_CHANNELS), STAGE_CHANNELS, strict=False):
        found += [(C, K), *[(K, K)] * (2 * ((depth - 2) // 6) - 1)]
    return found


def record(module: ModuleType, problem: Problem) -> list[Step]:
    """The calls of a training step on the kernels of ``module``, in ``roofline.trunk``'s order."""
    units = problem.units
    steps: list[Step] = []
    pictures = module.pictures_for_kernels(problem.pictures, problem.pictures.dtype)
    kernels = Recorder(module.Kernels(units, pictures), units, steps)
    _, kept = schedule.forward(kernels, pictures, len(units), keep=True)
    kernels = Recorder(module.Kernels(units, pictures, kept), units, steps)
    schedule.backward(kernels, problem.dpooled, pictures, kept)
    return steps


def places(steps: list[Step]) -> list[int]:
    """The position of each kernel at each place where the network has it, the first of each."""
    found: dict[tuple, int] = {}
    for position, step in enumerate(steps):
        tensors = {n: t for n, t in step.arguments.items() if isinstance(t, Tensor)}
        shapes = tuple((n, t.shape) for n, t in tensors.items() if n != "sums")
        found.setdefault((title(step), shapes), position)
    return list(found.values())


def title(step: Step) -> str:
    """A call for people: the kernel and what it reads."""
    read = next(step.arguments[n] for n in ("y", "pictures") if n in step.arguments)
    stride = ""
    if "i" in step.arguments:
        i = step.arguments["i"]
        stride = ", stride 2" if schedule.stride_of(i, step.units[i].weight) == 2 else ""
    _, C, H, W = read.shape
    return f"{step.method} {H}x{W}x{C}{stride}"


def moved_bytes(step: Step) -> int:
    """What a call has to move, at least: each activation, mask and picture in or out once.

    For steps on plain kernels, whose pictures have three channels and whose mask has bytes.
    """
    left = dict(zip(RESULTS[step.method], step.on(step.kernels), strict=True))
    moved = 0
    for name, tensor in (*step.arguments.items(), *left.items()):
        if isinstance(tensor, Tensor) and name not in ("sums", "norm", "norm_before"):
            moved += _used_bytes(name, tensor, step.arguments)
    return moved


def _used_bytes(name: str, tensor: Tensor, arguments: dict) -> int:
    """Of a tensor what a kernel has to move: of option A's shortcut the pixels that count."""
    if name == "shortcut" and tensor.shape[1] != arguments["y"].shape[1]:
        return tensor.nbytes // 4
    if name == "residual" and tensor.shape[1] != arguments["x"].shape[1]:
        return tensor.nbytes // 2
    if name == "mask":
        return tensor.numel() // 8
    if name == "pictures":
        return tensor.nbytes // 3 * 4
    return tensor.nbytes


# --- whether it is right ------------------------------------------------------------------------


def verify(steps: list[Step], position: int) -> None:
    """Raise WrongResult where a step is further from float64 than eager PyTorch may be."""
    for result in compare(steps, position):
        result.check()


def compare(steps: list[Step], position: int) -> list[Compared]:
    """What a step leaves, and what it is held against.

    Eager PyTorch and float64 get the very tensors of the call, but sums of their own. Where a
    ReLU's input is nearly zero its mask is chance, and what depends on that is not compared. The
    gradients may be finished by the next step only, so that follows.
    """
    step = steps[position]
    following = steps[position + 1] if position + 1 < len(steps) else None
    with without_tf32():
        eager, exact = on_plain_kernels(step, False), on_plain_kernels(step, True)
        ours, theirs, truth = results(step, following), results(eager), results(exact)
    given = exact.arguments
    if step.method == "b2":
        z = plain_kernels.before_relu(given["y_before"], given["norm_before"])
    elif step.method == "head_forward":
        z = plain_kernels.before_relu(given["y"], truth["norm"], given["shortcut"])
    else:
        return compared(ours, theirs, truth, maximum=True)
    name = "mask" if step.method == "head_forward" else "dz"
    # statistics may be of y before it was rounded, and float32 has last bits
    decided = z.abs() > max(torch.finfo(ours[name].dtype).eps, 1e-5)
    own = {}
    if step.method == "head_forward":
        # one image's averages are too few for that to even out: they are held to its own norm
        ours = {name: value.clone() for name, value in ours.items()}  # the next line updates some
        norm, *_ = step.on(copy.copy(step.kernels))
        norm = norm.double()
        own["pooled"] = plain_kernels.activation(given["y"], norm, given["shortcut"]).mean((2, 3))
    return compared(
        *({**found, name: found[name] * decided} for found in (ours, theirs, truth)),
        own=own,
        maximum=True,
    )


def on_plain_kernels(step: Step, exact: bool) -> Step:
    """The same on plain PyTorch's kernels and on copies, in the same dtype or in float64."""

    def converted(value):
        wide = exact and isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if wide else value

    names = Unit._fields[:5]
    units = [
        unit._replace(**{name: converted(getattr(unit, name)).clone() for name in names})
        for unit in step.units
    ]
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
    found = dict(zip(RESULTS[step.method], step.on(kernels), strict=True))
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
