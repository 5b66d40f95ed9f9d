"""The plain operations: shortcut arithmetic, augmentation by property, checks of arguments."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cifar_resnet_fast import FastResNet, ops, reference


def test_shortcut_a_arithmetic():
    """Every second pixel, and the old channels in the middle of the new ones."""
    x = torch.arange(2 * 4 * 6 * 8, dtype=torch.float32).reshape(2, 4, 6, 8)
    z = ops.shortcut_a(x, 8)
    assert z.shape == (2, 8, 3, 4)
    for h in range(3):
        for w in range(4):
            assert torch.equal(z[:, 2:6, h, w], x[:, :, 2 * h, 2 * w])
    assert (z[:, :2] == 0).all()
    assert (z[:, 6:] == 0).all()


def test_shortcut_a_gradient():
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.shortcut_a(x, 8), x)
    assert ops.shortcut_a(x, 8).shape == (2, 8, 3, 4), "odd sizes round up"


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_bn_relu_statistics_are_pytorchs(stride):
    x = (0.5 * torch.randn(3, 16, 7, 5) - 2.3).double()
    conv = torch.nn.Conv2d(16, 32, 3, stride, 1, bias=False).double()
    bn = torch.nn.BatchNorm2d(32).double()
    mean, var = torch.zeros(32).double(), torch.ones(32).double()
    a = ops.conv_bn_relu(x, conv.weight, bn.weight, bn.bias, mean, var, stride=stride)
    torch.testing.assert_close(a, F.relu(bn(conv(x))))
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(var, bn.running_var)


# --- augmentation ----------------------------------------------------------------------------


def test_augment_is_a_shifted_mirrored_picture_with_zero_border():
    """Each output, pixel by pixel from the definition, for every corner and both mirrorings."""
    N, side, padding = 4, 6, 2
    images = torch.randint(1, 256, (N, side, side, 3), dtype=torch.uint8)
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            flip = torch.tensor([False, True, True, False])
            corner = torch.full((N,), dy), torch.full((N,), dx)
            out = reference.augment(images, *corner, flip, padding)
            expected = torch.zeros_like(images)
            for n in range(N):
                for h in range(side):
                    for w in range(side):
                        row = h + dy - padding
                        column = (side - 1 - w if flip[n] else w) + dx - padding
                        if 0 <= row < side and 0 <= column < side:
                            expected[n, h, w] = images[n, row, column]
            assert torch.equal(out, expected)


def test_normalize_is_torchvisions():
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])
    out = reference.normalize(images, mean, std, torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = (images.permute(0, 3, 1, 2).double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    # three roundings of numbers up to 4
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3 * 4 * 2**-24)


# --- bad arguments -----------------------------------------------------------------------------


def unit_arguments(**changes):
    """Valid arguments of conv_bn_relu, some of them changed."""
    arguments = {
        "x": torch.randn(2, 16, 8, 8),
        "weight": torch.randn(32, 16, 3, 3),
        "bn_weight": torch.ones(32),
        "bn_bias": torch.zeros(32),
        "running_mean": torch.zeros(32),
        "running_var": torch.ones(32),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 16, 8, 8, dtype=torch.int8)}, TypeError, "x must be of a floating"),
        ({"x": torch.zeros(16, 8, 8)}, ValueError, r"x must be \[N, C, H, W\].*\(16, 8, 8\)"),
        ({"x": torch.zeros(0, 16, 8, 8)}, ValueError, "x must be .* no axis empty"),
        ({"x": torch.zeros(2, 8, 8, 8)}, ValueError, r"weight must have shape \(32, 8, 3, 3\)"),
        ({"weight": torch.zeros(32, 16, 5, 5)}, ValueError, r"weight must have.*\(32, 16, 5, 5\)"),
        (
            {"bn_bias": torch.zeros(16)},
            ValueError,
            r"bn_bias must have shape \(32,\), got \(16,\)",
        ),
        ({"shortcut": torch.zeros(2, 32, 4, 4)}, ValueError, "shortcut must have shape"),
        ({"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
        ({"implementation": "magic"}, ValueError, "implementation must be one of .* 'magic'"),
        ({"running_var": torch.ones(32, device="meta")}, ValueError, "running_var .* got meta"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else ""
    ),
)
def test_conv_bn_relu_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        ops.conv_bn_relu(**unit_arguments(**changes))


def test_one_value_a_channel_cannot_be_normalised():
    one = unit_arguments(x=torch.randn(1, 16, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.conv_bn_relu(**one)
    assert ops.conv_bn_relu(**one, training=False).shape == (1, 32, 1, 1)


@pytest.mark.parametrize("out_channels", [3, 5, 2])
def test_shortcut_a_channel_rule(out_channels):
    with pytest.raises(ValueError, match=f"out_channels must be x's 4 channels.*{out_channels}"):
        ops.shortcut_a(torch.zeros(1, 4, 2, 2), out_channels)


def test_reference_serves_half_precision():
    x = torch.randn(1, 16, 4, 4, dtype=torch.bfloat16)
    assert reference.shortcut_a(x, 32).dtype == torch.bfloat16


def test_importing_the_package_is_light():
    """Neither triton nor torch's compiler, seconds of importing, before something needs them."""
    code = "import sys, cifar_resnet_fast; print({'triton', 'torch._dynamo'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_shapes_alone():
    """On the meta device a network gives the shape of its result."""
    with torch.device("meta"):
        model, x = FastResNet(8), torch.empty(2, 3, 32, 32)
        assert model(x).shape == (2, 10)


