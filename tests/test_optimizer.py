"""SGD over flat buffers against torch.optim.SGD, and averaged weights."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from cifar_resnet_fast import FastResNet, ops
from cifar_resnet_fast.training.optimizers import (
    AveragedWeights,
    FlatSGD,
    Lookahead,
    flatten,
    flatten_buffers,
)

# --- one step of the operation -----------------------------------------------------------------

SETTINGS = {
    "plain": {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False},
    "recipe": {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": False},
    "nesterov": {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
}


def flat_state(P, device):
    generator = torch.Generator().manual_seed(P)
    tensors = {
        name: torch.randn(P, generator=generator).to(device)
        for name in ("parameters", "gradients", "momenta")
    }
    return tensors | {
        "lr": torch.tensor(0.1, device=device),
        "loss_scale": torch.tensor(1024.0, device=device),
        "skipped": torch.zeros((), dtype=torch.int32, device=device),
    }


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("P", "decayed", "scaled"),
    [
        (1, 1, 0),
        (2500, 2000, 0),
        (2500, 2000, 300),
        (2500, 2500, 1400),
        (2500, 1000, 2500),
        pytest.param(1024 * 300, 0, 0, marks=pytest.mark.gpu),
    ],
    ids=[
        "one",
        "ragged-block",
        "scaled-without-decay",
        "scaled-with-decay",
        "all-scaled",
        "check-owns-several-blocks",
    ],
)
def test_kernel_is_the_reference(P, decayed, scaled, settings, device):
    ours, theirs = flat_state(P, device), flat_state(P, device)
    options = {"decayed": decayed, "scaled": scaled, "lr_factor": 7.0, **SETTINGS[settings]}
    exact = {
        name: value.double() if value.dtype == torch.float32 else value
        for name, value in flat_state(P, device).items()
    }
    ops.sgd(**ours, **options, implementation="triton")
    ops.sgd(**theirs, **options, implementation="reference")
    gradient = exact["gradients"] / exact["loss_scale"]
    factor = torch.ones(P, dtype=torch.float64, device=device)
    factor[P - scaled :] = 7.0
    decay = options["weight_decay"] / factor
    decay[decayed:] = 0.0
    gradient += decay * exact["parameters"]
    momenta = options["momentum"] * exact["momenta"] + gradient
    way = gradient + options["momentum"] * momenta if options["nesterov"] else momenta
    moved = exact["parameters"] - exact["lr"] * factor * way
    right = {"parameters": moved, "momenta": momenta}
    for name in right:
        # both round a few times; half a step of float32 at the size of the largest is their budget
        budget = 2 * (theirs[name] - right[name]).abs().max() + 2.0**-24
        assert (ours[name] - right[name]).abs().max() <= budget, name
    assert ours["skipped"] == theirs["skipped"] == 0


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1024, 2499])
def test_one_bad_gradient_skips_the_step(implementation, value, place, device):
    state = flat_state(2500, device)
    state["gradients"][place] = value
    before = {name: tensor.clone() for name, tensor in state.items()}
    ops.sgd(**state, decayed=2500, **SETTINGS["nesterov"], implementation=implementation)
    assert state["skipped"] == 1
    for name in ("parameters", "momenta"):
        assert torch.equal(state[name], before[name]), name
    state["gradients"][place] = 0.0
    ops.sgd(**state, decayed=2500, **SETTINGS["nesterov"], implementation=implementation)
    assert state["skipped"] == 1
    assert not torch.equal(state["parameters"], before["parameters"])


def test_kernel_writes_nothing_outside(device):
    """Buffers cut out of larger ones full of NaN."""
    P, pad = 2500, 1024
    around = {}
    state = flat_state(P, device)
    for name in ("parameters", "gradients", "momenta"):
        around[name] = torch.full((P + 2 * pad,), float("nan"), device=device)
        around[name][pad : pad + P] = state[name]
        state[name] = around[name][pad : pad + P]
    ops.sgd(**state, decayed=P, **SETTINGS["recipe"], implementation="triton")
    assert state["skipped"] == 0, "no NaN from around was read as a gradient"
    for buffer in around.values():
        assert buffer[:pad].isnan().all()
        assert buffer[pad + P :].isnan().all()
        assert buffer[pad : pad + P].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradients": torch.zeros(5)}, ValueError, "gradients must be contiguous with shape"),
        ({"momenta": torch.zeros(8)[::2]}, ValueError, "momenta must be contiguous"),
        ({"parameters": torch.zeros(4).half()}, TypeError, "parameters must be torch.float32"),
        ({"lr": torch.zeros(1)}, ValueError, "lr must be contiguous with shape"),
        ({"lr": torch.zeros((), device="meta")}, ValueError, "lr must be on the device"),
        ({"decayed": 5}, ValueError, "decayed must be in 0 .. 4"),
        ({"scaled": -1}, ValueError, "scaled must be in 0 .. 4"),
        ({"lr_factor": 0}, ValueError, "lr_factor must be more than 0 and finite, got 0"),
        ({"lr_factor": float("inf")}, ValueError, "lr_factor must be more than 0 and finite"),
        ({"momentum": -0.1}, ValueError, "momentum must be from 0 to 3.4"),
        ({"weight_decay": 3.5e38}, ValueError, "weight_decay must be from 0 to 3.4"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be from 0 to 3.4"),
        (
            {"lr_factor": 1e-300, "weight_decay": 0.1},
            ValueError,
            "weight_decay / lr_factor must be from 0 to 3.4",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.sgd(**{**flat_state(4, "cpu"), "decayed": 4, **SETTINGS["plain"], **change})


# --- a model's parameters ----------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return FastResNet(8).to(memory_format=torch.channels_last)


def train_both(ours, flat, theirs, plain, steps=4):
    """The same steps with both optimisers."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 10, (4,), generator=generator)
        flat.lr.fill_(0.1 / (step + 1))
        factors = getattr(plain, "factors", [1.0] * len(plain.param_groups))
        for group, factor in zip(plain.param_groups, factors, strict=True):
            group["lr"] = 0.1 / (step + 1) * factor
        flat.differentiate(F.cross_entropy(ours(x), labels))
        flat.step()
        plain.zero_grad()
        F.cross_entropy(theirs(x), labels).backward()
        plain.step()


