"""The recipe's optimiser and learning-rate schedule (layer 2)."""

from collections.abc import Sequence

import torch
from torch import nn


def make_sgd(model: nn.Module, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum over all parameters; the learning rate is set before every step.

    Source: He et al. 2015, section 4.2.
    """
    return torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=momentum, weight_decay=weight_decay
    )


def learning_rate(
    step: int,
    *,
    steps_per_epoch: int,
    lr: float,
    warmup_epochs: float,
    milestones: Sequence[int],
) -> float:
    """The learning rate of a step: linear warm-up, then a tenth at each milestone.

    Args:
        step: from 0, counted from the start of the training
        steps_per_epoch: full batches in an epoch
        lr: peak, reached with the last step of the warm-up
        warmup_epochs: length of the warm-up; 0 for none
        milestones: epochs, from 0, at whose start the rate drops to a tenth

    Source: He et al. 2015, section 4.2 (milestones); Goyal et al. 2017, section 2.2 (warm-up).
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    passed = sum(step >= milestone * steps_per_epoch for milestone in milestones)
    return lr * warmup * 0.1**passed
