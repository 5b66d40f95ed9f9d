"""3x3 convolution with zero padding 1 as implicit GEMM, forward (layer 0).

Twin: the convolution in ``reference.conv_bn_relu``. In training an activation may travel raw, as a
convolution's output before its normalisation: the kernel that writes it leaves the statistics, the
kernel that reads it normalises on load.

=========  ======================================================================
N H W C    batch, height, width, channels of the input x
HO WO K    height, width, channels of the output y
P          pixels of y; a channels-last activation is a row-major matrix [P, C]
S          programs along the pixels
tap        3 * ty + tx, position in the 3x3 window; input pixel of output pixel
           (h, w) is (h * STRIDE + ty - 1, w * STRIDE + tx - 1)
weight     [K, 9, C] row-major, which is what channels-last [K, C, 3, 3] is
affine     [4, channels] float32: mean, invstd, scale, shift (see bn.py)
=========  ======================================================================

Offsets are 32 bits wide: no activation may have 2**31 elements or more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.kernels.tile import relu_tile


@triton.jit
def _conv3x3_fwd_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_affine_ptr,
    x_shortcut_ptr,
    activation_ptr,
    partials_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    shortcut_ptr,
    eps,
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
    """y = conv(x); program (i, j) owns output tiles i, i + S, ... of channel block j.

    With x_affine, x is raw and relu(scale * x + shift + x_shortcut) is what is convolved, and
    written to activation. With partials, each program leaves count, mean and sum of squared
    deviations of its y. With running_mean, y is normalised by the running statistics, then
    shortcut and ReLU are applied: a whole layer.
    """
    HO = (H + STRIDE - 1) // STRIDE
    WO = (W + STRIDE - 1) // STRIDE
    P = N * HO * WO
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    if running_mean_ptr is not None:
        invstd = 1.0 / tl.sqrt_rn(tl.load(running_var_ptr + offs_k).to(tl.float32) + eps)
        scale = tl.load(bn_weight_ptr + offs_k).to(tl.float32) * invstd
        shift = tl.load(bn_bias_ptr + offs_k).to(tl.float32)
        shift -= tl.load(running_mean_ptr + offs_k).to(tl.float32) * scale
    count = 0
    mean = tl.zeros([BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.num_programs(0)):
        offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        wo = offs_p % WO
        ho = offs_p // WO % HO
        n = offs_p // (WO * HO)
        acc = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        # one run-time loop over taps and channel blocks, which Triton pipelines
        for step in tl.range(0, 9 * C_BLOCKS):
            tap = step // C_BLOCKS
            ty = tap // 3
            tx = tap % 3
            offs_c = step % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            h = ho * STRIDE + ty - 1
            w = wo * STRIDE + tx - 1
            inside = mask_p & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            mask_pc = inside[:, None] & mask_c[None, :]
            offs_pc = ((n * H + h) * W + w)[:, None] * C + offs_c[None, :]
            a = tl.load(x_ptr + offs_pc, mask=mask_pc, other=0.0)
            if x_affine_ptr is not None:
                x_scale = tl.load(x_affine_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
                x_shift = tl.load(x_affine_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
                f = a.to(tl.float32) * x_scale[None, :] + x_shift[None, :]
                if x_shortcut_ptr is not None:
                    f += tl.load(x_shortcut_ptr + offs_pc, mask=mask_pc, other=0.0).to(tl.float32)
                # the padding is zero after the normalisation, not before
                a = tl.where(mask_pc, relu_tile(f), 0.0).to(x_ptr.dtype.element_ty)
                if activation_ptr is not None:
                    # these taps see every input pixel once
                    own = (ty >= 1) & (ty <= STRIDE) & (tx >= 1) & (tx <= STRIDE)
                    own = own & (tl.program_id(1) == 0)
                    tl.store(activation_ptr + offs_pc, a, mask=mask_pc & own)
            offs_ck = offs_k[None, :] * (9 * C) + tap * C + offs_c[:, None]
            b = tl.load(weight_ptr + offs_ck, mask=mask_c[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        offs_pk = offs_p[:, None] * K + offs_k[None, :]
        if running_mean_ptr is not None:
            acc = acc * scale[None, :] + shift[None, :]
            if shortcut_ptr is not None:
                shortcut = tl.load(shortcut_ptr + offs_pk, mask=mask_p[:, None], other=0.0)
                acc += shortcut.to(tl.float32)
            if RELU:
                acc = relu_tile(acc)
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_pk, y, mask=mask_p[:, None])
        if partials_ptr is not None:
            # statistics of y as it is stored, about the mean so far: E[y^2] - E[y]^2 would cancel
            new = tl.minimum(P - tile * BLOCK_P, BLOCK_P)
            yf = tl.where(mask_p[:, None], y.to(tl.float32), 0.0)
            if count == 0:
                mean = tl.sum(yf, 0) / new
            deviation = tl.where(mask_p[:, None], yf - mean[None, :], 0.0)
            count += new
            sum_deviation = tl.sum(deviation, 0)
            squares += tl.sum(deviation * deviation, 0) - sum_deviation * sum_deviation / count
            mean += sum_deviation / count
    if partials_ptr is not None:
        row = partials_ptr + tl.program_id(0) * 3 * K + offs_k
        tl.store(row, tl.zeros([BLOCK_K], tl.float32) + count)
        tl.store(row + K, mean)
        tl.store(row + 2 * K, squares)


def conv3x3_fwd(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int,
    sums: bool = False,
    x_affine: Tensor | None = None,
    x_shortcut: Tensor | None = None,
    keep: bool = False,
    running: tuple[Tensor, Tensor, Tensor, Tensor, float] | None = None,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The convolution, with what of its neighbours' work is asked for.

    Args:
        x: [N, C, H, W] channels-last; raw if ``x_affine`` is given
        weight: [K, C, 3, 3] channels-last, of x's dtype
        stride: 1 or 2
        sums: leave the statistics of y for ``bn_merge_fwd``
        x_affine: [4, C] float32. normalise x on load, then ReLU
        x_shortcut: as x. added to the normalised x before its ReLU
        keep: write the normalised x, too
        running: bn_weight, bn_bias, running_mean, running_var [K], eps. normalise y by these
        shortcut: as y. added after that
        relu: apply it after that

    Returns:
        y: [N, K, HO, WO] channels-last, of x's dtype
        partials: [S, 3, K] float32, count, mean and sum of squared deviations; None without sums
        activation: as x, what was convolved; None unless ``keep``
    """
    N, C, H, W = x.shape
    K = weight.shape[0]
    HO, WO = -(-H // stride), -(-W // stride)
    chosen = launch.config("conv3x3_fwd", C, K, x)
    block_k = launch.channel_block(K, chosen.block_k)
    programs = launch.pixel_programs(chosen, N * HO * WO, K // block_k, x.device)
    y = torch.empty(
        (N, K, HO, WO), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    partials = None
    if sums:
        partials = torch.empty((programs, 3, K), dtype=torch.float32, device=x.device)
    activation = torch.empty_like(x) if keep else None
    bn_weight, bn_bias, running_mean, running_var, eps = running or (None,) * 4 + (0.0,)
    launch.launch(
        _conv3x3_fwd_kernel,
        (programs, K // block_k),
        x_ptr=x,
        weight_ptr=weight,
        y_ptr=y,
        x_affine_ptr=x_affine,
        x_shortcut_ptr=x_shortcut,
        activation_ptr=activation,
        partials_ptr=partials,
        bn_weight_ptr=bn_weight,
        bn_bias_ptr=bn_bias,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        shortcut_ptr=shortcut,
        eps=eps,
        N=N,
        H=H,
        W=W,
        C=C,
        K=K,
        STRIDE=stride,
        RELU=relu,
        BLOCK_P=chosen.block_p,
        BLOCK_C=launch.channel_block(C, chosen.block_c),
        BLOCK_K=block_k,
        **chosen.options(),
    )
    return y, partials, activation
