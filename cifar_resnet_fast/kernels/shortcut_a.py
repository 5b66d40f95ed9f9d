"""The option-A shortcut in Triton: strided subsampling and zero channels (layer 0).

Twin: ``reference.shortcut_a``. x is [N, H, W, C] in memory, the result [N, HO, WO, K]; result
channel k is channel k - (K - C) / 2 of x where there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch


@triton.jit
def _shortcut_a_fwd_kernel(
    x_ptr,
    out_ptr,
    elements,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n, h, w, k] = x[n, h * STRIDE, w * STRIDE, k - new]; program i owns BLOCK elements."""
    HO = (H + STRIDE - 1) // STRIDE
    WO = (W + STRIDE - 1) // STRIDE
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    p = offs // K
    c = offs % K - (K - C) // 2
    h = p // WO % HO * STRIDE
    w = p % WO * STRIDE
    n = p // (WO * HO)
    here = mask & (c >= 0) & (c < C)
    x = tl.load(x_ptr + ((n * H + h) * W + w) * C + c, mask=here, other=0.0)
    tl.store(out_ptr + offs, x, mask=mask)


@triton.jit
def _shortcut_a_bwd_kernel(
    dout_ptr,
    dx_ptr,
    elements,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx[n, h, w, c] = dout[n, h / STRIDE, w / STRIDE, c + new] at the pixels that were taken,
    else 0; program i owns BLOCK elements."""
    HO = (H + STRIDE - 1) // STRIDE
    WO = (W + STRIDE - 1) // STRIDE
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    p = offs // C
    k = offs % C + (K - C) // 2
    h = p // W % H
    w = p % W
    n = p // (W * H)
    taken = mask & (h % STRIDE == 0) & (w % STRIDE == 0)
    row = (n * HO + h // STRIDE) * WO + w // STRIDE
    dx = tl.load(dout_ptr + row * K + k, mask=taken, other=0.0)
    tl.store(dx_ptr + offs, dx, mask=mask)


def shortcut_a_fwd(x: Tensor, out_channels: int, stride: int) -> Tensor:
    """x [N, C, H, W] channels-last to [N, K, HO, WO] channels-last."""
    N, C, H, W = x.shape
    shape = (N, out_channels, -(-H // stride), -(-W // stride))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    chosen = launch.config("shortcut_a", C, out_channels, x)
    launch.launch(
        _shortcut_a_fwd_kernel,
        (triton.cdiv(out.numel(), chosen.block_p),),
        x_ptr=x,
        out_ptr=out,
        elements=out.numel(),
        H=H,
        W=W,
        C=C,
        K=out_channels,
        STRIDE=stride,
        BLOCK=chosen.block_p,
        **chosen.options(),
    )
    return out


def shortcut_a_bwd(dout: Tensor, C: int, H: int, W: int, stride: int) -> Tensor:
    """dout [N, K, HO, WO] channels-last to dx [N, C, H, W] channels-last."""
    N, K = dout.shape[:2]
    dx = torch.empty(
        (N, C, H, W), dtype=dout.dtype, device=dout.device, memory_format=torch.channels_last
    )
    chosen = launch.config("shortcut_a", C, K, dout)
    launch.launch(
        _shortcut_a_bwd_kernel,
        (triton.cdiv(dx.numel(), chosen.block_p),),
        dout_ptr=dout,
        dx_ptr=dx,
        elements=dx.numel(),
        H=H,
        W=W,
        C=C,
        K=K,
        STRIDE=stride,
        BLOCK=chosen.block_p,
        **chosen.options(),
    )
    return dx
