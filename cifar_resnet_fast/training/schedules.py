"""The learning rate of every step of a run (layer 2)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SCHEDULES = ("step", "linear", "cosine", "one-cycle")
_ONE_CYCLE_START = 1 / 25  # share of the peak, as in torch.optim.lr_scheduler.OneCycleLR


def learning_rates(
    steps: int,
    *,
    steps_per_epoch: int,
    lr: float,
    schedule: str = "step",
    warmup_epochs: float = 0.0,
    milestones: Sequence[int] = (),
    final_lr: float = 0.0,
) -> Tensor:
    """The learning rate of each step: a warm-up to the peak, then a decrease.

    The warm-up is linear and reaches the peak with its last step. ``step`` then drops to a tenth
    at each milestone. ``linear`` and ``cosine`` fall from the first step after the warm-up to
    ``final_lr`` times the peak, the rate of a step after the last one, so that no step is lost
    if that is 0. ``one-cycle`` rises along a cosine from a 25th of the peak and falls along
    one; its last step has ``final_lr`` times the peak.

    Args:
        steps: number of steps of the whole run
        steps_per_epoch: full batches in an epoch
        lr: peak
        schedule: one of ``SCHEDULES``
        warmup_epochs: length of the warm-up; 0 for none; less than the run's, except with ``step``
        milestones: epochs, from 0, at whose start the rate of ``step`` drops
        final_lr: as a share of the peak, 0 .. 1; ``step`` does not use it

    Returns:
        [steps] float64

    Source: He et al. 2015, section 4.2 (milestones); Goyal et al. 2017, section 2.2 (warm-up);
    Loshchilov and Hutter 2017, equation 5 (cosine); Smith and Topin 2018 (one-cycle), in the form
    of torch.optim.lr_scheduler.OneCycleLR with constant momentum.
    """
    step = torch.arange(steps, dtype=torch.float64)
    warmup_steps = warmup_epochs * steps_per_epoch
    if schedule == "one-cycle":
        up = max(warmup_steps - 1, 0.0)
        rise = _cosine(step / up) if up else torch.ones_like(step)
        fall = _cosine(((step - up) / max(steps - 1 - up, 1.0)).clamp(0, 1))
        risen = _ONE_CYCLE_START + (1 - _ONE_CYCLE_START) * rise
        return lr * torch.where(step < up, risen, 1 + (final_lr - 1) * fall)
    warmup = ((step + 1) / warmup_steps).clamp(max=1.0) if warmup_steps else torch.ones_like(step)
    if schedule == "step":
        starts = torch.tensor(list(milestones), dtype=torch.float64) * steps_per_epoch
        passed = (step[:, None] >= starts).sum(1)
        tenths = [0.1**number for number in range(len(milestones) + 1)]
        return lr * warmup * torch.tensor(tenths, dtype=torch.float64)[passed]
    way = ((step - warmup_steps) / (steps - warmup_steps)).clamp(min=0.0)
    if schedule == "cosine":
        way = _cosine(way)
    return lr * warmup * (1 + (final_lr - 1) * way)


def _cosine(way: Tensor) -> Tensor:
    """Rises from 0 at 0 to 1 at 1, flat at both ends."""
    return (1 - torch.cos(math.pi * way)) / 2
