"""The public operations as the network uses them: inputs, calls, work; for ``bench.kernels``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from bench import traffic
from bench.traffic import SIDES, Sizes, Work
from cifar_resnet_fast import ops, reference
from cifar_resnet_fast.data.loader import CROP_PADDING, draw_epoch
from cifar_resnet_fast.resnet import STAGE_CHANNELS, FastResNet
from cifar_resnet_fast.training.config import TrainConfig
from cifar_resnet_fast.training.optimizers import flatten

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operation at one place in the network.

    operation: a key of ``ops.OPERATIONS``
    place: where in the network, for people
    inputs: (batch, dtype, device, generator) to the call's tensors, activations channels-last
    call: (tensors, implementation) to the results by name; of what works in place, these are the
        tensors that it writes. With a gradient there is one, ``out``
    works: what the kernels have to move and compute, forward and backward; in one phase, ``call``,
        where nothing has a gradient
    differentiated: the tensors that have a gradient
    batched: False where neither the batch nor its dtype matters: measured once, in float32
    others: plain PyTorch's own for the same, by name
    """

    operation: str
    place: str
    inputs: Callable[[int | None, torch.dtype, torch.device, torch.Generator], Tensors]
    call: Callable[[Tensors, str], Tensors]
    works: Mapping[str, Callable[[Sizes], Work]]
    differentiated: tuple[str, ...] = ()
    batched: bool = True
    others: Mapping[str, Callable[[Tensors], Tensors]] = field(default_factory=dict)

    @property
    def phases(self) -> tuple[str, ...]:
        """What is timed: forward, backward and both, or call."""
        return (*self.works, "both") if len(self.works) > 1 else tuple(self.works)

    def work(self, phase: str, sizes: Sizes) -> tuple[int, int]:
        """Bytes and operations of a phase."""
        names = self.works if phase == "both" else (phase,)
        works = [self.works[name](sizes) for name in names]
        return sum(w.bytes for w in works), sum(w.flops for w in works)


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


def _unit(C: int, K: int, side: int, stride: int = 1, shortcut: bool = False) -> Case:
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
        {
            "forward": lambda s: traffic.unit_forward(s, C, K, side, stride, shortcut),
            "backward": lambda s: traffic.unit_backward(
                s, C, K, side, stride, shortcut, dx=not of_pictures
            ),
        },
        differentiated if of_pictures else ("x", *differentiated),
    )


def _shortcut_a(C: int, K: int, side: int) -> Case:
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
        {
            "forward": lambda s: traffic.shortcut_a_forward(s, C, K, side),
            "backward": lambda s: traffic.shortcut_a_backward(s, C, K, side),
        },
        ("x",),
    )


def _stage_border(C: int, K: int, side: int) -> Case:
    def inputs(batch, dtype, device, generator):
        draw = Draw(device, generator)
        return {
            "y": draw.activation(batch, K, side // 2, side // 2, dtype=dtype),
            "scale": 1 + 0.1 * draw.vector(K),
            "shift": 0.1 * draw.vector(K),
            "x": draw.activation(batch, C, side, side, dtype=dtype),
        }

    def call(tensors, implementation):
        return {"out": ops.stage_border(**tensors, implementation=implementation)}

    return Case(
        "stage_border",
        f"{side}x{side}x{C} to {K}",
        inputs,
        call,
        {
            "forward": lambda s: traffic.stage_border_forward(s, C, K, side),
            "backward": lambda s: traffic.stage_border_backward(s, C, K, side),
        },
        ("y", "scale", "shift", "x"),
    )


def _load_batch() -> Case:
    """An epoch of one batch: each of its pictures is read once."""
    side = SIDES[0]

    def inputs(batch, dtype, device, generator):
        shape = (batch, side, side, 3)
        draws = vars(draw_epoch(generator.initial_seed(), 0, batch)).values()
        mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
        return {
            "images": torch.randint(
                256, shape, dtype=torch.uint8, device=device, generator=generator
            ),
            "labels": torch.randint(10, (batch,), device=device, generator=generator),
            "values": ops.normalized_bytes(mean, std, dtype).to(device),
            "draws": torch.stack([draw.int() for draw in draws]).to(device),
            "step": torch.zeros((), dtype=torch.int64, device=device),
        }

    def call(tensors, implementation):
        sizes = {"batch_size": len(tensors["images"]), "padding": CROP_PADDING}
        images, labels = ops.load_batch(**tensors, **sizes, implementation=implementation)
        return {"images": images, "labels": labels}

    return Case("load_batch", f"{side}x{side}x3", inputs, call, {"call": traffic.loader})


def _sgd(depth: int) -> Case:
    """All parameters of a network, as ``FlatSGD`` has them: the gaps between them are zero."""
    with torch.device("meta"):
        parameters = list(FastResNet(depth).parameters())
    P = flatten(parameters).numel()
    places = [slice(p.storage_offset(), p.storage_offset() + p.numel()) for p in parameters]
    recipe = TrainConfig()
    settings = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    settings["nesterov"] = recipe.nesterov
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
            reference.sgd(**tensors, decayed=P, **settings)
        else:
            ops.sgd(**tensors, decayed=P, **settings, implementation=implementation)
        return {name: tensors[name] for name in written}

    def torch_optim(tensors):
        """What torch.optim.SGD(fused=True) calls, parameter by parameter; it has neither a check
        for gradients that are not finite nor a loss scale."""
        flats = (tensors[name] for name in ("parameters", "gradients", "momenta"))
        lists = ([flat[place] for place in places] for flat in flats)
        torch_sgd(*lists, fused=True, lr=0.1, dampening=0, maximize=False, **settings)
        return {name: tensors[name] for name in written}

    numbers = sum(p.numel() for p in parameters)
    return Case(
        "sgd",
        f"ResNet-{depth}",
        inputs,
        call,
        {"call": lambda s: traffic.optimizer(s, numbers)},
        batched=False,
        others={"torch.optim": torch_optim},
    )


_BORDERS = tuple(zip(STAGE_CHANNELS[:2], STAGE_CHANNELS[1:], SIDES[:2], strict=True))

CASES = (
    _unit(3, STAGE_CHANNELS[0], SIDES[0]),
    *(
        _unit(C, C, side, shortcut=shortcut)
        for C, side in zip(STAGE_CHANNELS, SIDES, strict=True)
        for shortcut in (False, True)
    ),
    *(_unit(*border, stride=2) for border in _BORDERS),
    *(_shortcut_a(*border) for border in _BORDERS),
    *(_stage_border(*border) for border in _BORDERS),
    _load_batch(),
    *(_sgd(depth) for depth in (20, 56)),
)
