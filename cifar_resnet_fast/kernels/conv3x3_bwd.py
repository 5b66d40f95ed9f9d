"""3x3 convolution with zero padding 1 as implicit GEMM, backward (layer 0).

Twin: autograd of ``reference.conv_bn_relu``. Symbols as in conv3x3_fwd.py, and:

=========  ======================================================================
P          pixels of x for dgrad and the fused kernel, of y for wgrad
dz         gradient of the normalisation's output, dy of the convolution's
coef       [5, K] float32: dy = coef0 * dz + coef1 * y + coef2; dz counts only
           where coef3 * y + coef4 > 0 if the ReLU is still to be undone (bn.py)
slab       [K, 9, C] float32: one program's part of the weight gradient
=========  ======================================================================

Partial sums leave one row or slab a program and are added in a fixed order: nothing is atomic, so
a run is reproducible bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.kernels.conv3x3_dgrad import conv3x3_dgrad
from cifar_resnet_fast.kernels.conv3x3_wgrad import conv3x3_wgrad, sum_slabs
from cifar_resnet_fast.kernels.tile import bn_bwd, bn_relu, finish_dx


@triton.jit
def _conv3x3_bwd_kernel(
    dz_ptr,
    y_ptr,
    coef_ptr,
    weight_ptr,
    dx_ptr,
    x_ptr,
    x_affine_ptr,
    residual_ptr,
    raw_ptr,
    raw_affine_ptr,
    partials_ptr,
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
):
    """dgrad and wgrad in one: both need the same shifted dy, dx[q] = sum_tap dy[q at tap] W[tap]
    and dweight[tap] = sum_q dy[q at tap]^T a[q].

    Program (i, j) owns input tiles i, i + S, ... of channel block j, all K output channels, and
    slab i of the weight gradient.
    """
    HO = (H + STRIDE - 1) // STRIDE
    WO = (W + STRIDE - 1) // STRIDE
    P = N * H * W
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_k = tl.arange(0, K)
    c0 = tl.load(coef_ptr + offs_k)
    c1 = tl.load(coef_ptr + K + offs_k)
    c2 = tl.load(coef_ptr + 2 * K + offs_k)
    scale = tl.load(coef_ptr + 3 * K + offs_k)
    shift = tl.load(coef_ptr + 4 * K + offs_k)
    if x_affine_ptr is not None:
        x_scale = tl.load(x_affine_ptr + 2 * C + offs_c)
        x_shift = tl.load(x_affine_ptr + 3 * C + offs_c)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dzy = tl.zeros([BLOCK_C], tl.float32)
    # one accumulator a tap: Triton has no arrays of tiles
    g0 = tl.zeros([K, BLOCK_C], tl.float32)
    g1 = tl.zeros([K, BLOCK_C], tl.float32)
    g2 = tl.zeros([K, BLOCK_C], tl.float32)
    g3 = tl.zeros([K, BLOCK_C], tl.float32)
    g4 = tl.zeros([K, BLOCK_C], tl.float32)
    g5 = tl.zeros([K, BLOCK_C], tl.float32)
    g6 = tl.zeros([K, BLOCK_C], tl.float32)
    g7 = tl.zeros([K, BLOCK_C], tl.float32)
    g8 = tl.zeros([K, BLOCK_C], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.num_programs(0)):
        offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        w = offs_p % W
        h = offs_p // W % H
        n = offs_p // (W * H)
        offs_pc = offs_p[:, None] * C + offs_c[None, :]
        mask_pc = mask_p[:, None] & mask_c[None, :]
        a = tl.load(x_ptr + offs_pc, mask=mask_pc, other=0.0)
        if x_affine_ptr is not None:
            f = bn_relu(a, x_scale, x_shift)
            a = tl.where(mask_pc, f, 0.0).to(x_ptr.dtype.element_ty)
        acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for tap in tl.static_range(9):
            hs = h + 1 - tap // 3
            ws = w + 1 - tap % 3
            inside = mask_p & (hs >= 0) & (hs < HO * STRIDE) & (ws >= 0) & (ws < WO * STRIDE)
            inside = inside & (hs % STRIDE == 0) & (ws % STRIDE == 0)
            row = (n * HO + hs // STRIDE) * WO + ws // STRIDE
            offs_pk = row[:, None] * K + offs_k[None, :]
            dz = tl.load(dz_ptr + offs_pk, mask=inside[:, None], other=0.0)
            y = tl.load(y_ptr + offs_pk, mask=inside[:, None], other=0.0)
            dyf = bn_bwd(dz, y, c0, c1, c2, scale, shift, RELU)
            dy = tl.where(inside[:, None], dyf, 0.0).to(dz_ptr.dtype.element_ty)
            offs_kc = offs_k[:, None] * (9 * C) + tap * C + offs_c[None, :]
            b = tl.load(weight_ptr + offs_kc, mask=mask_c[None, :], other=0.0)
            acc = tl.dot(dy, b, acc, input_precision="ieee")
            dyt = tl.trans(dy)
            if tap == 0:
                g0 = tl.dot(dyt, a, g0, input_precision="ieee")
            elif tap == 1:
                g1 = tl.dot(dyt, a, g1, input_precision="ieee")
            elif tap == 2:
                g2 = tl.dot(dyt, a, g2, input_precision="ieee")
            elif tap == 3:
                g3 = tl.dot(dyt, a, g3, input_precision="ieee")
            elif tap == 4:
                g4 = tl.dot(dyt, a, g4, input_precision="ieee")
            elif tap == 5:
                g5 = tl.dot(dyt, a, g5, input_precision="ieee")
            elif tap == 6:
                g6 = tl.dot(dyt, a, g6, input_precision="ieee")
            elif tap == 7:
                g7 = tl.dot(dyt, a, g7, input_precision="ieee")
            else:
                g8 = tl.dot(dyt, a, g8, input_precision="ieee")
        if partials_ptr is not None:
            acc, weighted = finish_dx(
                acc, a, residual_ptr, raw_ptr, raw_affine_ptr, dx_ptr, offs_pc, mask_pc, offs_c
            )
            sum_dz += tl.sum(acc, 0)
            sum_dzy += tl.sum(weighted, 0)
        tl.store(dx_ptr + offs_pc, acc.to(dx_ptr.dtype.element_ty), mask=mask_pc)
    if partials_ptr is not None:
        sums = partials_ptr + tl.program_id(0) * 2 * C + offs_c
        tl.store(sums, sum_dz)
        tl.store(sums + C, sum_dzy)
    slab = slabs_ptr + tl.program_id(0).to(tl.int64) * (9 * C * K)
    out = slab + offs_k[:, None] * (9 * C) + offs_c[None, :]
    tl.store(out, g0, mask=mask_c[None, :])
    tl.store(out + C, g1, mask=mask_c[None, :])
    tl.store(out + 2 * C, g2, mask=mask_c[None, :])
    tl.store(out + 3 * C, g3, mask=mask_c[None, :])
    tl.store(out + 4 * C, g4, mask=mask_c[None, :])
    tl.store(out + 5 * C, g5, mask=mask_c[None, :])
    tl.store(out + 6 * C, g6, mask=mask_c[None, :])
    tl.store(out + 7 * C, g7, mask=mask_c[None, :])
    tl.store(out + 8 * C, g8, mask=mask_c[None, :])


def _fused(
    chosen: launch.Config,
    dz: Tensor,
    y: Tensor,
    coef: Tensor,
    x: Tensor,
    weight: Tensor,
    dweight: Tensor,
    stride: int,
    relu: bool,
    x_affine: Tensor | None,
    raw: Tensor | None,
    raw_affine: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    N, C, H, W = x.shape
    K = weight.shape[0]
    block_c = launch.channel_block(C, chosen.block_c)
    c_blocks = -(-C // block_c)
    programs = launch.pixel_programs(chosen, N * H * W, c_blocks, x.device)
    dx = torch.empty_like(x)
    partials = None
    if raw is not None:
        partials = torch.empty((programs, 2, C), dtype=torch.float32, device=x.device)
    slabs = torch.empty((programs, K, 9, C), dtype=torch.float32, device=x.device)
    launch.launch(
        _conv3x3_bwd_kernel,
        (programs, c_blocks),
        dz_ptr=dz,
        y_ptr=y,
        coef_ptr=coef,
        weight_ptr=weight,
        dx_ptr=dx,
        x_ptr=x,
        x_affine_ptr=x_affine,
        residual_ptr=residual,
        raw_ptr=raw,
        raw_affine_ptr=raw_affine,
        partials_ptr=partials,
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
        **chosen.options(),
    )
    sum_slabs(slabs, dweight)
    return dx, partials


def conv3x3_bwd(
    dz: Tensor,
    y: Tensor,
    coef: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int,
    relu: bool,
    dx: bool,
    dweight: Tensor | None,
    x_affine: Tensor | None = None,
    raw: Tensor | None = None,
    raw_affine: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the convolution and, on load, of the normalisation that follows it.

    Args:
        dz: [N, K, HO, WO] channels-last. gradient after the normalisation, or after its ReLU if
            ``relu``
        y: as dz. output of the convolution
        coef: [5, K] float32. from ``bn_merge_bwd``
        x: [N, C, H, W] channels-last. input of the convolution; raw if ``x_affine`` is given
        weight: [K, C, 3, 3] channels-last, of x's dtype
        stride: 1 or 2
        relu: undo the ReLU on load; its mask is made from y
        dx: whether the gradient of x is wanted
        dweight: [K, C, 3, 3], contiguous or channels-last, any floating dtype. written; None if
            not wanted
        x_affine: [4, C] float32. normalise x on load, then ReLU
        raw, raw_affine: as x, [4, C] float32. the raw tensor that x was made from by normalisation
            [, shortcut] and ReLU: dx is then dz of that, and its sums are left
        residual: as x, only with raw. gradient that reaches x by the shortcut

    Returns:
        dx: [N, C, H, W] channels-last, or None
        partials: [S, 2, C] float32, sums of dx and of dx * (raw - mean); None without raw
    """
    raw_flow = {
        "x_affine": x_affine,
        "raw": raw,
        "raw_affine": raw_affine,
        "residual": residual,
    }
    if dweight is None:
        if not dx:
            return None, None
        return conv3x3_dgrad(dz, y, coef, x, weight, stride=stride, relu=relu, **raw_flow)
    if not dx:
        conv3x3_wgrad(dz, y, coef, x, dweight, stride=stride, relu=relu, x_affine=x_affine)
        return None, None
    chosen = launch.fused_config(x.shape[1], weight.shape[0], x)
    if chosen is not None:
        return _fused(chosen, dz, y, coef, x, weight, dweight, stride, relu, **raw_flow)
    # wgrad makes dy once a pixel and leaves it for dgrad, which would make it nine times
    dy = torch.empty_like(dz)
    conv3x3_wgrad(dz, y, coef, x, dweight, stride=stride, relu=relu, x_affine=x_affine, dy=dy)
    return conv3x3_dgrad(dy, None, None, x, weight, stride=stride, relu=False, **raw_flow)
