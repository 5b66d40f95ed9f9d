"""Last layer and loss as one operation, against float64, and its gradient."""

import pytest
import torch
import torch.nn.functional as F

from cifar_resnet_fast import ops
from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.verification.budget import assert_within_budget

SHAPES = [  # N, C, K
    pytest.param(1, 64, 10, id="one-image"),
    pytest.param(37, 64, 10, id="ragged-tile"),
    pytest.param(16, 64, 2, id="two-classes"),
    pytest.param(40, 64, 100, id="100-classes"),
    pytest.param(33, 24, 131, id="two-blocks-of-classes-ragged-features"),
    pytest.param(16, 40, 1024, id="most-classes"),
]
VARIANTS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "mixed": {"mixed": 0.3},
    "smoothed-and-mixed": {"label_smoothing": 0.2, "mixed": 0.75},
    "no-bias": {"bias": False},
}


def problem(N, C, K, device, label_smoothing=0.0, mixed=None, bias=True):
    """Arguments by name; of features with a large mean."""
    generator = torch.Generator().manual_seed(N + C + K)
    made = {
        "features": 0.5 * torch.randn(N, C, generator=generator) + 2.3,
        "weight": torch.randn(K, C, generator=generator) / C**0.5,
        "bias": torch.randn(K, generator=generator) if bias else None,
        "labels": torch.randint(0, K, (N,), generator=generator),
    }
    if mixed is not None:
        made["labels_b"] = torch.randint(0, K, (N,), generator=generator)
        made["ratio"] = torch.tensor(mixed)
    made = {k: None if v is None else v.to(device) for k, v in made.items()}
    return {**made, "label_smoothing": label_smoothing}


def run(arguments, implementation, upstream, dtype=torch.float32, autocast=False):
    """loss, hits and gradients, the last of ``upstream`` times the loss."""
    arguments = {
        k: v.to(dtype)
        if isinstance(v, torch.Tensor) and k in ("features", "weight", "bias")
        else v
        for k, v in arguments.items()
    }
    names = [n for n in ("features", "weight", "bias") if arguments[n] is not None]
    for name in names:
        arguments[name] = arguments[name].detach().requires_grad_()
    with torch.autocast(arguments["labels"].device.type, torch.bfloat16, enabled=autocast):
        loss, hits = ops.linear_cross_entropy(**arguments, implementation=implementation)
    assert not hits.requires_grad
    scale = torch.tensor(upstream, dtype=loss.dtype, device=loss.device)
    gradients = torch.autograd.grad(loss, [arguments[n] for n in names], scale)
    made = {"loss": loss.detach(), "hits": hits}
    return made | {f"d{n}": g for n, g in zip(names, gradients, strict=True)}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("N", "C", "K"), SHAPES)
def test_within_budget(N, C, K, variant, device, monkeypatch):
    # a program has several tiles of rows
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 2)
    arguments = problem(N, C, K, device, **VARIANTS[variant])
    ours = run(arguments, "triton", 128.0)
    eager = run(arguments, "reference", 128.0)
    exact = run(arguments, "reference", 128.0, torch.float64)
    for name, value in exact.items():
        assert_within_budget(name, ours[name], eager[name], value)


def test_reference_is_pytorchs(device):
    """Linear layer, softmax and targets written out."""
    arguments = problem(9, 24, 7, device, label_smoothing=0.2, mixed=0.75)
    features, weight, bias = (
        arguments[n].double().requires_grad_() for n in ("features", "weight", "bias")
    )
    labels = {"labels": arguments["labels"], "labels_b": arguments["labels_b"]}
    loss, hits = ops.linear_cross_entropy(
        features, weight, bias, **labels, ratio=arguments["ratio"], label_smoothing=0.2
    )
    one_hot = [F.one_hot(label, 7).double() for label in labels.values()]
    ratio = arguments["ratio"].double()
    target = 0.8 * (ratio * one_hot[0] + (1 - ratio) * one_hot[1]) + 0.2 / 7
    logits = features @ weight.T + bias
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    right = (logits.argmax(1)[:, None] == torch.stack(list(labels.values()), 1)).double().sum(0)
    torch.testing.assert_close(hits, ratio * right[0] + (1 - ratio) * right[1])
    assert torch.autograd.gradcheck(
        lambda *t: ops.linear_cross_entropy(
            *t, **labels, ratio=arguments["ratio"], label_smoothing=0.2
        )[0],
        (features, weight, bias),
    )


def test_runs_have_the_same_bits(device):
    arguments = problem(100, 64, 100, device, label_smoothing=0.1)
    first, second = (run(arguments, "triton", 1.0) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_without_gradients_loss_and_hits_are_the_same(device):
    arguments = problem(40, 64, 10, device)
    trained = run(arguments, "triton", 1.0)
    loss, hits = ops.linear_cross_entropy(**arguments, implementation="triton")
    assert torch.equal(loss, trained["loss"])
    assert torch.equal(hits, trained["hits"])


def test_only_wanted_gradients(device):
    arguments = problem(20, 64, 10, device)
    arguments["weight"].requires_grad_()
    loss, _ = ops.linear_cross_entropy(**arguments, implementation="triton")
    loss.backward()
    assert torch.equal(arguments["weight"].grad, run(arguments, "triton", 1.0)["dweight"])
    assert arguments["features"].grad is None


def test_the_first_of_equal_logits_is_the_answer(device):
    labels = torch.tensor([0, 4, 7], device=device)
    zeros = torch.zeros(3, 64, device=device), torch.zeros(10, 64, device=device)
    _, hits = ops.linear_cross_entropy(*zeros, None, labels, implementation="triton")
    assert hits == 1


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.parametrize("which", ["labels", "labels_b"])
def test_a_label_of_no_class_shows(label, which, device):
    arguments = problem(20, 64, 10, device, mixed=0.5)
    arguments[which][3] = label
    loss, _ = ops.linear_cross_entropy(**arguments, implementation="triton")
    assert loss.isnan()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_feature_shows(value, device):
    arguments = problem(20, 64, 10, device)
    arguments["features"][5, 7] = value
    made = run(arguments, "triton", 1.0)
    assert made["loss"].isnan()
    assert not made["dweight"].isfinite().all()


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_autocast_changes_nothing(implementation, device):
    arguments = problem(20, 64, 10, device)
    usual = run(arguments, implementation, 1.0)
    ours = run(arguments, implementation, 1.0, autocast=True)
    for name, value in usual.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(4)}, ValueError, r"features must be \[N, C\]"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight must have shape \(3, 8\)"),
        ({"weight": torch.zeros(1, 8), "bias": None}, ValueError, "at least 2 classes, got 1"),
        ({"weight": torch.zeros(3, 8).half()}, TypeError, "weight must be torch.float32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(3,\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels must have shape"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be torch.int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "labels must"),
        ({"ratio": torch.tensor(0.5)}, ValueError, "given together, got ratio alone"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in 0 .. 1, got 1.5"),
        ({"implementation": "cuda"}, RuntimeError, "no implementation of that name"),
        (
            {"weight": torch.zeros(1025, 8), "bias": None, "implementation": "triton"},
            ValueError,
            "at most 1024 classes for implementation 'triton', got 1025",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "features": torch.zeros(4, 8),
        "weight": torch.zeros(3, 8),
        "bias": torch.zeros(3),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(**{**arguments, **change})
