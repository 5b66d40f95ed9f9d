"""The compiled ``relu(scale * y + shift + shortcut_a(x))``, forward and backward.

out, dy and dx are the reference's bit for bit (but for the sign of a zero); dscale and dshift are
sums, held to twice the error that the reference has in the same dtype against float64.
"""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from cifar_resnet_fast import ops, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = {  # N, C, H, W, K, stride
    "border-1-of-the-family": (3, 16, 32, 32, 32, 2),
    "border-2-of-the-family": (2, 32, 16, 16, 64, 2),
    "one-image-of-odd-size": (1, 16, 7, 5, 32, 2),
    "one-pixel": (3, 8, 1, 1, 24, 2),
    "stride-1": (2, 16, 5, 6, 48, 1),
    "channels-not-of-16-bytes": (2, 6, 8, 6, 10, 2),
    "rows-that-leave-threads-over": (2, 24, 14, 22, 72, 2),
    "more-channels-than-one-group": (2, 264, 4, 4, 520, 2),
    "more-images-than-blocks": (300, 8, 2, 4, 8, 2),
}

pytestmark = pytest.mark.usefixtures("poisoned_memory")
compiled = torch.ops.cifar_resnet_fast


@pytest.fixture(autouse=True)
def _needs_the_extension(request):
    parameters = getattr(request.node, "callspec", None)
    device = torch.device(parameters.params.get("device", "cpu") if parameters else "cpu")
    reason = ops.why_not("cuda", device, "stage_border")
    if reason is not None:
        pytest.skip(reason)


def channels_last(*shape, dtype=torch.float32, device="cpu"):
    x = 0.5 * torch.randn(shape, dtype=torch.float64) - 0.3
    return x.to(dtype).to(device, memory_format=torch.channels_last)


