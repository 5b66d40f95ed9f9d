"""The schedule, value by value, and SGD's settings."""

import pytest
import torch

from cifar_resnet_fast.optimizer import learning_rate, make_sgd

RECIPE = {"steps_per_epoch": 48, "lr": 1.2, "warmup_epochs": 5, "milestones": (80, 120)}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1.2 / 240),  # the first step already moves
        (119, 0.6),
        (239, 1.2),  # the last step of the warm-up reaches the peak
        (240, 1.2),
        (80 * 48 - 1, 1.2),
        (80 * 48, 0.12),  # the first step of epoch 80
        (120 * 48 - 1, 0.12),
        (120 * 48, 0.012),
        (160 * 48 - 1, 0.012),
    ],
)
def test_recipe(step, expected):
    assert learning_rate(step, **RECIPE) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_and_milestones():
    plain = {"steps_per_epoch": 10, "lr": 0.1, "warmup_epochs": 0, "milestones": ()}
    assert {learning_rate(step, **plain) for step in range(100)} == {0.1}


def test_a_fraction_of_an_epoch_warms_up():
    half = {"steps_per_epoch": 10, "lr": 1.0, "warmup_epochs": 0.5, "milestones": ()}
    rates = [learning_rate(step, **half) for step in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_sgd_settings():
    optimizer = make_sgd(torch.nn.Linear(2, 2), momentum=0.9, weight_decay=1e-4)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