def plain_sgd(model, decay_vectors=True, weight_decay=1e-4, norm_bias_factor=1.0, **settings):
    if norm_bias_factor != 1:
        biases = [p for name, p in model.named_parameters() if "bn" in name and "bias" in name]
        assert len(biases) == 7
        others = [p for p in model.parameters() if all(p is not bias for bias in biases)]
        weights = [p for p in others if decay_vectors or p.dim() > 1]
        vectors = [p for p in others if not decay_vectors and p.dim() == 1]
        decays = [weight_decay, 0.0, weight_decay / norm_bias_factor if decay_vectors else 0.0]
        groups = [
            {"params": members, "weight_decay": decay}
            for members, decay in zip((weights, vectors, biases), decays, strict=True)
            if members
        ]
        plain = torch.optim.SGD(groups, lr=0.1, **settings)
        plain.factors = [1.0] * (len(groups) - 1) + [norm_bias_factor]
        return plain
    if decay_vectors:
        return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=weight_decay, **settings)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.1, **settings)


VARIANTS = {
    "recipe": {"momentum": 0.9, "weight_decay": 1e-4},
    "nesterov": {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
    "without-momentum": {"momentum": 0.0, "weight_decay": 1e-4},
    "weights-only": {"momentum": 0.9, "weight_decay": 1e-2, "decay_vectors": False},
    # a power of two, so that its product with a learning rate is rounded nowhere
    "norm-biases": {"momentum": 0.9, "weight_decay": 1e-2, "norm_bias_factor": 8.0},
    "norm-biases-weights-only": {
        "momentum": 0.9,
        "weight_decay": 1e-2,
        "nesterov": True,
        "decay_vectors": False,
        "norm_bias_factor": 0.25,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_have_the_bits_of_torchs(variant):
    settings = VARIANTS[variant]
    ours, theirs = small_model(), small_model()
    flat, plain = FlatSGD(ours, **settings), plain_sgd(theirs, **settings)
    train_both(ours, flat, theirs, plain)
    pairs = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    for (name, value), same in pairs:
        assert torch.equal(value, same), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_is_torchs(variant):
    """Half of the steps with one, then its state goes to the other: the end is the same."""
    settings = VARIANTS[variant]
    ours, theirs = small_model(), small_model()
    flat, plain = FlatSGD(ours, **settings), plain_sgd(theirs, **settings)
    train_both(ours, flat, theirs, plain)
    swapped_flat, swapped_plain = FlatSGD(ours, **settings), plain_sgd(theirs, **settings)
    swapped_flat.load_state_dict(plain.state_dict())
    swapped_plain.load_state_dict(deepcopy(flat.state_dict()))
    if settings["momentum"]:
        assert torch.equal(swapped_flat.momenta, flat.momenta)
    train_both(ours, swapped_flat, theirs, swapped_plain)
    for value, same in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(value, same)


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_are_torchs(variant):
    """Every setting, written down here, is what torch.optim.SGD's own dictionary has."""
    settings = VARIANTS[variant]
    theirs = plain_sgd(small_model(), **settings).state_dict()["param_groups"]
    for group in theirs:
        group["lr"] = 0.0  # a flat optimiser's is on the device, and the schedule's
    assert FlatSGD(small_model(), **settings).state_dict()["param_groups"] == theirs


def test_decay_alone_shrinks_a_norm_bias_as_ever():
    """Weight decay's meaning: with no gradient, the factor changes nothing but roundings."""
    ends = []
    for factor in (1.0, 64.0):
        model = small_model()
        for bias in (p for name, p in model.named_parameters() if "bias" in name):
            bias.data.fill_(1.0)
        flat = FlatSGD(model, momentum=0.0, weight_decay=1e-2, norm_bias_factor=factor)
        flat.lr.fill_(0.5)
        for _ in range(3):
            flat.step()
        ends.append(model.bn1.bias.detach().clone())
    assert ends[0][0] == pytest.approx((1 - 0.5 * 1e-2) ** 3, rel=1e-6)
    torch.testing.assert_close(*ends)


WITHOUT_A_COMPILER = """
import sys
import torch
from cifar_resnet_fast import FastResNet
from cifar_resnet_fast.training.optimizers import FlatSGD

def refused(*_, **__):
    raise AssertionError("a torch optimiser is built")

torch.optim.Optimizer.__init__ = refused
model = FastResNet(8, implementation="reference")
optimizer = FlatSGD(model, momentum=0.9, weight_decay=1e-4)
optimizer.differentiate(model(torch.ones(2, 3, 8, 8)).sum())
optimizer.step()
state = optimizer.state_dict()
optimizer.load_state_dict(state)
found = [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))]
assert not found, found[:3]
"""


def test_the_first_state_dict_imports_no_compiler():
    """It took 1.6 s, in which the GPU was idle in the first epoch."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_loss_scale_leaves_the_step_as_it_is():
    ours, theirs = small_model(), small_model()
    settings = VARIANTS["recipe"]
    flat = FlatSGD(ours, **settings, loss_scale=1024.0)
    train_both(ours, flat, theirs, plain_sgd(theirs, **settings), steps=1)
    for value, same in zip(ours.parameters(), theirs.parameters(), strict=True):
        # a power of two changes no bit of a product
        assert torch.equal(value, same)


def test_state_of_before_the_first_step_loads():
    flat = FlatSGD(small_model(), **VARIANTS["recipe"])
    flat.momenta.fill_(1.0)
    flat.load_state_dict(plain_sgd(small_model(), **VARIANTS["recipe"]).state_dict())
    assert all(not view.any() for view in flat._momentum_views)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: plain_sgd(small_model(), momentum=0.8), "momentum 0.9 in group 0, got 0.8"),
        (lambda: plain_sgd(FastResNet(14), momentum=0.9), r"groups of \[.*\] parameters"),
        (lambda: plain_sgd(small_model(), decay_vectors=False, momentum=0.9), "groups of"),
    ],
)
def test_state_of_another_is_refused(other, message):
    flat = FlatSGD(small_model(), **VARIANTS["recipe"])
    with pytest.raises(ValueError, match=message):
        flat.load_state_dict(other().state_dict())


def test_state_of_other_shapes_changes_nothing():
    wide = FastResNet(8, num_classes=100)
    plain = plain_sgd(wide, **VARIANTS["recipe"])
    wide(torch.zeros(2, 3, 8, 8)).sum().backward()
    plain.step()
    flat = FlatSGD(small_model(), **VARIANTS["recipe"])
    with pytest.raises(ValueError, match=r"shape \(10, 64\) for parameter .*, got \(100, 64\)"):
        flat.load_state_dict(plain.state_dict())
    assert not flat.momenta.any()


def test_parameters_stay_parameters():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = [p.stride() for p in model.parameters()]
    kept = list(model.parameters())
    flat = FlatSGD(model, **VARIANTS["recipe"])
    assert all(a is b for a, b in zip(kept, model.parameters(), strict=True))
    assert strides == [p.stride() for p in model.parameters()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters()), "kernels load 16 bytes"
    flat.parameters.zero_()
    assert not any(p.any() for p in model.parameters()), "they are views"
    model.load_state_dict(before)
    assert flat.parameters.any(), "loading writes into the buffer"
    clone = deepcopy(model)
    flat.parameters.zero_()
    assert torch.equal(clone.conv1.weight, before["conv1.weight"]), "a deep copy is its own"


def test_gradients_are_views_for_anybody_who_calls_backward():
    model = small_model()
    flat = FlatSGD(model, **VARIANTS["recipe"])
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    assert flat.gradients.any()
    before = flat.gradients.clone()
    flat.differentiate(model(torch.ones(2, 3, 8, 8)).sum())
    assert torch.equal(before, flat.gradients)


def test_flatten_keeps_any_dense_layout():
    tensors = [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(8)[::2],
        torch.tensor(1.5),
    ]
    before = [t.clone() for t in tensors]
    flat = flatten(tensors)
    assert flat.numel() == 64 + 128 + 64 + 64
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(
        t.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for t in tensors
    )


# --- averaged weights ----------------------------------------------------------------------------


def test_averaged_weights():
    model = small_model()
    flats = [FlatSGD(model, **VARIANTS["weights-only"]).parameters, *flatten_buffers(model)]
    averaged = AveragedWeights(model, flats, 0.9)
    expected = {}
    for step in range(3):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1)
        averaged.update(torch.tensor(step))
        for name, value in model.state_dict().items():
            if step == 0 or not value.is_floating_point():
                expected[name] = value.clone()
            else:
                expected[name] = 0.9 * expected[name] + 0.1 * value
    for name, value in averaged.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert not any(p.requires_grad for p in averaged.model.parameters())


def test_decay_of_a_young_average_rises_from_its_floor():
    model = small_model()
    flats = [FlatSGD(model, **VARIANTS["recipe"]).parameters, *flatten_buffers(model)]
    averaged = AveragedWeights(model, flats, 0.6, floor=0.3)
    decays = [max(0.3, min(0.6, (1 + age) / (10 + age))) for age in range(1, 20)]
    assert decays[0] == decays[1] == 0.3
    assert 0.3 < decays[4] < decays[-2] == decays[-1] == 0.6
    flats[0].fill_(1.0)
    for age in (-10, 0):  # copied up to its beginning
        averaged.flats[0].fill_(7.0)
        averaged.update(torch.tensor(age))
        assert torch.equal(averaged.flats[0], flats[0])
    for age, decay in enumerate(decays, 1):
        averaged.flats[0].zero_()
        averaged.update(torch.tensor(age))
        torch.testing.assert_close(averaged.flats[0], (1 - decay) * flats[0])


# --- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("share", [0.1, 2.0], ids=["clipped", "short-enough"])
def test_clipping_is_torchs(share, scale):
    ours, theirs = small_model(), small_model()
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(p.shape, generator=generator) for p in theirs.parameters()]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    flat = FlatSGD(ours, **VARIANTS["recipe"], clip=share * norm, loss_scale=scale)
    flat.lr.fill_(0.1)
    for our, their, gradient in zip(
        ours.parameters(), theirs.parameters(), gradients, strict=True
    ):
        our.grad.copy_(gradient * scale)
        their.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), share * norm)
    flat.step()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our.grad / scale, their.grad)
    clipped = torch.cat([p.grad.flatten() for p in ours.parameters()]).norm().item() / scale
    assert clipped == pytest.approx(min(share, 1.0) * norm, rel=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_clipping_of_a_bad_gradient(value):
    """One that is not finite skips the step alone; one whose square overflows is clipped."""
    model = small_model()
    flat = FlatSGD(model, **VARIANTS["recipe"], clip=1.0)
    flat.lr.fill_(0.1)
    before = flat.parameters.clone()
    model.linear.bias.grad[0] = value
    flat.step()
    finite = value == 1e30
    assert flat.skipped == (0 if finite else 1)
    assert torch.equal(flat.parameters, before) != finite
    assert flat.parameters.isfinite().all()
    for parameter in model.parameters():
        parameter.grad.fill_(1.0)
    flat.step()
    assert flat.skipped == (0 if finite else 1), "the gaps between parameters are zero still"


# --- lookahead -----------------------------------------------------------------------------------


def test_lookahead_by_hand():
    fast = torch.zeros(1)
    lookahead = Lookahead(fast, 3, 0.5)
    seen = []
    for step in range(7):
        fast += 1
        lookahead.update(torch.tensor(step))
        seen.append((fast.item(), lookahead.slow.item()))
    after = [(1, 0), (2, 0), (1.5, 1.5), (2.5, 1.5), (3.5, 1.5), (3, 3), (4, 3)]
    assert seen == after
