"""The public operations as the network uses them: inputs, calls, work; for ``bench.kernels``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import traffic
from bench.traffic import SIDES, Sizes, Work
from cifar_resnet_fast import ops
from cifar_resnet_fast.resnet import STAGE_CHANNELS

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operation at one place in the network.

    operation: a key of ``ops.OPERATIONS``
    place: where in the network, for people
    inputs: (batch, dtype, device, generator) to the call's tensors, activations channels-last
    call: (tensors, implementation) to the result
    differentiated: the tensors that have a gradient
    forward, backward: what the kernels have to move and compute
    """

    operation: str
    place: str
    inputs: Callable[[int, torch.dtype, torch.device, torch.Generator], Tensors]
    call: Callable[[Tensors, str], Tensor]
    differentiated: tuple[str, ...]
    forward: Callable[[Sizes], Work]
    backward: Callable[[Sizes], Work]

    def work(self, phase: str, sizes: Sizes) -> tuple[int, int]:
        """Bytes and operations of ``phase``: forward, backward or both."""
        steps = {
            "forward": (self.forward,),
            "backward": (self.backward,),
            "both": (self.forward, self.backward),
        }[phase]
        works = [step(sizes) for step in steps]
        return sum(w.bytes for w in works), sum(w.flops for w in works)


class _Draw:
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
        draw = _Draw(device, generator)
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
        return ops.conv_bn_relu(**tensors, stride=stride, implementation=implementation)

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
        lambda s: traffic.unit_forward(s, C, K, side, stride, shortcut),
        lambda s: traffic.unit_backward(s, C, K, side, stride, shortcut, dx=not of_pictures),
    )


def _shortcut_a(C: int, K: int, side: int) -> Case:
    def inputs(batch, dtype, device, generator):
        return {"x": _Draw(device, generator).activation(batch, C, side, side, dtype=dtype)}

    return Case(
        "shortcut_a",
        f"{side}x{side}x{C} to {K}",
        inputs,
        lambda tensors, implementation: ops.shortcut_a(
            **tensors, out_channels=K, implementation=implementation
        ),
        ("x",),
        lambda s: traffic.shortcut_a_forward(s, C, K, side),
        lambda s: traffic.shortcut_a_backward(s, C, K, side),
    )


def _stage_border(C: int, K: int, side: int) -> Case:
    def inputs(batch, dtype, device, generator):
        draw = _Draw(device, generator)
        return {
            "y": draw.activation(batch, K, side // 2, side // 2, dtype=dtype),
            "scale": 1 + 0.1 * draw.vector(K),
            "shift": 0.1 * draw.vector(K),
            "x": draw.activation(batch, C, side, side, dtype=dtype),
        }

    return Case(
        "stage_border",
        f"{side}x{side}x{C} to {K}",
        inputs,
        lambda tensors, implementation: ops.stage_border(**tensors, implementation=implementation),
        ("y", "scale", "shift", "x"),
        lambda s: traffic.stage_border_forward(s, C, K, side),
        lambda s: traffic.stage_border_backward(s, C, K, side),
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
)
