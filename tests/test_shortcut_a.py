"""The compiled option-A shortcut: bit for bit the reference, forward and backward.

Without a GPU the C++ twin runs, which finds every element through the CUDA kernels' own index
maps; with one, the same tests run on both.
"""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from cifar_resnet_fast import FastResNet, ops, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = {  # N, C, H, W, out_channels, stride
    "border-1-of-the-family": (3, 16, 32, 32, 32, 2),
    "border-2-of-the-family": (2, 32, 16, 16, 64, 2),
    "one-image": (1, 16, 8, 8, 32, 2),
    "odd-height-and-width": (2, 16, 7, 5, 32, 2),
    "one-pixel": (3, 8, 1, 1, 24, 2),
    "one-row": (2, 16, 1, 9, 32, 2),
    "no-new-channels": (2, 16, 6, 6, 16, 2),
    "stride-1": (2, 16, 5, 6, 48, 1),
    "channels-not-of-16-bytes": (2, 6, 8, 6, 10, 2),
    "front-not-of-16-bytes": (2, 16, 4, 6, 22, 2),
    "one-channel": (2, 1, 4, 4, 3, 2),
    "divisors-not-powers-of-two": (2, 24, 14, 22, 72, 2),
}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

pytestmark = pytest.mark.usefixtures("poisoned_memory")
compiled = torch.ops.cifar_resnet_fast


@pytest.fixture(autouse=True)
def _needs_the_extension(request):
    parameters = getattr(request.node, "callspec", None)
    device = torch.device(parameters.params.get("device", "cpu") if parameters else "cpu")
    reason = ops.why_not("cuda", device, "shortcut_a")
    if reason is not None:
        pytest.skip(reason)


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def special(shape, dtype, device="cpu"):
    """Channels-last noise with NaN, infinities, zeros of both signs and the smallest numbers."""
    x = torch.randn(shape, dtype=torch.float64)
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, torch.finfo(dtype).tiny / 4]
    flat = x.view(-1)
    for i, value in enumerate(values):
        flat[i * 3 :: 29] = value
    return x.to(dtype).to(device, memory_format=torch.channels_last)


def border(N, C, H, W, K, stride):
    return (N, K, -(-H // stride), -(-W // stride))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_reference_bit_for_bit(case, dtype, device):
    N, C, H, W, K, stride = case
    x = special((N, C, H, W), dtype, device).requires_grad_()
    out = ops.shortcut_a(x, K, stride, implementation="cuda")
    expected = reference.shortcut_a(x, K, stride)
    assert out.shape == border(*case)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits(out), bits(expected))

    dout = special(out.shape, dtype, device)
    (dx,) = torch.autograd.grad(out, x, dout)
    (expected_dx,) = torch.autograd.grad(expected, x, dout)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits(dx), bits(expected_dx))


