"""conv_bn_relu on the Triton kernels against float64, in the interpreter or on a GPU."""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cifar_resnet_fast import ConvBNReLU, FastResNet, ops, reference
from cifar_resnet_fast.verification.budget import assert_within_budget

pytest.importorskip("triton")

from cifar_resnet_fast.kernels import launch

DTYPES = [
    torch.float32,
    torch.float16,
    # the interpreter computes on bfloat16's bit patterns
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
guarded = pytest.mark.usefixtures("guarded_memory")


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    names, real_launch = [], launch.launch

    def record(kernel, grid, **arguments):
        names.append(kernel.fn.__name__)
        real_launch(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "launch", record)
    return names


@dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    N: int
    C: int
    H: int
    W: int
    K: int
    stride: int = 1
    shortcut: bool = False
    relu: bool = True

    @property
    def out_shape(self):
        return self.N, self.K, -(-self.H // self.stride), -(-self.W // self.stride)


CASES = {
    "one-column-of-one-picture": Case(1, 16, 5, 1, 16, shortcut=True),
    "ragged-second-tile": Case(2, 16, 13, 11, 16),
    "three-tiles-for-two-programs": Case(2, 16, 17, 17, 16, shortcut=True),
    "stem": Case(3, 3, 8, 8, 16),
    "stem-at-stride-2": Case(2, 3, 7, 6, 16, stride=2, relu=False),
    "into-a-stage-from-odd-sizes": Case(2, 16, 9, 7, 32, stride=2, shortcut=True),
    "into-a-stage-from-even-sizes": Case(2, 32, 8, 8, 64, stride=2),
    "two-channel-blocks": Case(2, 64, 4, 4, 64, shortcut=True),
    "input-channels-no-power-of-two": Case(2, 48, 4, 3, 16),
    "no-relu-with-shortcut": Case(2, 16, 6, 5, 16, shortcut=True, relu=False),
    "stride-2-of-one-pixel": Case(4, 16, 1, 1, 16, stride=2),
}


def place(t, device):
    """A copy with poison around it, in t's memory format."""
    kept = torch.empty_like(t.to(device))
    return kept.copy_(t)


def make_inputs(case, dtype, device, seed=0):
    """The tensors of one call and an output gradient; x has the mean that breaks E[y^2]-E[y]^2."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    last = torch.channels_last
    inputs = {
        "x": (0.5 * randn(case.N, case.C, case.H, case.W) - 2.3).to(dtype, memory_format=last),
        "weight": (randn(case.K, case.C, 3, 3) * (2 / (9 * case.C)) ** 0.5).to(dtype),
        "bn_weight": randn(case.K).abs() + 0.5,
        "bn_bias": 0.3 * randn(case.K),
        "running_mean": randn(case.K),
        "running_var": randn(case.K).abs() + 0.5,
        "shortcut": None,
    }
    if case.shortcut:
        inputs["shortcut"] = randn(*case.out_shape).to(dtype, memory_format=last)
    inputs = {k: None if t is None else place(t, device) for k, t in inputs.items()}
    return inputs, place(randn(*case.out_shape).to(dtype, memory_format=last), device)


DIFFERENTIABLE = ("x", "weight", "bn_weight", "bn_bias", "shortcut")


def run(function, inputs, da, mask=None, wanted=DIFFERENTIABLE, **settings):
    """Everything that a call makes: output, gradients of ``wanted``, running statistics.

    ``mask`` replaces the ReLU: float64 then differentiates what the kernel differentiated.
    """
    inputs = {k: None if t is None else t.clone() for k, t in inputs.items()}
    wanted = [k for k in wanted if inputs[k] is not None]
    for key in wanted:
        inputs[key].requires_grad_()
    if mask is None:
        out = function(**inputs, **settings)
    else:
        out = function(**inputs, **{**settings, "relu": False}) * mask
    gradients = torch.autograd.grad(out, [inputs[k] for k in wanted], da.to(out.dtype))
    made = {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}
    statistics = {k: inputs[k] for k in ("running_mean", "running_var")}
    return {"out": out.detach(), **made, **statistics}


def triton(**arguments):
    return ops.conv_bn_relu(**arguments, implementation="triton")


def in_double(inputs):
    return {k: None if t is None else t.double() for k, t in inputs.items()}


def assert_all_within_budget(ours, eager, inputs, da, relu, **settings):
    """Each against float64 with the mask that it itself had."""
    exact = []
    for made in (eager, ours):
        mask = (made["out"] > 0) if relu else torch.ones_like(made["out"])
        exact.append(
            run(
                reference.conv_bn_relu,
                in_double(inputs),
                da.double(),
                mask=mask,
                wanted=[k[1:] for k in ours if k.startswith("d")],
                **settings,
            )
        )
    for name in ours:
        assert_within_budget(name, ours[name], eager[name], *(e[name] for e in exact))


@guarded
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training(case, dtype, device):
    inputs, da = make_inputs(case, dtype, device)
    settings = {"stride": case.stride, "relu": case.relu, "momentum": 0.3, "eps": 1e-3}
    ours = run(triton, inputs, da, **settings)
    eager = run(reference.conv_bn_relu, inputs, da, **settings)
    assert ours["out"].is_contiguous(memory_format=torch.channels_last)
    assert_all_within_budget(ours, eager, inputs, da, **settings)


@guarded
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [CASES["stem"], CASES["into-a-stage-from-odd-sizes"], CASES["no-relu-with-shortcut"]],
    ids=["stem", "stride-2-with-shortcut", "no-relu-with-shortcut"],
)
def test_evaluation(case, dtype, device, launches):
    inputs, da = make_inputs(case, dtype, device)
    settings = {"stride": case.stride, "relu": case.relu, "training": False}
    ours = run(triton, inputs, da, **settings)
    eager = run(reference.conv_bn_relu, inputs, da, **settings)
    assert_all_within_budget(ours, eager, inputs, da, **settings)
    assert torch.equal(ours["running_mean"], inputs["running_mean"])
    assert torch.equal(ours["running_var"], inputs["running_var"])
    launches.clear()
    folded = triton(**inputs, **settings)
    assert launches == ["_conv3x3_fwd_kernel"]
    exact = reference.conv_bn_relu(**in_double(inputs), **settings)
    assert_within_budget("folded", folded, eager["out"], exact)


@guarded
def test_large_mean_does_not_cancel(device):
    """At a mean of 1000 deviations E[y^2] - E[y]^2 leaves nothing of the variance in float32."""
    inputs, da = make_inputs(Case(4, 16, 9, 9, 16), torch.float32, device)
    inputs["x"] = inputs["x"] * 1e-2 + 10
    ours = run(triton, inputs, da, stride=1, relu=False)
    eager = run(reference.conv_bn_relu, inputs, da, stride=1, relu=False)
    assert_all_within_budget(ours, eager, inputs, da, stride=1, relu=False)


@pytest.mark.filterwarnings("ignore:Input #.* is not a double precision")
def test_gradcheck(device):
    """Numerical derivatives along random directions, in float32, without the ReLU's kink."""
    inputs, _ = make_inputs(Case(2, 16, 3, 4, 16, shortcut=True), torch.float32, device)
    inputs = {k: t.detach().requires_grad_(k in DIFFERENTIABLE) for k, t in inputs.items()}

    def function(*tensors):
        arguments = dict(zip(DIFFERENTIABLE, tensors, strict=True))
        statistics = {k: inputs[k].clone() for k in ("running_mean", "running_var")}
        return triton(**arguments, **statistics, relu=False)

    assert torch.autograd.gradcheck(
        function,
        tuple(inputs[k] for k in DIFFERENTIABLE),
        eps=1e-2,
        atol=1e-2,
        rtol=1e-2,
        fast_mode=True,
        nondet_tol=0,
    )


@guarded
@pytest.mark.parametrize(
    ("wanted", "never"),
    [
        (["weight"], "dgrad"),
        (["x"], "wgrad"),
        (["bn_weight", "bn_bias"], "conv3x3_bwd dgrad wgrad"),
        (["shortcut"], "conv3x3_bwd dgrad wgrad"),
        (["weight", "shortcut"], "dgrad"),
    ],
    ids=["weight", "x", "bn", "shortcut", "weight-and-shortcut"],
)
def test_only_wanted_gradients_are_made(wanted, never, device, launches):
    inputs, da = make_inputs(Case(2, 16, 4, 4, 16, shortcut=True), torch.float32, device)
    ours = run(triton, inputs, da, wanted=wanted, relu=True)
    assert not any(word in name for word in never.split() for name in launches)
    assert ("_sum_slabs_kernel" in launches) == ("weight" in wanted)
    eager = run(reference.conv_bn_relu, inputs, da, wanted=wanted, relu=True)
    assert_all_within_budget(ours, eager, inputs, da, relu=True)


@guarded
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_many_channel_blocks(stride, dtype, device, launches, monkeypatch):
    """Blocks of 16 channels, so that each has neighbours; dgrad and wgrad as two launches."""
    whole = launch.config

    def blocks_of_16(*arguments):
        return dataclasses.replace(whole(*arguments), block_c=16, block_k=16)

    monkeypatch.setattr(launch, "config", blocks_of_16)
    case = Case(2, 32, 4, 3, 32, stride=stride)
    inputs, da = make_inputs(case, dtype, device)
    settings = {"stride": stride, "relu": True}
    ours = run(triton, inputs, da, **settings)
    assert {"_conv3x3_wgrad_kernel", "_conv3x3_dgrad_kernel"} <= set(launches)
    eager = run(reference.conv_bn_relu, inputs, da, **settings)
    assert_all_within_budget(ours, eager, inputs, da, **settings)


@guarded
def test_no_grad_is_the_same_forward(device):
    inputs, da = make_inputs(CASES["three-tiles-for-two-programs"], torch.float16, device)
    with_grad = run(triton, inputs, da)
    statistics = {k: inputs[k].clone() for k in ("running_mean", "running_var")}
    weight = inputs["weight"].clone().requires_grad_()
    with torch.no_grad():
        out = triton(**{**inputs, **statistics, "weight": weight})
    assert not out.requires_grad
    assert torch.equal(out, with_grad["out"])
    for key, value in statistics.items():
        assert torch.equal(value, with_grad[key])


@guarded
def test_two_runs_are_identical(device):
    inputs, da = make_inputs(CASES["three-tiles-for-two-programs"], torch.float16, device)
    first, second = (run(triton, inputs, da) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@guarded
@pytest.mark.parametrize("relu", [True, False])
def test_any_strides(relu, device):
    """x, shortcut, weight and the output's gradient in other layouts give the same bits."""
    inputs, da = make_inputs(CASES["into-a-stage-from-odd-sizes"], torch.float32, device)
    settings = {"stride": 2, "relu": relu}
    expected = run(triton, inputs, da, **settings)
    transposed = inputs["x"].transpose(2, 3).contiguous().transpose(2, 3)
    weight = inputs["weight"].contiguous(memory_format=torch.channels_last)
    others = {"x": transposed, "shortcut": inputs["shortcut"].contiguous(), "weight": weight}
    made = run(triton, {**inputs, **others}, da.contiguous(), **settings)
    for name in expected:
        assert torch.equal(made[name], expected[name]), name
    assert made["dweight"].stride() == weight.stride()


@guarded
def test_activations_that_come_back_in_another_layout(device):
    """As from ``save_on_cpu(pin_memory=True)``, which does not keep strides."""
    inputs, da = make_inputs(CASES["into-a-stage-from-odd-sizes"], torch.float32, device)
    expected = run(triton, inputs, da, stride=2)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda t: t):
        made = run(triton, inputs, da, stride=2)
    for name in expected:
        assert torch.equal(made[name], expected[name]), name


def test_gradient_of_a_broadcast_sum(device):
    """The gradient that arrives from a sum has strides 0."""
    inputs, da = make_inputs(CASES["stem"], torch.float32, device)
    weight = inputs["weight"].requires_grad_()
    triton(**inputs).sum().backward()
    expected = run(triton, inputs, torch.ones_like(da), wanted=["weight"])
    assert torch.equal(weight.grad, expected["dweight"])


def test_autocast(device):
    """Products in the autocast dtype; parameters' gradients and statistics in float32."""
    inputs, da = make_inputs(CASES["ragged-second-tile"], torch.float32, device)
    half = {k: inputs[k].half() for k in ("x", "weight")}
    expected = run(triton, {**inputs, **half}, da.half())
    with torch.autocast(device.type, torch.float16):
        made = run(triton, inputs, da.half())
    for name, value in made.items():
        assert value.dtype == (torch.float16 if name == "out" else torch.float32), name
        rounded = value.to(expected[name].dtype)
        # all but the weight's gradient, which float32 parameters get unrounded, are the same bits
        assert torch.equal(rounded, expected[name]), name


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_autocast_result_dtype(implementation, device):
    inputs, _ = make_inputs(CASES["no-relu-with-shortcut"], torch.float32, device)
    with torch.autocast(device.type, torch.float16):
        out = ops.conv_bn_relu(**inputs, implementation=implementation)
    assert out.dtype == torch.float16


@guarded
def test_half_parameters_and_statistics(device):
    inputs, da = make_inputs(CASES["stem"], torch.float16, device)
    inputs = {k: None if t is None else t.half() for k, t in inputs.items()}
    ours = run(triton, inputs, da, relu=True)
    eager = run(reference.conv_bn_relu, inputs, da, relu=True)
    assert_all_within_budget(ours, eager, inputs, da, relu=True)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "with-hooks"])
