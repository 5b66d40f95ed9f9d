"""A step's metrics and the next step's number and learning rate."""

import pytest
import torch

from cifar_resnet_fast import ops


def state(step, columns, steps, device):
    """Arguments by name, what is written poisoned."""
    return {
        "metrics": torch.full((3, columns), float("nan"), device=device),
        "loss": torch.tensor(2.25, device=device),
        "hits": torch.tensor(77.0, device=device),
        "skipped": torch.tensor(3, dtype=torch.int32, device=device),
        "step": torch.tensor(step, device=device),
        "lr": torch.tensor(float("nan"), device=device),
        "schedule": torch.arange(1.0, steps + 1, device=device),
    }


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize(
    ("step", "columns", "steps", "lr"),
    [
        pytest.param(0, 4, 8, 2.0, id="first"),
        pytest.param(6, 4, 8, 8.0, id="second-epoch"),
        pytest.param(7, 4, 8, 8.0, id="last-keeps-its-rate"),
        pytest.param(0, 1, 1, 1.0, id="only"),
        pytest.param(2**31 + 5, 16, 3, 3.0, id="beyond-32-bits"),
    ],
)
def test_record(step, columns, steps, lr, implementation, device):
    made = state(step, columns, steps, device)
    ops.record_step(**made, implementation=implementation)
    assert made["metrics"][:, step % columns].tolist() == [2.25, 77.0, 3.0]
    assert int(made["metrics"].isnan().sum()) == 3 * (columns - 1), "no other column is written"
    assert made["step"] == step + 1
    assert made["lr"] == lr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metrics": torch.zeros(2, 4)}, ValueError, r"metrics must be .* shape \(3, 4\)"),
        ({"metrics": torch.zeros(4, 3).T}, ValueError, "metrics must be contiguous"),
        ({"loss": torch.zeros(1)}, ValueError, "loss must be .* shape"),
        ({"hits": torch.tensor(3)}, TypeError, "hits must be torch.float32, got torch.int64"),
        ({"schedule": torch.zeros(0)}, ValueError, "schedule must be contiguous and not empty"),
        ({"lr": torch.zeros((), device="meta")}, ValueError, "lr must be on the device"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.record_step(**{**state(0, 4, 8, "cpu"), **change})
