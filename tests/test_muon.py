"""Muon over flat buffers against its twin, a parameter at a time."""

from copy import deepcopy

import pytest
import torch

from cifar_resnet_fast import FastResNet, reference
from cifar_resnet_fast.training.muon import FlatMuon
from cifar_resnet_fast.training.optimizers import FlatSGD

SETTINGS = {"momentum": 0.9, "weight_decay": 1e-2}


def small_model():
    torch.manual_seed(0)
    return FastResNet(8).to(memory_format=torch.channels_last)


def steps(optimizer, parameters, count=3, scale=1.0, lr=0.1):
    """So many steps along drawn gradients; returns the gradients of each."""
    generator, given = torch.Generator().manual_seed(1), []
    optimizer.lr.fill_(lr)
    for _ in range(count):
        given.append([torch.randn(p.shape, generator=generator) for p in parameters])
        for parameter, gradient in zip(parameters, given[-1], strict=True):
            parameter.grad.copy_(gradient * scale)
        optimizer.step()
    return given


def is_convolution(parameter):
    return parameter.dim() == 4


@pytest.mark.parametrize("nesterov", [False, True])
def test_convolutions_have_the_twins_steps(nesterov):
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = FlatMuon(model, rate=0.5, nesterov=nesterov, **SETTINGS)
    gradients = steps(optimizer, list(model.parameters()))
    checked = 0
    for place, parameter in enumerate(model.parameters()):
        if not is_convolution(parameter):
            continue
        ends = []
        for dtype in (torch.float32, torch.float64):
            value = before[place].to(dtype)
            momenta = torch.zeros_like(value)
            for step in gradients:
                gradient = step[place].to(dtype)
                reference.muon(value, gradient, momenta, 0.05, momentum=0.9, nesterov=nesterov)
            ends.append(value)
        single, exact = ends
        # both round a few times; half a step of float32 at a weight of 1 comes on top
        budget = 2 * (single - exact).abs().max() + 2.0**-24
        assert (parameter - exact).abs().max() <= budget
        checked += 1
    assert checked == 7


@pytest.mark.parametrize("norm_bias_factor", [1.0, 8.0])
def test_other_parameters_have_the_bits_of_sgd(norm_bias_factor):
    ours, theirs = small_model(), small_model()
    settings = {**SETTINGS, "decay_vectors": False, "norm_bias_factor": norm_bias_factor}
    steps(FlatMuon(ours, rate=0.5, **settings), list(ours.parameters()))
    steps(FlatSGD(theirs, **settings), list(theirs.parameters()))
    for value, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(value, other) != is_convolution(value)


def test_a_step_is_nearly_orthogonal():
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    steps(FlatMuon(model, rate=1.0, **SETTINGS), list(model.parameters()), count=1, lr=0.5)
    for start, end in zip(before, model.parameters(), strict=True):
        if is_convolution(start):
            scaled = start * (len(start) ** 0.5 / start.norm())
            way = ((scaled - end) / 0.5).reshape(len(start), -1)
            values = torch.linalg.svdvals(way.detach())
            # the range that the source states
            assert values.min() > 0.5
            assert values.max() < 1.5


@pytest.mark.parametrize("place", [0, -1, 1], ids=["convolution", "bias", "normalisation"])
def test_one_bad_gradient_skips_the_whole_step(place):
    model = small_model()
    optimizer = FlatMuon(model, rate=0.5, **SETTINGS)
    parameters = list(model.parameters())
    steps(optimizer, parameters, count=1)
    kept = optimizer.parameters.clone(), optimizer.momenta.clone()
    first = (0,) * parameters[place].dim()
    parameters[place].grad[first] = float("inf") if place else float("nan")
    optimizer.step()
    assert optimizer.skipped == 1
    assert torch.equal(optimizer.parameters, kept[0])
    assert torch.equal(optimizer.momenta, kept[1])
    steps(optimizer, parameters, count=1)
    assert optimizer.skipped == 1, "the next step is a usual one"
    assert not torch.equal(optimizer.parameters, kept[0])


def test_loss_scale_leaves_the_step_as_it_is():
    ours, scaled = small_model(), small_model()
    steps(FlatMuon(ours, rate=0.5, **SETTINGS), list(ours.parameters()))
    flat = FlatMuon(scaled, rate=0.5, loss_scale=1024.0, **SETTINGS)
    steps(flat, list(scaled.parameters()), scale=1024.0)
    for value, same in zip(ours.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(value, same)


def test_state_goes_on_where_it_was():
    model = small_model()
    optimizer = FlatMuon(model, rate=0.5, **SETTINGS)
    steps(optimizer, list(model.parameters()))
    other = deepcopy(model)
    again = FlatMuon(other, rate=0.5, **SETTINGS)
    again.load_state_dict(optimizer.state_dict())
    for flat, network in ((optimizer, model), (again, other)):
        steps(flat, list(network.parameters()))
    assert torch.equal(optimizer.parameters, again.parameters)
    assert torch.equal(optimizer.momenta, again.momenta)
    with pytest.raises(ValueError, match="optimizer state must have"):
        FlatSGD(small_model(), **SETTINGS).load_state_dict(optimizer.state_dict())
