"""The public operations as the network uses them, and whether they are right (layer 4).

Each operation at each place where the network has it: its inputs, its call, and ``verify``, which
holds a run of it against float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cifar_resnet_fast import ops, reference
from cifar_resnet_fast.data.loader import CROP_PADDING, draw_epoch
from cifar_resnet_fast.resnet import STAGE_CHANNELS, FastResNet
from cifar_resnet_fast.training.config import TrainConfig
from cifar_resnet_fast.training.optimizers import flatten
from cifar_resnet_fast.verification.budget import Compared, compared, without_tf32

SIDES = (32, 16, 8)  # pixels a row, of the three stages
_RECIPE = TrainConfig()
SGD_SETTINGS: dict[str, Any] = {
    "momentum": _RECIPE.momentum,
    "weight_decay": _RECIPE.weight_decay,
    "nesterov": _RECIPE.nesterov,
}
Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Case:
    """One operation at one place in the network.

    operation: a key of ``ops.OPERATIONS``
    place: where in the network, for people
    inputs: (batch, dtype, device, generator) to the call's tensors, activations channels-last
    call: (tensors, implementation) to the results by name; of what works in place, these are the
        tensors that it writes. With a gradient there is one, ``out``
    differentiated: the tensors that have a gradient
    batched: False where neither the batch nor its dtype matters: checked once, in float32
    """

    operation: str
    place: str
    inputs: Callable[[int | None, torch.dtype, torch.device, torch.Generator], Tensors]
    call: Callable[[Tensors, str], Tensors]
    differentiated: tuple[str, ...] = ()
    batched: bool = True


class Draw:
    """Random tensors from one generator."""

    def __init__(self, device: torch.device, generator: torch.Generator):
        self.device, self.generator = device, generator

    def activation(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Off centre, so that a variance that cancels shows."""
        values = 0.5 * self.vector(*shape) + 0.7
        return values.to(dtype, memory_format=torch.channels_last)

    def vector(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)


def unit(C: int, K: int, side: int, stride: int = 1, shortcut: bool = False) -> Case:
    """``conv_bn_relu`` in training."""

    def inputs(batch, dtype, device, generator):
        draw = Draw(device, generator)
        weight = draw.vector(K, C, 3, 3) * (2 / (9 * C)) ** 0.5
        tensors = {
            "x": draw.activation(batch, C, side, side, dtype=dtype),
            "weight": weight.to(dtype, memory_format=torch.channels_last),
            "bn_weight": 1 + 0.1 * draw.vector(K),
            "bn_bias": 0.1 * draw.vector(K),
            "running_mean": torch.zeros(K, device=device),
            "running_var": torch.ones(K, device=device),
        }
        if shortcut:
            out = side // stride
            tensors["shortcut"] = draw.activation(batch, K, out, out, dtype=dtype)
        return tensors

    def call(tensors, implementation):
        out = ops.conv_bn_relu(**tensors, stride=stride, implementation=implementation)
        return {"out": out}

    of_pictures = C == 3  # which need no gradient
    differentiated = ("weight", "bn_weight", "bn_bias") + (("shortcut",) if shortcut else ())
    place = f"{side}x{side}x{C} to {K}"
    if stride == 2:
        place += ", stride 2"
    return Case(
        "conv_bn_relu",
        place + (", shortcut" if shortcut else ""),
        inputs,
        call,
        differentiated if of_pictures else ("x", *differentiated),
    )


def shortcut_a(C: int, K: int, side: int) -> Case:
    def inputs(batch, dtype, device, generator):
        return {"x": Draw(device, generator).activation(batch, C, side, side, dtype=dtype)}

    def call(tensors, implementation):
        out = ops.shortcut_a(**tensors, out_channels=K, implementation=implementation)
        return {"out": out}

    return Case(
        "shortcut_a",
        f"{side}x{side}x{C} to {K}",
        inputs,
        call,
        ("x",),
    )


