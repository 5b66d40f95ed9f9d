"""What the trunk refuses, and what ``auto`` makes of it."""

import pytest
import torch
from test_trunk import Problem
from torch._subclasses.fake_tensor import FakeTensorMode

from cifar_resnet_fast import ops, reference
from cifar_resnet_fast.ops import _dispatch as choice
from cifar_resnet_fast.ops._trunk import autograd as trunk_autograd
from cifar_resnet_fast.reference import Unit

half = torch.float16


def wrong(**changes):
    """Arguments of a ResNet-8's trunk, some of them changed."""
    problem = Problem(8, 2, half, torch.device("cpu"))
    arguments = {"pictures": problem.pictures, "units": problem.units, "training": True}
    return arguments | {
        name: change(arguments.get(name)) if callable(change) else change
        for name, change in changes.items()
    }


def with_unit(i: int, **changes):
    def change(units):
        return [*units[:i], units[i]._replace(**changes), *units[i + 1 :]]

    return change


REFUSED_BY_ALL = {
    "no-block": ({"units": lambda u: u[:1]}, ValueError, "units must be 2n . 1 .*, got 1"),
    "half-a-block": ({"units": lambda u: u[:4]}, ValueError, "units must be 2n . 1 .*, got 4"),
    "channels": (
        {"units": lambda u: [u[0], u[3], *u[2:]]},
        ValueError,
        "weight 2 must have 32 output channels, got 16",
    ),
    "kernel-size": (
        {"units": with_unit(1, weight=torch.ones(16, 16, 5, 5))},
        ValueError,
        r"weight 1 must have shape \(16, 16, 3, 3\), got",
    ),
    "vector": (
        {"units": with_unit(2, bn_bias=torch.ones(3))},
        ValueError,
        r"bn_bias 2 must have shape \(16,\), got \(3,\)",
    ),
    "integers": (
        {"units": with_unit(2, bn_bias=torch.ones(16, dtype=torch.int64))},
        TypeError,
        "bn_bias 2 must be of a floating dtype, got torch.int64",
    ),
    "momentum": (
        {"units": with_unit(2, momentum=None)},
        TypeError,
        "momentum 2 must be a number, got None",
    ),
    "dtype": (
        {"units": with_unit(2, weight=torch.ones(16, 16, 3, 3).double())},
        TypeError,
        "weight 2 must be of x's dtype torch.float16 .*, got torch.float64",
    ),
    "one-value": (
        {"pictures": torch.ones(1, 3, 4, 4).half()},
        ValueError,
        r"pictures must give more than 1 value per channel when training, got shape \(1, 3, 4, 4",
    ),
}
REFUSED_BY_CUDA = {
    "fp32": (
        {"pictures": lambda x: x.float()},
        TypeError,
        "pictures must be torch.float16 or torch.bfloat16 for implementation 'cuda', got .*32",
    ),
    "size": (
        {"pictures": torch.ones(2, 3, 64, 64).half()},
        ValueError,
        "pictures must be 32 x 32 for implementation 'cuda', got 64 x 64",
    ),
    "gradient": (
        {"pictures": lambda x: x.clone().requires_grad_()},
        ValueError,
        "pictures must not require a gradient for implementation 'cuda'",
    ),
    "batch": (
        {"pictures": torch.ones(1, 1, 1, 1).half().expand(65536, 3, 32, 32)},
        ValueError,
        "pictures must be at most 65535 for implementation 'cuda', got 65536",
    ),
    "evaluation": (
        {"units": with_unit(0, bn_bias=torch.ones(16, requires_grad=True)), "training": False},
        ValueError,
        "no unit may require a gradient in evaluation for implementation 'cuda'",
    ),
    "strided": (
        {"units": with_unit(0, running_var=torch.ones(32)[::2])},
        ValueError,
        r"running_var 0 must be contiguous for implementation 'cuda', got strides \(2,\)",
    ),
    "half-parameters": (
        {"units": with_unit(0, bn_bias=torch.ones(16).half())},
        TypeError,
        "bn_bias 0 must be torch.float32 for implementation 'cuda', got torch.float16",
    ),
}


@pytest.mark.parametrize("name", REFUSED_BY_ALL)
def test_refused_by_all(name):
    changes, error, message = REFUSED_BY_ALL[name]
    with pytest.raises(error, match=f"^{message}") as caught:
        ops.trunk(**wrong(**changes), implementation="reference")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REFUSED_BY_CUDA)
def test_refused_by_name_and_passed_on_by_auto(name, monkeypatch):
    changes, error, message = REFUSED_BY_CUDA[name]
    arguments = wrong(**changes)
    monkeypatch.setattr(choice, "why_not", lambda *_: None)
    with pytest.raises(error, match=f"^{message}") as caught:
        ops.trunk(**arguments, implementation="cuda")
    assert "\n" not in str(caught.value)

    taken = []
    monkeypatch.setattr(trunk_autograd, "trunk", lambda chosen, *_: taken.append(chosen))
    monkeypatch.setattr(reference, "trunk", lambda *_, **__: taken.append("reference"))
    with FakeTensorMode():  # a GPU that need not be here

        def on_gpu(t):
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            return made.requires_grad_(t.requires_grad)

        units = [Unit(*map(on_gpu, unit[:5]), *unit[5:]) for unit in arguments["units"]]
        ops.trunk(on_gpu(arguments["pictures"]), units, training=arguments["training"])
    triton_serves = ("fp32", "size", "batch", "half-parameters")
    assert taken == ["triton" if name in triton_serves else "reference"]


def test_named_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="'cuda' cannot run trunk on cpu: .* need a CUDA GPU"):
        ops.trunk(**wrong(), implementation="cuda")


def test_auto_passes_over_an_implementation_whose_rules_are_broken(monkeypatch):
    """The one dispatcher of all operations, with a device and rules of its own."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(choice, "why_not", lambda *_: None)
    broken = {"cuda": ValueError("x must be even"), "triton": None, "reference": None}
    assert choice.choose("auto", gpu, "trunk") == "cuda"
    assert choice.choose("auto", gpu, "trunk", broken.get) == "triton"
    broken["triton"] = TypeError("x must be float16")
    assert choice.choose("auto", gpu, "trunk", broken.get) == "reference"
    with pytest.raises(ValueError, match="x must be even"):
        choice.choose("cuda", gpu, "trunk", broken.get)
    with pytest.raises(TypeError, match="x must be float16"):
        choice.choose("triton", gpu, "trunk", broken.get)
