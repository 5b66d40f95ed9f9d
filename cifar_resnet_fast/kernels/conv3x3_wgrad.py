"""Weight gradient of the 3x3 convolution (layer 0). Symbols as in conv3x3_bwd.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.kernels.tile import bn_bwd, bn_relu


@triton.jit
def _conv3x3_wgrad_kernel(
    dz_ptr,
    y_ptr,
    coef_ptr,
    x_ptr,
    x_affine_ptr,
    dy_ptr,
    slabs_ptr,
    N,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dweight[tap] = sum_p dy[p]^T a[p at tap], BN's backward applied on load.

    Program (i, j, ty) owns output tiles i, i + S, ..., channel blocks j and the three taps of row
    ty, and leaves its sum in slab i. Where dy_ptr is given dy is written, for dgrad to read.
    """
    HO = (H + STRIDE - 1) // STRIDE
    WO = (W + STRIDE - 1) // STRIDE
    P = N * HO * WO
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ty = tl.program_id(2)
    offs_c = tl.program_id(1) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.program_id(1) // C_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c = offs_c < C
    c0 = tl.load(coef_ptr + offs_k)
    c1 = tl.load(coef_ptr + K + offs_k)
    c2 = tl.load(coef_ptr + 2 * K + offs_k)
    scale = tl.load(coef_ptr + 3 * K + offs_k)
    shift = tl.load(coef_ptr + 4 * K + offs_k)
    if x_affine_ptr is not None:
        x_scale = tl.load(x_affine_ptr + 2 * C + offs_c)
        x_shift = tl.load(x_affine_ptr + 3 * C + offs_c)
    g0 = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    g1 = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    g2 = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.num_programs(0)):
        offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        wo = offs_p % WO
        ho = offs_p // WO % HO
        n = offs_p // (WO * HO)
        offs_pk = offs_p[:, None] * K + offs_k[None, :]
        dz = tl.load(dz_ptr + offs_pk, mask=mask_p[:, None], other=0.0)
        y = tl.load(y_ptr + offs_pk, mask=mask_p[:, None], other=0.0)
        dyf = bn_bwd(dz, y, c0, c1, c2, scale, shift, RELU)
        dy = tl.where(mask_p[:, None], dyf, 0.0).to(dz_ptr.dtype.element_ty)
        if dy_ptr is not None:
            own = (ty == 0) & (tl.program_id(1) % C_BLOCKS == 0)
            tl.store(dy_ptr + offs_pk, dy, mask=mask_p[:, None] & own)
        dyt = tl.trans(dy)
        h = ho * STRIDE + ty - 1
        for tx in tl.static_range(3):
            w = wo * STRIDE + tx - 1
            inside = mask_p & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            mask_pc = inside[:, None] & mask_c[None, :]
            offs_pc = ((n * H + h) * W + w)[:, None] * C + offs_c[None, :]
            a = tl.load(x_ptr + offs_pc, mask=mask_pc, other=0.0)
            if x_affine_ptr is not None:
                f = bn_relu(a, x_scale, x_shift)
                a = tl.where(mask_pc, f, 0.0).to(x_ptr.dtype.element_ty)
            if tx == 0:
                g0 = tl.dot(dyt, a, g0, input_precision="ieee")
            elif tx == 1:
                g1 = tl.dot(dyt, a, g1, input_precision="ieee")
            else:
                g2 = tl.dot(dyt, a, g2, input_precision="ieee")
    # slabs [S, K, 9, C]; 64 bits: there may be many of a wide layer's
    slab = slabs_ptr + tl.program_id(0).to(tl.int64) * (9 * C * K)
    out = slab + offs_k[:, None] * (9 * C) + ty * (3 * C) + offs_c[None, :]
    tl.store(out, g0, mask=mask_c[None, :])
    tl.store(out + C, g1, mask=mask_c[None, :])
    tl.store(out + 2 * C, g2, mask=mask_c[None, :])


@triton.jit
def _sum_slabs_kernel(
    slabs_ptr,
    dweight_ptr,
    S,
    C: tl.constexpr,
    K: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dweight = sum of S slabs; program i owns BLOCK elements and adds ROWS slabs at a time."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < 9 * C * K
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, S, ROWS):
        rows = first + tl.arange(0, ROWS)
        offs_rows = rows.to(tl.int64)[:, None] * (9 * C * K) + offs[None, :]
        acc += tl.load(slabs_ptr + offs_rows, mask=(rows < S)[:, None] & mask[None, :], other=0.0)
    out = offs
    if not CHANNELS_LAST:
        out = offs // (9 * C) * (9 * C) + offs % C * 9 + offs // C % 9
    tl.store(dweight_ptr + out, tl.sum(acc, 0).to(dweight_ptr.dtype.element_ty), mask=mask)


def sum_slabs(slabs: Tensor, dweight: Tensor) -> None:
    """Add the slabs in a fixed order.

    Args:
        slabs: [S, K, 9, C] float32
        dweight: [K, C, 3, 3], contiguous or channels-last, any floating dtype. written
    """
    S, K, _, C = slabs.shape
    chosen = launch.config("sum_slabs", C, K, slabs)
    launch.launch(
        _sum_slabs_kernel,
        (triton.cdiv(9 * C * K, chosen.block_p),),
        slabs_ptr=slabs,
        dweight_ptr=dweight,
        S=S,
        C=C,
        K=K,
        CHANNELS_LAST=not dweight.is_contiguous(),
        ROWS=32,
        BLOCK=chosen.block_p,
        **chosen.options(),
    )


def conv3x3_wgrad(
    dz: Tensor,
    y: Tensor,
    coef: Tensor,
    x: Tensor,
    dweight: Tensor,
    *,
    stride: int,
    relu: bool,
    x_affine: Tensor | None = None,
    dy: Tensor | None = None,
) -> None:
    """Write ``dweight``, and ``dy`` (as dz) where given; the rest is as for ``conv3x3_bwd``."""
    N, C, H, W = x.shape
    K, HO, WO = y.shape[1:]
    chosen = launch.config("conv3x3_wgrad", C, K, x)
    block_c = launch.channel_block(C, chosen.block_c)
    block_k = launch.channel_block(K, chosen.block_k)
    blocks = -(-C // block_c) * (K // block_k)
    programs = launch.pixel_programs(chosen, N * HO * WO, 3 * blocks, x.device)
    slabs = torch.empty((programs, K, 9, C), dtype=torch.float32, device=x.device)
    launch.launch(
        _conv3x3_wgrad_kernel,
        (programs, blocks, 3),
        dz_ptr=dz,
        y_ptr=y,
        coef_ptr=coef,
        x_ptr=x,
        x_affine_ptr=x_affine,
        dy_ptr=dy,
        slabs_ptr=slabs,
        N=N,
        H=H,
        W=W,
        C=C,
        K=K,
        STRIDE=stride,
        RELU=relu,
        BLOCK_P=chosen.block_p,
        BLOCK_C=block_c,
        BLOCK_K=block_k,
        **chosen.options(),
    )
    sum_slabs(slabs, dweight)