def load_batch(mixed: bool = False) -> Case:
    """An epoch of one batch: each of its pictures is read once, or twice if it is mixed."""
    side = SIDES[0]

    def inputs(batch, dtype, device, generator):
        shape = (batch, side, side, 3)
        columns = vars(draw_epoch(generator.initial_seed(), 0, batch)).values()
        draws = torch.stack([column.int() for column in columns])
        mix = {}
        if mixed:  # blended, with a box that is the partner's
            draws = torch.cat((draws, draws.flip(1)))
            step = torch.tensor([[0.3], [4.0], [20.0], [5.0], [32.0], [0.6]], device=device)
            mix = {"mix": step}
        mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
        return {
            "images": torch.randint(
                256, shape, dtype=torch.uint8, device=device, generator=generator
            ),
            "labels": torch.randint(10, (batch,), device=device, generator=generator),
            "values": ops.normalized_bytes(mean, std, dtype).to(device),
            "draws": draws.to(device),
            "step": torch.zeros((), dtype=torch.int64, device=device),
            **mix,
        }

    def call(tensors, implementation):
        sizes: dict[str, Any] = {"batch_size": len(tensors["images"]), "padding": CROP_PADDING}
        if implementation == "reference":  # itself, for it takes float64, too
            found = reference.load_batch(**tensors, **sizes)
        else:
            found = ops.load_batch(**tensors, **sizes, implementation=implementation)
        return dict(zip(("images", "labels", "labels_b", "ratio"), found, strict=False))

    place = f"{side}x{side}x3" + (", mixed" if mixed else "")
    return Case("load_batch", place, inputs, call)


def parameter_places(depth: int) -> tuple[int, list[slice]]:
    """How ``FlatSGD`` lays ResNet-``depth`` out: elements in all, and where each parameter is."""
    with torch.device("meta"):
        parameters = list(FastResNet(depth).parameters())
    P = flatten(parameters).numel()
    return P, [slice(p.storage_offset(), p.storage_offset() + p.numel()) for p in parameters]


def sgd(depth: int) -> Case:
    """All parameters of a network, as ``FlatSGD`` has them: the gaps between them are zero."""
    P, places = parameter_places(depth)
    written = ("parameters", "momenta", "skipped")

    def inputs(batch, dtype, device, generator):
        draw, held = Draw(device, generator), torch.zeros(P)
        for place in places:
            held[place] = 1
        held = held.to(device)
        return {
            "parameters": 0.1 * draw.vector(P) * held,
            "gradients": 0.01 * draw.vector(P) * held,
            "momenta": 0.05 * draw.vector(P) * held,
            "lr": torch.tensor(0.1, device=device),
            "loss_scale": torch.tensor(1.0, device=device),
            "skipped": torch.zeros((), dtype=torch.int32, device=device),
        }

    def call(tensors, implementation):
        if implementation == "reference":  # itself, for it takes float64, too
            reference.sgd(**tensors, decayed=P, **SGD_SETTINGS)
        else:
            ops.sgd(**tensors, decayed=P, **SGD_SETTINGS, implementation=implementation)
        return {name: tensors[name] for name in written}

    return Case(
        "sgd",
        f"ResNet-{depth}",
        inputs,
        call,
        batched=False,
    )


def linear_cross_entropy(classes: int, label_smoothing: float, mixed: bool) -> Case:
    """The last layer and the loss, with all gradients, which the forward pass makes."""
    place = f"{STAGE_CHANNELS[-1]} to {classes}"
    place += (", smoothed" if label_smoothing else "") + (", mixed" if mixed else "")
    names = ("features", "weight", "bias")

    def inputs(batch, dtype, device, generator):
        draw, C = Draw(device, generator), STAGE_CHANNELS[-1]

        def labels():
            return torch.randint(classes, (batch,), device=device, generator=generator)

        tensors = {
            "features": 0.5 * draw.vector(batch, C) + 2.3,
            "weight": draw.vector(classes, C) / C**0.5,
            "bias": draw.vector(classes),
            "labels": labels(),
        }
        if mixed:
            tensors |= {"labels_b": labels(), "ratio": torch.tensor(0.3, device=device)}
        return tensors

    def call(tensors, implementation):
        given = {n: t.detach().requires_grad_(n in names) for n, t in tensors.items()}
        settings: dict[str, Any] = {"label_smoothing": label_smoothing}
        if implementation == "reference":  # itself, for it takes a float64 ratio, too
            loss, hits = reference.linear_cross_entropy(**given, **settings)
        else:
            loss, hits = ops.linear_cross_entropy(
                **given, **settings, implementation=implementation
            )
        gradients = torch.autograd.grad(loss, [given[name] for name in names])
        found = {f"d{name}": g for name, g in zip(names, gradients, strict=True)}
        return {"loss": loss.detach(), "hits": hits, **found}

    return Case("linear_cross_entropy", place, inputs, call)