@pytest.mark.parametrize("device", DEVICES)
def test_addresses_not_of_16_bytes(device):
    memory = torch.randn(2 * 8 * 6 * 16 + 1, device=device).half()[1:]
    x = memory.view(2, 8, 6, 16).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16 == 2
    out = ops.shortcut_a(x, 32, implementation="cuda")
    assert torch.equal(out, reference.shortcut_a(x, 32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient", ["expanded", "transposed"])
def test_gradients_of_any_layout(gradient, device):
    x = special((2, 16, 6, 4), torch.float32, device).requires_grad_()
    out = ops.shortcut_a(x, 32, implementation="cuda")
    dout = torch.randn(2, 32, 3, 2, device=device)  # not channels-last
    if gradient == "expanded":
        dout = torch.ones((), device=device).expand(2, 32, 3, 2)
    (dx,) = torch.autograd.grad(out, x, dout)
    (expected,) = torch.autograd.grad(reference.shortcut_a(x, 32), x, dout)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_first_and_second_order(device):
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64, device=device)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    assert gradcheck(lambda x: ops.shortcut_a(x, 10, implementation="cuda"), x)
    assert gradgradcheck(lambda x: ops.shortcut_a(x, 10, implementation="cuda"), x)


@pytest.mark.parametrize("device", DEVICES)
def test_used_twice(device):
    x = special((2, 16, 4, 4), torch.float32, device).nan_to_num(0).requires_grad_()

    def loss(shortcut_a):
        return (shortcut_a(x, 32) * shortcut_a(2 * x, 32)).sum()

    ours = torch.autograd.grad(loss(lambda *a: ops.shortcut_a(*a, implementation="cuda")), x)
    assert torch.equal(ours[0], torch.autograd.grad(loss(reference.shortcut_a), x)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    x = special((2, 16, 5, 6), torch.float32, device).nan_to_num(0)
    for gradient in (False, True):
        opcheck(compiled.shortcut_a.default, (x.requires_grad_(gradient), 32, 2))
    dout = special((2, 32, 3, 3), torch.float32, device).nan_to_num(0).requires_grad_()
    opcheck(compiled.shortcut_a_backward.default, (dout, 16, 5, 6, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole_with_changing_sizes(device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def f(x):
        return ops.shortcut_a(x, 32, implementation="cuda") * 2

    for N, H in ((2, 6), (3, 9)):
        x = special((N, 16, H, 5), torch.bfloat16, device).nan_to_num(0).requires_grad_()
        out, expected = f(x), reference.shortcut_a(x, 32) * 2
        assert torch.equal(out, expected)
        dout = torch.randn_like(expected)
        assert torch.equal(
            torch.autograd.grad(out, x, dout)[0], torch.autograd.grad(expected, x, dout)[0]
        )


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_keeps_the_dtype(device):
    with torch.autocast(device, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = special((2, 16, 4, 4), dtype, device).nan_to_num(0)
            out = ops.shortcut_a(x, 32, implementation="cuda")
            assert torch.equal(out, reference.shortcut_a(x, 32))
            assert out.dtype == dtype


def test_auto_leaves_other_layouts_and_devices_to_the_reference(device):
    x = torch.randn(2, 16, 4, 4, device=device)
    assert torch.equal(ops.shortcut_a(x, 32), reference.shortcut_a(x, 32))
    assert ops.shortcut_a(x, 32).is_contiguous()
    assert ops.choose("auto", torch.device("cpu"), "shortcut_a") == "reference"


# --- bad input: refused before any launch, in the same words from Python and from C++ --------

GOOD = special((2, 16, 6, 4), torch.float32)
BAD = {
    "stride-3": ((GOOD, 32, 3), "stride must be 1 or 2, got 3"),
    "stride-0": ((GOOD, 32, 0), "stride must be 1 or 2, got 0"),
    "integers": (
        (GOOD.nan_to_num().int(), 32, 2),
        "x must be of a floating dtype, got torch.int32",
    ),
    "three-axes": (
        (GOOD[0], 32, 2),
        "x must be [N, C, H, W] with no axis empty, got shape (16, 6, 4)",
    ),
    "empty-batch": (
        (GOOD[:0], 32, 2),
        "x must be [N, C, H, W] with no axis empty, got shape (0, 16, 6, 4)",
    ),
    "fewer-channels": (
        (GOOD, 14, 2),
        "out_channels must be x's 16 channels or an even number more, got 14",
    ),
    "odd-number-of-new-channels": (
        (GOOD, 19, 2),
        "out_channels must be x's 16 channels or an even number more, got 19",
    ),
    "not-channels-last": (
        (GOOD.contiguous(), 32, 2),
        "x must be channels-last [N, C, H, W], got strides (384, 24, 4, 1)",
    ),
    "a-slice": (
        (GOOD[:, :8], 32, 2),
        "x must be channels-last [N, C, H, W], got strides (384, 1, 64, 16)",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_has_one_message(arguments, message):
    with pytest.raises((TypeError, ValueError)) as error:
        ops.shortcut_a(*arguments, implementation="cuda")
    assert str(error.value) == message
    with pytest.raises(RuntimeError) as error:
        compiled.shortcut_a(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD, 8, 12, 8, 3), "stride must be 1 or 2, got 3"),
        ((GOOD, 8, 13, 8, 2), "dout must have shape (2, 16, 7, 4), got (2, 16, 6, 4)"),
        ((GOOD, 0, 12, 8, 2), "channels, height and width must be positive, got (0, 12, 8)"),
        (
            (GOOD, 7, 12, 8, 2),
            "dout's channels must be x's 7 channels or an even number more, got",
        ),
        ((GOOD.contiguous(), 8, 12, 8, 2), "dout must be channels-last [N, C, H, W], got strides"),
    ],
    ids=["stride", "shape", "no-channels", "odd", "layout"],
)
def test_bad_gradients(arguments, message):
    with pytest.raises(RuntimeError) as error:
        compiled.shortcut_a_backward(*arguments)
    assert str(error.value).startswith(message)


def test_an_image_beyond_the_index_arithmetic():
    with pytest.raises(
        RuntimeError, match=r"fewer than 2\*\*31 elements an image.*got 2147483648"
    ):
        compiled.shortcut_a_backward(torch.ones(1, 1, 1, 1), 1, 2**16, 2**15, 1)


def test_an_unknown_or_missing_implementation_is_named():
    with pytest.raises(ValueError, match="implementation must be one of auto, .*got 'magic'"):
        ops.shortcut_a(GOOD, 32, implementation="magic")
    with pytest.raises(RuntimeError, match="'cuda' cannot run trunk on cpu: the kernels of trunk"):
        FastResNet(8, implementation="cuda")(torch.randn(2, 3, 8, 8))


# --- what only a GPU can show ----------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_a_graph_replays_it(device):
    x = special((64, 16, 32, 32), torch.float16, device).requires_grad_()
    dout = special((64, 32, 16, 16), torch.float16, device)

    def step():
        out = ops.shortcut_a(x, 32, implementation="cuda")
        return out, torch.autograd.grad(out, x, dout)[0]

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dx = step()
    with torch.no_grad():
        x.copy_(special(x.shape, torch.float16, device) * 2)
    dout.mul_(3)
    graph.replay()
    torch.cuda.synchronize()
    expected = reference.shortcut_a(x, 32)
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(dx), bits(torch.autograd.grad(expected, x, dout)[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_runs_on_the_current_stream(device):
    x = torch.zeros(256, 16, 32, 32, device=device).to(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on any other stream, the kernel would read the zeros
        x.fill_(1)
        out = ops.shortcut_a(x, 32, implementation="cuda")
    stream.synchronize()
    assert (out[:, 8:24] == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_runs_on_the_tensors_device(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = special((4, 16, 8, 8), torch.float16, "cuda:1")
    assert torch.cuda.current_device() == 0
    out = ops.shortcut_a(x, 32, implementation="cuda")
    assert torch.equal(bits(out), bits(reference.shortcut_a(x, 32)))
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize(
    "shape", [(70_000, 8, 2, 2), (132_000, 16, 32, 32)], ids=["images", "bytes"]
)
def test_beyond_one_grid_and_32_bits(shape, device):
    if torch.cuda.get_device_properties(0).total_memory < 12e9 and shape[1] == 16:
        pytest.skip("needs 12 GB")
    x = torch.empty(shape, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    x.copy_(torch.randn(shape[1:], device=device))
    x[-1] = 7
    out = ops.shortcut_a(x, 2 * shape[1], implementation="cuda")
    for part in (slice(0, 2), slice(-2, None)):
        assert torch.equal(out[part], reference.shortcut_a(x[part], 2 * shape[1]))
    dx = compiled.shortcut_a_backward(out, *shape[1:], 2)
    assert torch.equal(dx[-1, :, ::2, ::2], x[-1, :, ::2, ::2])
    assert (dx[-1, :, 1::2] == 0).all()
