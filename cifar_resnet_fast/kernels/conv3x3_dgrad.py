"""Input gradient of the 3x3 convolution (layer 0). Symbols as in conv3x3_bwd.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.kernels.tile import bn_bwd, bn_relu, finish_dx


@triton.jit
def _conv3x3_dgrad_kernel(
    dy_ptr,
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
    """dx = conv_transposed(dy); program (i, j) owns input tiles i, i + S, ... of channel block j.

    With coef, dy_ptr holds dz and BN's backward is applied on load. With partials, see
    ``finish_dx``.
    """
    HO = (H + STRIDE - 1) // STRIDE
    WO = (W + STRIDE - 1) // STRIDE
    P = N * H * W
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    K_BLOCKS: tl.constexpr = K // BLOCK_K
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dzy = tl.zeros([BLOCK_C], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.num_programs(0)):
        offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        w = offs_p % W
        h = offs_p // W % H
        n = offs_p // (W * H)
        acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for step in tl.range(0, 9 * K_BLOCKS):
            tap = step // K_BLOCKS
            offs_k = step % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
            # the output pixel whose window has this input pixel at this tap, times STRIDE
            hs = h + 1 - tap // 3
            ws = w + 1 - tap % 3
            inside = mask_p & (hs >= 0) & (hs < HO * STRIDE) & (ws >= 0) & (ws < WO * STRIDE)
            inside = inside & (hs % STRIDE == 0) & (ws % STRIDE == 0)
            row = (n * HO + hs // STRIDE) * WO + ws // STRIDE
            offs_pk = row[:, None] * K + offs_k[None, :]
            dy = tl.load(dy_ptr + offs_pk, mask=inside[:, None], other=0.0)
            if coef_ptr is not None:
                y = tl.load(y_ptr + offs_pk, mask=inside[:, None], other=0.0)
                c0 = tl.load(coef_ptr + offs_k)
                c1 = tl.load(coef_ptr + K + offs_k)
                c2 = tl.load(coef_ptr + 2 * K + offs_k)
                scale = tl.load(coef_ptr + 3 * K + offs_k)
                shift = tl.load(coef_ptr + 4 * K + offs_k)
                dyf = bn_bwd(dy, y, c0, c1, c2, scale, shift, RELU)
                dy = tl.where(inside[:, None], dyf, 0.0).to(dy_ptr.dtype.element_ty)
            offs_kc = offs_k[:, None] * (9 * C) + tap * C + offs_c[None, :]
            b = tl.load(weight_ptr + offs_kc, mask=mask_c[None, :], other=0.0)
            acc = tl.dot(dy, b, acc, input_precision="ieee")
        offs_pc = offs_p[:, None] * C + offs_c[None, :]
        mask_pc = mask_p[:, None] & mask_c[None, :]
        if partials_ptr is not None:
            a = tl.load(x_ptr + offs_pc, mask=mask_pc, other=0.0).to(tl.float32)
            if x_affine_ptr is not None:
                x_scale = tl.load(x_affine_ptr + 2 * C + offs_c)
                x_shift = tl.load(x_affine_ptr + 3 * C + offs_c)
                a = bn_relu(a, x_scale, x_shift)
            acc, weighted = finish_dx(
                acc, a, residual_ptr, raw_ptr, raw_affine_ptr, dx_ptr, offs_pc, mask_pc, offs_c
            )
            sum_dz += tl.sum(acc, 0)
            sum_dzy += tl.sum(weighted, 0)
        tl.store(dx_ptr + offs_pc, acc.to(dx_ptr.dtype.element_ty), mask=mask_pc)
    if partials_ptr is not None:
        out = partials_ptr + tl.program_id(0) * 2 * C + offs_c
        tl.store(out, sum_dz)
        tl.store(out + C, sum_dzy)


def conv3x3_dgrad(
    dy: Tensor,
    y: Tensor | None,
    coef: Tensor | None,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int,
    relu: bool,
    x_affine: Tensor | None = None,
    raw: Tensor | None = None,
    raw_affine: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx and partials as ``conv3x3_bwd`` returns them, its arguments as there, except:

    Args:
        dy: gradient of the convolution's output; dz if ``coef`` is given
        y, coef: None, or what BN's backward needs on load
    """
    N, C, H, W = x.shape
    K = weight.shape[0]
    chosen = launch.config("conv3x3_dgrad", C, K, x)
    block_c = launch.channel_block(C, chosen.block_c)
    c_blocks = -(-C // block_c)
    programs = launch.pixel_programs(chosen, N * H * W, c_blocks, x.device)
    dx = torch.empty_like(x)
    partials = None
    if raw is not None:
        partials = torch.empty((programs, 2, C), dtype=torch.float32, device=x.device)
    launch.launch(
        _conv3x3_dgrad_kernel,
        (programs, c_blocks),
        dy_ptr=dy,
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
        N=N,
        H=H,
        W=W,
        C=C,
        K=K,
        STRIDE=stride,
        RELU=relu,
        BLOCK_P=chosen.block_p,
        BLOCK_C=block_c,
        BLOCK_K=launch.channel_block(K, chosen.block_k),
        **chosen.options(),
    )
    return dx, partials