# --- arguments of another kind -------------------------------------------------------------------


def valid_calls():
    """Arguments by name of every public operation, so that each can be replaced."""
    P = {name: torch.ones(4) for name in ("parameters", "gradients", "momenta")}
    P |= {"lr": torch.tensor(0.1), "loss_scale": torch.tensor(1.0)}
    P |= {"skipped": torch.tensor(0, dtype=torch.int32)}
    unit = {"x": torch.randn(2, 16, 4, 4), "weight": torch.randn(16, 16, 3, 3)}
    unit |= {name: torch.ones(16) for name in ("bn_weight", "bn_bias")}
    unit |= {name: torch.ones(16) for name in ("running_mean", "running_var")}
    units = [
        ops.Unit(torch.randn(K, C, 3, 3), *(torch.ones(K) for _ in range(4)), 0.1, 1e-5)
        for C, K in ((3, 16), (16, 16), (16, 16))
    ]
    values = ops.normalized_bytes(torch.ones(3), torch.ones(3), torch.float32)
    sizes = {"decayed": 4, "momentum": 0.9, "weight_decay": 0.1, "nesterov": False}
    batch = {
        "images": torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
        "labels": torch.zeros(4, dtype=torch.int64),
        "values": values,
        "draws": torch.zeros(6, 4, dtype=torch.int32),
        "step": torch.tensor(0),
    }
    return {
        "sgd": {**P, **sizes},
        "load_batch": {**batch, "batch_size": 2, "padding": 1, "cutout": 0},
        "normalized_bytes": {
            "mean": torch.ones(3),
            "std": torch.ones(3),
            "dtype": torch.float32,
        },
        "conv_bn_relu": {
            **{**unit, "stride": 1, "shortcut": None, "relu": True},
            **{"training": True, "momentum": 0.1, "eps": 1e-5},
        },
        "linear_cross_entropy": {
            **{"features": torch.randn(4, 3), "weight": torch.randn(2, 3), "bias": None},
            **{"labels": torch.zeros(4, dtype=torch.int64), "label_smoothing": 0.1},
        },
        "record_step": {
            **{"metrics": torch.zeros(3, 4), "loss": torch.tensor(1.0)},
            **{"hits": torch.tensor(1.0), "skipped": torch.tensor(0, dtype=torch.int32)},
            **{"step": torch.tensor(0), "lr": torch.tensor(0.1), "schedule": torch.ones(4)},
        },
        "shortcut_a": {"x": torch.randn(2, 4, 4, 4), "out_channels": 8, "stride": 2},
        "trunk": {"pictures": torch.randn(2, 3, 4, 4), "units": units, "training": True},
        "choose": {
            **{"implementation": "auto", "device": torch.device("cpu")},
            "operation": "sgd",
        },
        "why_not": {
            **{"implementation": "reference", "device": torch.device("cpu")},
            "operation": "sgd",
        },
    }


def nested_tensor():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(2)])


def test_every_operation_is_tried():
    assert valid_calls().keys() >= set(ops.OPERATIONS)


ODD = {
    "None": lambda: None,
    "list": lambda: [[1.0]],
    "string": lambda: "tensor",
    "dictionary": lambda: {"a": 1},
    "nested": nested_tensor,
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "empty": lambda: torch.empty(0),
    "bools": lambda: torch.ones(4, dtype=torch.bool),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("operation", valid_calls())
def test_arguments_of_another_kind_are_named(operation, odd):
    run, arguments = getattr(ops, operation), valid_calls()[operation]
    run(**arguments)
    for name in arguments:
        if odd == "None" and name in ("shortcut", "bias"):
            continue
        word = name.removesuffix("s") if name == "units" else name
        with pytest.raises((TypeError, ValueError), match=rf"\b{word}"):
            run(**{**valid_calls()[operation], name: ODD[odd]()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("field", ops.Unit._fields)
def test_units_of_another_kind_are_named(field, odd):
    arguments = valid_calls()["trunk"]
    arguments["units"][1] = arguments["units"][1]._replace(**{field: ODD[odd]()})
    with pytest.raises((TypeError, ValueError), match=f"{field} 1 must"):
        ops.trunk(**arguments)
