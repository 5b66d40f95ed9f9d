"""The option-A shortcut's CUDA kernel, emulated: bitwise the reference, forward and backward."""

import pytest
import torch
from emulation import ORDERS
from test_shortcut_a import DTYPES, bits, special

from cifar_resnet_fast import reference

SHAPES = {  # N, C, H, W, K, stride
    "first-border": (3, 16, 32, 32, 32, 2),
    "second-border": (2, 32, 16, 16, 64, 2),
    "one-image-of-odd-size": (1, 16, 7, 5, 32, 2),
    "channels-not-of-16-bytes": (2, 6, 8, 6, 10, 2),
    "stride-1": (2, 16, 5, 6, 48, 1),
    "divisors-not-powers-of-two": (5, 24, 14, 10, 72, 2),
    "last-tile-not-full": (1, 8, 33, 31, 24, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shortcut_a(kernels, shape, order, dtype):
    """Every element of the result is written, NaN and infinities included."""
    N, C, H, W, K, stride = shape
    kernels.set_order(order)
    x = special((N, C, H, W), dtype).requires_grad_()
    expected = reference.shortcut_a(x, K, stride)
    dout = special(expected.shape, dtype)
    (expected_dx,) = torch.autograd.grad(expected, x, dout)
    out, dx = (
        torch.full_like(like, 7, memory_format=torch.channels_last) for like in (expected, x)
    )
    assert kernels.shortcut_a(shape, False, x.detach(), out) == 0
    assert kernels.shortcut_a(shape, True, dout, dx) == 0
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(dx), bits(expected_dx))