def test_checkpointing_updates_statistics_as_eager_does(reentrant, device):
    torch.manual_seed(0)
    made = {}
    x = torch.randn(2, 16, 4, 4, device=device, requires_grad=True)
    unit = ConvBNReLU(16, 16).to(device)
    state = {k: v.clone() for k, v in unit.state_dict().items()}
    for implementation in ("triton", "reference"):
        unit.load_state_dict(state)
        unit.implementation = implementation
        out = checkpoint(unit, x, use_reentrant=reentrant)
        gradients = torch.autograd.grad if not reentrant else None
        if gradients:
            dx, dweight = gradients(out.square().sum(), (x, unit.conv.weight))
        else:
            x.grad = unit.conv.weight.grad = None
            out.square().sum().backward()
            dx, dweight = x.grad, unit.conv.weight.grad
        made[implementation] = (out, dx, dweight, unit.bn.running_mean.clone())
        assert unit.bn.num_batches_tracked == 2
    for ours, eager in zip(made["triton"], made["reference"], strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("training", [True, False])
def test_compile_whole_graph(training, device):
    torch.compiler.reset()
    torch.manual_seed(0)
    unit = ConvBNReLU(16, 32, stride=2, implementation="triton").to(device).train(training)
    state = {k: v.clone() for k, v in unit.state_dict().items()}
    x = torch.randn(2, 16, 5, 4, device=device)
    made = []
    for call in (unit, torch.compile(unit, fullgraph=True)):
        unit.load_state_dict(state)
        unit.zero_grad()
        leaf = x.clone().requires_grad_()
        shortcut = ops.shortcut_a(leaf, 32, implementation="triton")
        call(leaf, shortcut).square().sum().backward()
        with torch.no_grad():
            out = call(x)
        made.append((leaf.grad, unit.conv.weight.grad, out, unit.bn.running_var.clone()))
    for plain, compiled in zip(*made, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_operations_are_registered_rightly(device):
    """Schema and fake implementation of what torch.compile sees."""
    from cifar_resnet_fast.ops._conv_bn_relu import triton as module

    inputs, da = make_inputs(CASES["into-a-stage-from-odd-sizes"], torch.float16, device)
    tests = ("test_schema", "test_faketensor")
    out, y, affine = module.conv_bn_relu_fwd(*inputs.values(), 2, True, True, 0.1, 1e-5)
    ops_and_arguments = (
        (module._forward_op, (*inputs.values(), 2, True, True, 0.1, 1e-5)),
        (module._eval_op, (*inputs.values(), 2, True, 1e-5)),
        (
            module._backward_op,
            (da, inputs["x"], inputs["weight"], y, affine, out, 2, True, True)
            + (True, True, True, torch.float32, False, torch.float32),
        ),
    )
    for op, arguments in ops_and_arguments:
        torch.library.opcheck(op, arguments, test_utils=tests)


# --- bad input -----------------------------------------------------------------------------


BAD = {
    "x-no-tensor": ({"x": 3}, TypeError, "x must be a tensor, got int"),
    "x-integer": (
        {"x": torch.ones(2, 16, 4, 4, dtype=torch.int32)},
        TypeError,
        "x must be of a floating dtype, got torch.int32",
    ),
    "x-rank": ({"x": torch.ones(16, 4, 4)}, ValueError, r"x must be \[N, C, H, W\].*\(16, 4, 4\)"),
    "x-empty": ({"x": torch.ones(0, 16, 4, 4)}, ValueError, r"no axis empty.*\(0, 16, 4, 4\)"),
    "x-double": (
        {"x": torch.ones(2, 16, 4, 4).double(), "weight": torch.ones(16, 16, 3, 3).double()},
        TypeError,
        "x must be float16, bfloat16 or float32 for implementation 'triton', got torch.float64",
    ),
    "x-channels": (
        {"x": torch.ones(2, 20, 4, 4), "weight": torch.ones(16, 20, 3, 3)},
        ValueError,
        "x must have 3 channels or a multiple of 16 for implementation 'triton', got 20",
    ),
    "x-2**31": (
        {"x": torch.ones(1).expand(2**15, 16, 64, 64)},
        ValueError,
        r"fewer than 2\*\*31 elements for implementation 'triton', got 2147483648",
    ),
    "weight-channels": (
        {"weight": torch.ones(16, 32, 3, 3)},
        ValueError,
        r"weight must have shape \(16, 16, 3, 3\), got \(16, 32, 3, 3\)",
    ),
    "weight-5x5": (
        {"weight": torch.ones(16, 16, 5, 5)},
        ValueError,
        r"weight must have shape \(16, 16, 3, 3\), got \(16, 16, 5, 5\)",
    ),
    "weight-dtype": (
        {"weight": torch.ones(16, 16, 3, 3).half()},
        TypeError,
        "weight must be of x's dtype torch.float32 outside torch.autocast, or torch.float32 if "
        "that has 16 bits, got torch.float16",
    ),
    "bn-size": (
        {"bn_bias": torch.ones(15)},
        ValueError,
        r"bn_bias must have shape \(16,\), got \(15,\)",
    ),
    "bn-dtypes": (
        {"running_var": torch.ones(16).half()},
        TypeError,
        "running_var must be of bn_weight's dtype torch.float32, got torch.float16",
    ),
    "bn-strided": (
        {"running_mean": torch.ones(32)[::2]},
        ValueError,
        r"running_mean must be contiguous for implementation 'triton', got strides \(2,\)",
    ),
    "device": (
        {"bn_weight": torch.ones(16, device="meta")},
        ValueError,
        "bn_weight must be on the device of x, .*, got meta",
    ),
    "stride": ({"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
    "momentum": ({"momentum": None}, TypeError, "momentum must be a number, got None"),
    "shortcut-shape": (
        {"shortcut": torch.ones(2, 16, 4, 3)},
        ValueError,
        r"shortcut must have shape \(2, 16, 4, 4\), got \(2, 16, 4, 3\)",
    ),
    "shortcut-dtype": (
        {"shortcut": torch.ones(2, 16, 4, 4).half()},
        TypeError,
        "shortcut must be torch.float32, got torch.float16",
    ),
    "one-value": (
        {"x": torch.ones(1, 16, 2, 2), "stride": 2},
        ValueError,
        r"more than 1 value per channel when training, got shape \(1, 16, 2, 2\) at stride 2",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named_before_any_launch(change, kind, message, device, launches):
    arguments = {
        "x": torch.ones(2, 16, 4, 4),
        "weight": torch.ones(16, 16, 3, 3),
        **{k: torch.ones(16) for k in ("bn_weight", "bn_bias", "running_mean", "running_var")},
        **change,
    }
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            # with its strides, which .to(device) would make dense
            memory = value.new_empty(0).set_(value.untyped_storage()).to(device)
            arguments[key] = memory.as_strided(value.shape, value.stride())
    with pytest.raises(kind, match=message) as error:
        triton(**arguments)
    assert "\n" not in str(error.value)
    assert launches == []


def test_output_channels_must_be_a_multiple_of_16(device):
    vectors = {
        k: torch.ones(8, device=device)
        for k in ("bn_weight", "bn_bias", "running_mean", "running_var")
    }
    with pytest.raises(ValueError, match="weight must have a multiple of 16 output channels"):
        triton(
            x=torch.ones(2, 16, 4, 4, device=device),
            weight=torch.ones(8, 16, 3, 3, device=device),
            **vectors,
        )


@pytest.mark.parametrize("training", [True, False])
def test_not_a_number_shows(training, device):
    """A diverged activation must not come out of the ReLU as zero."""
    inputs, _ = make_inputs(Case(2, 16, 4, 4, 16), torch.float32, device)
    inputs["x"][0, 0, 0, 0] = float("nan")
    ours = triton(
        **{k: None if t is None else t.clone() for k, t in inputs.items()}, training=training
    )
    eager = reference.conv_bn_relu(**inputs, training=training)
    assert torch.equal(ours.isnan(), eager.isnan())
    assert eager.isnan().any()


def test_one_value_a_channel_in_evaluation(device):
    inputs, _ = make_inputs(Case(1, 16, 1, 1, 16), torch.float32, device)
    torch.testing.assert_close(
        triton(**inputs, training=False), reference.conv_bn_relu(**inputs, training=False)
    )


# --- the network ---------------------------------------------------------------------------


@guarded
@pytest.mark.parametrize("stride", [1, 2])
def test_shortcut_a_is_exact(stride, device):
    x = torch.randn(2, 16, 5, 4, device=device).half()
    made = []
    for implementation in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        out = ops.shortcut_a(leaf, 32, stride, implementation=implementation)
        gradient = torch.arange(out.numel(), device=device).view_as(out).half()
        made += [(out, *torch.autograd.grad(out, leaf, gradient))]
    for ours, expected in zip(*made, strict=True):
        assert torch.equal(ours, expected)


def train(model, images, labels, steps):
    """``steps`` of plain SGD on one batch; the losses and the parameters after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = [v.detach().flatten() for v in model.state_dict().values() if v.is_floating_point()]
    return torch.stack(losses), torch.cat(state)


@pytest.mark.timeout(900)  # some 1500 interpreted programs
def test_resnet_8_trains_as_the_reference_does(device):
    """20 steps from the same state stay as near to float64 as eager runs do.

    Rounding grows from step to step and a unit at its ReLU's kink may fall either way, so eager's
    own error is the largest of runs that differ in nothing but the order of the pictures.
    """
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8, device=device)
    labels = torch.arange(4, device=device)
    start = FastResNet(8).state_dict()

    def trained(implementation, order=(0, 1, 2, 3), dtype=torch.float32):
        model = FastResNet(8, implementation=implementation).to(device, dtype)
        model.load_state_dict(start)
        return train(model, images[list(order)].to(dtype), labels[list(order)], steps=20)

    exact = trained("reference", dtype=torch.float64)
    eager = [trained("reference", (0, *order)) for order in itertools.permutations((1, 2, 3))]
    ours = trained("triton")
    assert exact[0][-1] < 0.5 * exact[0][0], "it did not learn"
    for name, value, expected, others in zip(
        ("losses", "state"), ours, exact, zip(*eager, strict=True), strict=True
    ):
        error = (value.double() - expected).norm()
        allowed = 2 * max((other.double() - expected).norm() for other in others)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"
