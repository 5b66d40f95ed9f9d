"""The learning rate of every step: warm-up, the four ways down, and where they end."""

import math

import pytest
import torch

from cifar_resnet_fast.training.schedules import SCHEDULES, learning_rates

# --- step ----------------------------------------------------------------------------------------

PAPER = {"steps_per_epoch": 48, "lr": 1.2, "warmup_epochs": 5, "milestones": (80, 120)}


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
def test_paper(step, expected):
    assert learning_rates(160 * 48, **PAPER)[step].item() == pytest.approx(expected, rel=1e-12)


def test_every_step_of_the_paper_has_the_bits_of_a_loop():
    """Runs that were begun when the schedule was a loop in Python go on with the same rates."""
    expected = [
        1.2 * min(1.0, (step + 1) / 240) * 0.1 ** sum(step >= 48 * m for m in (80, 120))
        for step in range(160 * 48)
    ]
    assert learning_rates(160 * 48, **PAPER).tolist() == expected


def test_without_warmup_and_milestones():
    rates = learning_rates(100, steps_per_epoch=10, lr=0.1)
    assert set(rates.tolist()) == {0.1}


@pytest.mark.parametrize("schedule", ["step", "linear", "cosine"])
def test_a_fraction_of_an_epoch_warms_up(schedule):
    rates = learning_rates(
        40, steps_per_epoch=10, lr=1.0, warmup_epochs=0.5, final_lr=1.0, schedule=schedule
    )
    assert rates[:7].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])


# --- the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("final_lr", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("warmup_epochs", [0.0, 3.0, 2.55])
def test_gradual_ways_down(warmup_epochs, final_lr):
    """Step by step from their formulas; a step after the last one would have the final rate."""
    settings = {"steps_per_epoch": 20, "lr": 0.7, "warmup_epochs": warmup_epochs}
    settings |= {"final_lr": final_lr}
    warm, steps = warmup_epochs * 20, 200
    for schedule, height in (
        ("linear", lambda way: 1 - way),
        ("cosine", lambda way: 0.5 * (1 + math.cos(math.pi * way))),
    ):
        rates = learning_rates(steps, schedule=schedule, **settings).tolist()
        for step, rate in enumerate(rates):
            way = (step - warm) / (steps - warm)
            if way < 0:
                right = 0.7 * min((step + 1) / warm, 1)
            else:
                right = 0.7 * (final_lr + (1 - final_lr) * height(way))
            assert rate == pytest.approx(right, rel=1e-12), (schedule, step)
        assert min(rates) > 0, "no step is lost"


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(10, 3.0), (7, 2.5)])
def test_one_cycle_is_torchs(epochs, warmup_epochs):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.8,
        total_steps=20 * epochs,
        pct_start=warmup_epochs / epochs,
        cycle_momentum=False,
        final_div_factor=0.04 / 0.01,  # of the start, which is a 25th of the peak
    )
    expected = []
    for _ in range(20 * epochs):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    rates = learning_rates(
        20 * epochs,
        steps_per_epoch=20,
        lr=0.8,
        schedule="one-cycle",
        warmup_epochs=warmup_epochs,
        final_lr=0.01,
    )
    assert rates.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup_epochs"), [(1, 0.0), (2, 0.5), (2, 1.9), (3, 0.01)])
def test_the_shortest_runs_have_finite_rates(schedule, steps, warmup_epochs):
    rates = learning_rates(
        steps, steps_per_epoch=1, lr=0.3, schedule=schedule, warmup_epochs=warmup_epochs
    )
    assert rates.shape == (steps,)
    assert (rates[:1] > 0).all()
    assert ((rates >= 0) & (rates <= 0.3)).all()