def record_step() -> Case:
    """The end of a step, in the epoch's second round of columns."""
    columns, step = 48, 70
    written = ("metrics", "step", "lr")

    def inputs(batch, dtype, device, generator):
        draw = Draw(device, generator)
        return {
            "metrics": draw.vector(3, columns),
            "loss": draw.vector(),
            "hits": torch.tensor(123.0, device=device),
            "skipped": torch.tensor(3, dtype=torch.int32, device=device),
            "step": torch.tensor(step, device=device),
            "lr": torch.tensor(0.1, device=device),
            "schedule": draw.vector(2 * columns),
        }

    def call(tensors, implementation):
        if implementation == "reference":  # itself, for it takes float64, too
            reference.record_step(**tensors)
        else:
            ops.record_step(**tensors, implementation=implementation)
        return {name: tensors[name] for name in written}

    return Case("record_step", "second epoch", inputs, call, batched=False)


BORDERS = tuple(zip(STAGE_CHANNELS[:2], STAGE_CHANNELS[1:], SIDES[:2], strict=True))
UNITS = (  # C, K, pixels a row, stride, with a shortcut
    (3, STAGE_CHANNELS[0], SIDES[0], 1, False),
    *(
        (C, C, side, 1, shortcut)
        for C, side in zip(STAGE_CHANNELS, SIDES, strict=True)
        for shortcut in (False, True)
    ),
    *((*border, 2, False) for border in BORDERS),
)
CASES = (
    *(unit(*sizes) for sizes in UNITS),
    *(shortcut_a(*border) for border in BORDERS),
    *(load_batch(mixed) for mixed in (False, True)),
    linear_cross_entropy(10, 0.0, mixed=False),
    linear_cross_entropy(100, 0.1, mixed=True),
    record_step(),
    *(sgd(depth) for depth in (20, 56)),
)


# --- whether one is right -----------------------------------------------------------------------


def draw(
    case: Case, batch: int | None, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensors, Tensor | None]:
    """The inputs, those that have a gradient set to require it, and the gradient of the result,
    if it has one."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = case.inputs(batch, dtype, device, generator)
    if not case.differentiated:
        return tensors, None
    with torch.no_grad():
        out = case.call(tensors, "reference")["out"]
    dout = torch.randn(out.shape, device=device, generator=generator)
    return _differentiable(case, tensors), dout.to(dtype, memory_format=torch.channels_last)


def _differentiable(case: Case, tensors: Tensors) -> Tensors:
    return {
        name: value.detach().requires_grad_(name in case.differentiated)
        for name, value in tensors.items()
    }


def differentiate(case: Case, run: Run, tensors: Tensors, dout: Tensor) -> tuple[Tensor, Tensors]:
    """The result, and the gradients of ``case.differentiated`` by name."""
    out = run(tensors)["out"]
    gradients = torch.autograd.grad(out, [tensors[name] for name in case.differentiated], dout)
    return out, {f"d{name}": g for name, g in zip(case.differentiated, gradients, strict=True)}


def verify(case: Case, run: Run, tensors: Tensors, dout: Tensor | None) -> None:
    """Raise WrongResult where ``run`` is further from float64 than eager PyTorch may be."""
    for result in compare(case, run, tensors, dout):
        result.check()


def compare(case: Case, run: Run, tensors: Tensors, dout: Tensor | None) -> list[Compared]:
    """What ``run`` leaves, and what it is held against.

    ``run`` gets copies: operations update running statistics, or all they do is in place.
    """

    def results(run: Run, dtype: torch.dtype | None) -> tuple[Tensors, Tensors]:
        def converted(value: Tensor) -> Tensor:
            return value if dtype is None or not value.is_floating_point() else value.to(dtype)

        copies = {name: converted(value.detach().clone()) for name, value in tensors.items()}
        if dout is None:
            return run(copies), {}
        out, gradients = differentiate(case, run, _differentiable(case, copies), converted(dout))
        return {"out": out}, gradients

    def eager(tensors: Tensors) -> Tensors:
        return case.call(tensors, "reference")

    with without_tf32():
        ours, theirs, exact = (
            results(run, None),
            results(eager, None),
            results(eager, torch.double),
        )
    return compared(ours[0], theirs[0], exact[0], maximum=True) + compared(
        ours[1], theirs[1], exact[1], maximum=False
    )