def arguments(N, C, H, W, K, stride, dtype=torch.float32, device="cpu"):
    """y, scale, shift, x and dout, with a stride of the case's."""
    affine = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (N, K, -(-H // stride), -(-W // stride))
    scale = (torch.rand(K, device=device) + 0.5).to(affine)
    shift = torch.randn(K, device=device).to(affine)
    y, dout = (channels_last(*shape, dtype=dtype, device=device) for _ in range(2))
    x = channels_last(N, C, H, W, dtype=dtype, device=device)
    return y, scale, shift, x, dout


def run(function, tensors, stride, **more):
    *inputs, dout = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs, stride, **more)
    return out.detach(), torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_reference(case, dtype, device):
    stride = case[-1]
    tensors = arguments(*case, dtype, device)
    out, (dy, dscale, dshift, dx) = run(ops.stage_border, tensors, stride, implementation="cuda")
    expected, (edy, edscale, edshift, edx) = run(reference.stage_border, tensors, stride)
    assert 0.1 < (out == 0).double().mean() < 0.9  # the mask is put to the test
    for name, ours, theirs in (("out", out, expected), ("dy", dy, edy), ("dx", dx, edx)):
        assert torch.equal(ours, theirs), name
        assert ours.is_contiguous(memory_format=torch.channels_last), name
    y, *_, dout = (tensor.double() for tensor in tensors)
    dz = dout * (out > 0)  # with the mask that both used
    for name, ours, theirs, terms in (
        ("dscale", dscale, edscale, dz * y),
        ("dshift", dshift, edshift, dz),
    ):
        exact = terms.sum((0, 2, 3))
        if dtype == torch.float64:
            # nothing is more exact here: what the order of the additions can do at most
            bound = terms.abs().sum((0, 2, 3)) * torch.finfo(dtype).eps * terms[:, 0].numel()
            assert ((ours - exact).abs() <= bound).all(), name
            continue
        # nobody can be asked for less than one rounding of the result
        rounding = torch.finfo(ours.dtype).eps * exact
        for norm in (2, float("inf")):
            error, budget = (
                torch.linalg.vector_norm(value, norm) for value in (ours - exact, theirs - exact)
            )
            budget = 2 * budget + torch.linalg.vector_norm(rounding, norm)
            assert error <= budget, f"{name}: {error} > {budget}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, device):
    """NaN and infinities go where the reference puts them, forward and through the mask."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
    y = values.repeat(6).to(dtype)[None, None, :, None].repeat(1, 16, 1, 1).to(device)
    x = values.repeat_interleave(6).to(dtype)[None, None, :, None].repeat(1, 16, 1, 1).to(device)
    affine = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = (torch.full((16,), v, dtype=affine, device=device) for v in (2.0, -1.0))
    tensors = [t.contiguous(memory_format=torch.channels_last) for t in (y, x)]
    tensors = (tensors[0], scale, shift, tensors[1], torch.ones_like(tensors[0]))
    out, ours = run(ops.stage_border, tensors, 1, implementation="cuda")
    expected, theirs = run(reference.stage_border, tensors, 1)
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(nan=5), b.nan_to_num(nan=5))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_float64(device):
    *inputs, _ = arguments(2, 4, 3, 5, 8, 2, torch.float64, device)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert gradcheck(lambda *a: ops.stage_border(*a, implementation="cuda"), inputs)


def test_is_the_blocks_normalisation():
    """With scale and shift from the batch's statistics it is batch norm, shortcut and ReLU."""
    y, weight, bias, x, dout = arguments(4, 8, 6, 6, 16, 2, torch.float64)

    def unit(y, weight, bias, x, stride):
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        scale = weight * torch.rsqrt(variance + 1e-5)
        return ops.stage_border(y, scale, bias - mean * scale, x, stride, implementation="cuda")

    def plain(y, weight, bias, x, stride):
        z = torch.nn.functional.batch_norm(y, None, None, weight, bias, training=True)
        return torch.relu(z + reference.shortcut_a(x, y.shape[1], stride))

    tensors = (y, weight, bias, x, dout)
    for ours, theirs in zip(run(unit, tensors, 2)[1], run(plain, tensors, 2)[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_runs_are_equal_bit_for_bit(device):
    tensors = arguments(64, 16, 16, 16, 32, 2, torch.float16, device)
    first = run(ops.stage_border, tensors, 2, implementation="cuda")[1]
    again = run(ops.stage_border, tensors, 2, implementation="cuda")[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_activations_that_come_back_in_another_layout(device):
    """As from ``save_on_cpu(pin_memory=True)``, which does not keep strides."""
    tensors = arguments(2, 16, 6, 5, 32, 2, torch.float16, device)
    expected = run(ops.stage_border, tensors, 2, implementation="cuda")[1]
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda t: t):
        made = run(ops.stage_border, tensors, 2, implementation="cuda")[1]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_used_twice_and_only_once_differentiable(device):
    *inputs, _ = arguments(2, 16, 4, 4, 32, 2, device=device)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def loss(function, **more):
        y, scale, shift, x = inputs
        return (
            function(y, scale, shift, x, **more) * function(2 * y, scale, shift, x, **more)
        ).sum()

    ours = torch.autograd.grad(loss(ops.stage_border, implementation="cuda"), inputs)
    for a, b in zip(ours, torch.autograd.grad(loss(reference.stage_border), inputs), strict=True):
        torch.testing.assert_close(a, b)
    out = ops.stage_border(*inputs, implementation="cuda")
    dy, *_ = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="stage_border can be differentiated once"):
        dy.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    y, scale, shift, x, dout = arguments(2, 16, 5, 6, 32, 2, torch.float16, device)
    opcheck(compiled.stage_border.default, (y, scale, shift, x, 2))
    out = compiled.stage_border(y, scale, shift, x, 2)
    opcheck(compiled.stage_border_backward.default, (dout, out, y, scale, 16, 5, 6, 2))
    leaves = [tensor.requires_grad_() for tensor in (y, scale, shift, x)]
    opcheck(compiled.stage_border.default, (*leaves, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole_with_changing_sizes(device):
    torch._dynamo.reset()
    f = torch.compile(
        lambda *a: ops.stage_border(*a, implementation="cuda") * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for N, H in ((2, 6), (3, 9)):
        tensors = arguments(N, 16, H, 5, 32, 2, torch.bfloat16, device)
        out, ours = run(f, tensors, 2)
        expected, theirs = run(lambda *a: reference.stage_border(*a) * 2, tensors, 2)
        for a, b in zip((out, *ours), (expected, *theirs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_takes_what_autocast_brings(device):
    """The convolution's 16-bit output, float32 parameters and a 16-bit block input."""
    y, scale, shift, x, _ = arguments(2, 16, 8, 8, 32, 2, torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ops.stage_border(y, scale, shift, x, implementation="cuda")
        assert torch.equal(out, reference.stage_border(y, scale, shift, x))
    assert out.dtype == torch.bfloat16


def test_auto_leaves_other_layouts_to_the_reference(device):
    y, scale, shift, x, _ = arguments(2, 16, 8, 8, 32, 2, device=device)
    for y_, x_ in ((y.contiguous(), x), (y, x.contiguous())):
        out = ops.stage_border(y_, scale, shift, x_)
        assert torch.equal(out, reference.stage_border(y_, scale, shift, x_))


# --- bad input: refused before any launch, in the same words from Python and from C++ --------

Y, SCALE, SHIFT, X, _ = arguments(2, 16, 8, 6, 32, 2)
BAD = {
    "stride": ((Y, SCALE, SHIFT, X, 3), "stride must be 1 or 2, got 3"),
    "integers": (
        (Y.int(), SCALE, SHIFT, X, 2),
        "y must be of a floating dtype, got torch.int32",
    ),
    "two-dtypes": ((Y.half(), SCALE, SHIFT, X, 2), "y must be torch.float32, got torch.float16"),
    "empty": (
        (Y, SCALE, SHIFT, X[:0], 2),
        "x must be [N, C, H, W] with no axis empty, got shape (0, 16, 8, 6)",
    ),
    "odd-number-of-new-channels": (
        (Y[:, :31], SCALE, SHIFT, X, 2),
        "y's channels must be x's 16 channels or an even number more, got 31",
    ),
    "another-batch": (
        (Y, SCALE, SHIFT, X[:1], 2),
        "y must have shape (1, 32, 4, 3), got (2, 32, 4, 3)",
    ),
    "another-stride": (
        (Y, SCALE, SHIFT, X, 1),
        "y must have shape (2, 32, 8, 6), got (2, 32, 4, 3)",
    ),
    "y-not-channels-last": (
        (Y.contiguous(), SCALE, SHIFT, X, 2),
        "y must be channels-last [N, C, H, W], got strides (384, 12, 3, 1)",
    ),
    "x-not-channels-last": (
        (Y, SCALE, SHIFT, X.contiguous(), 2),
        "x must be channels-last [N, C, H, W], got strides (768, 48, 6, 1)",
    ),
    "scale-of-16-bits": (
        (Y, SCALE.half(), SHIFT, X, 2),
        "scale must be torch.float32, got torch.float16",
    ),
    "shift-too-short": ((Y, SCALE, SHIFT[:31], X, 2), "shift must have shape (32,), got (31,)"),
    "shift-with-gaps": (
        (Y, SCALE, SHIFT.repeat(2)[::2], X, 2),
        "shift must be contiguous, got strides (2,)",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD)
def test_bad_input_has_one_message(inputs, message):
    with pytest.raises((TypeError, ValueError)) as error:
        ops.stage_border(*inputs, implementation="cuda")
    assert str(error.value) == message
    with pytest.raises(RuntimeError) as error:
        compiled.stage_border(*inputs)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: X}, "out must have shape (2, 32, 4, 3), got (2, 16, 8, 6)"),
        ({2: Y.half()}, "y must be torch.float32, got torch.float16"),
        ({3: SCALE[:4]}, "scale must have shape (32,), got (4,)"),
        ({5: 9}, "dout must have shape (2, 32, 5, 3), got (2, 32, 4, 3)"),
    ],
    ids=["out", "y", "scale", "height"],
)
def test_bad_gradients(change, message):
    inputs = [Y, Y, Y, SCALE, 16, 8, 6, 2]
    for position, value in change.items():
        inputs[position] = value
    with pytest.raises(RuntimeError) as error:
        compiled.stage_border_backward(*inputs)
    assert str(error.value) == message


# --- what only a GPU can show ----------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_two_devices_are_refused(device):
    inputs = [Y.cuda(), SCALE, SHIFT.cuda(), X.cuda(), 2]
    message = "scale must be on the device of x, cuda:0, got cpu"
    with pytest.raises(ValueError, match=message):
        ops.stage_border(*inputs, implementation="cuda")
    with pytest.raises(RuntimeError, match=message):
        compiled.stage_border(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_a_graph_replays_it(device):
    tensors = arguments(64, 16, 32, 32, 32, 2, torch.float16, device)
    *inputs, dout = tensors
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def step():
        out = ops.stage_border(*leaves, implementation="cuda")
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in (*leaves, dout):
            tensor.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    for replayed, direct in zip(captured, step(), strict=True):
        assert torch.equal(replayed, direct)
