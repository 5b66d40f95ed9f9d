"""Batch normalisation around the convolutions: statistics, apply, backward sums (layer 0).

Twin: the normalisation in ``reference.conv_bn_relu``. P pixels by K channels, channels-last, so a
row-major matrix [P, K]; S programs along the pixels.

=========  ======================================================================
affine     [4, K] float32: mean, invstd, scale = weight * invstd and
           shift = bias - mean * scale, so that z = scale * y + shift
coef       [5, K] float32: dy = coef0 * dz + coef1 * y + coef2; then scale and
           shift again, for the ReLU's mask scale * y + shift > 0
=========  ======================================================================

With m1 = mean(dz), m2 = mean(dz * yhat), yhat = (y - mean) * invstd (Ioffe and Szegedy 2015,
section 3): dy = scale * (dz - m1 - yhat * m2). Partial sums are merged in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.kernels.tile import relu_tile


@triton.jit
def _bn_merge_fwd_kernel(
    partials_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    affine_ptr,
    S,
    momentum,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """affine from the S partials (count, mean, sum of squared deviations), running statistics
    updated; or from the running statistics, where there are no partials. Program i owns BLOCK_K
    channels."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    running_mean = tl.load(running_mean_ptr + offs_k).to(tl.float64)
    running_var = tl.load(running_var_ptr + offs_k).to(tl.float64)
    if partials_ptr is None:
        mean = running_mean
        var = running_var
    else:
        count_sk = tl.zeros([ROWS, BLOCK_K], tl.float64)
        sum_sk = tl.zeros([ROWS, BLOCK_K], tl.float64)
        for first in tl.range(0, S, ROWS):
            rows = first + tl.arange(0, ROWS)
            offs_sk = rows[:, None] * (3 * K) + offs_k[None, :]
            mask_sk = (rows < S)[:, None]
            count = tl.load(partials_ptr + offs_sk, mask=mask_sk, other=0.0).to(tl.float64)
            row_mean = tl.load(partials_ptr + offs_sk + K, mask=mask_sk, other=0.0)
            count_sk += count
            sum_sk += count * row_mean.to(tl.float64)
        pixels = tl.sum(count_sk, 0)
        mean = tl.sum(sum_sk, 0) / pixels
        # deviations from the common mean: those within a row, and the row's own
        squares_sk = tl.zeros([ROWS, BLOCK_K], tl.float64)
        for first in tl.range(0, S, ROWS):
            rows = first + tl.arange(0, ROWS)
            offs_sk = rows[:, None] * (3 * K) + offs_k[None, :]
            mask_sk = (rows < S)[:, None]
            count = tl.load(partials_ptr + offs_sk, mask=mask_sk, other=0.0).to(tl.float64)
            row_mean = tl.load(partials_ptr + offs_sk + K, mask=mask_sk, other=0.0)
            within = tl.load(partials_ptr + offs_sk + 2 * K, mask=mask_sk, other=0.0)
            delta = row_mean.to(tl.float64) - mean[None, :]
            squares_sk += within.to(tl.float64) + count * delta * delta
        squares = tl.sum(squares_sk, 0)
        var = squares / pixels
        new_mean = running_mean + momentum * (mean - running_mean)
        new_var = running_var + momentum * (squares / (pixels - 1) - running_var)
        tl.store(running_mean_ptr + offs_k, new_mean.to(running_mean_ptr.dtype.element_ty))
        tl.store(running_var_ptr + offs_k, new_var.to(running_var_ptr.dtype.element_ty))
    invstd = 1 / tl.sqrt(var + eps)
    scale = (tl.load(bn_weight_ptr + offs_k).to(tl.float64) * invstd).to(tl.float32)
    # from the rounded scale, so that its rounding moves z by its share of y - mean, not of y
    shift = tl.load(bn_bias_ptr + offs_k).to(tl.float64) - mean * scale.to(tl.float64)
    tl.store(affine_ptr + offs_k, mean.to(tl.float32))
    tl.store(affine_ptr + K + offs_k, invstd.to(tl.float32))
    tl.store(affine_ptr + 2 * K + offs_k, scale)
    tl.store(affine_ptr + 3 * K + offs_k, shift.to(tl.float32))


def bn_merge_fwd(
    partials: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """Statistics of a batch from ``conv3x3_fwd``'s partials.

    Args:
        partials: [S, 3, K] float32, or None to take the running statistics
        bn_weight, bn_bias, running_mean, running_var: [K], any floating dtype. the running
            statistics are updated in place, the variance unbiased
        momentum, eps: as ``reference.conv_bn_relu`` has them

    Returns:
        affine: [4, K] float32
    """
    K = bn_weight.shape[0]
    affine = torch.empty((4, K), dtype=torch.float32, device=bn_weight.device)
    chosen = launch.config("bn_merge", K, K, affine)
    block_k = launch.channel_block(K, chosen.block_k)
    launch.launch(
        _bn_merge_fwd_kernel,
        (K // block_k,),
        partials_ptr=partials,
        bn_weight_ptr=bn_weight,
        bn_bias_ptr=bn_bias,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        affine_ptr=affine,
        S=0 if partials is None else partials.shape[0],
        momentum=momentum,
        eps=eps,
        K=K,
        ROWS=chosen.block_p,
        BLOCK_K=block_k,
        **chosen.options(),
    )
    return affine


@triton.jit
def _bn_apply_fwd_kernel(
    y_ptr,
    affine_ptr,
    shortcut_ptr,
    a_ptr,
    P,
    K: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a = relu(scale * y + shift + shortcut); program (i, j) owns tiles i, i + S, ... of channel
    block j."""
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.load(affine_ptr + 2 * K + offs_k)[None, :]
    shift = tl.load(affine_ptr + 3 * K + offs_k)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.num_programs(0)):
        offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        offs_pk = offs_p[:, None] * K + offs_k[None, :]
        mask_p = (offs_p < P)[:, None]
        z = tl.load(y_ptr + offs_pk, mask=mask_p, other=0.0).to(tl.float32) * scale + shift
        if shortcut_ptr is not None:
            z += tl.load(shortcut_ptr + offs_pk, mask=mask_p, other=0.0).to(tl.float32)
        if RELU:
            z = relu_tile(z)
        tl.store(a_ptr + offs_pk, z.to(a_ptr.dtype.element_ty), mask=mask_p)


def bn_apply_fwd(y: Tensor, affine: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """The finished activation of a raw one.

    Args:
        y: [N, K, H, W] channels-last. raw
        affine: [4, K] float32
        shortcut: as y, or None. added before the ReLU
        relu: False leaves the ReLU out

    Returns:
        as y
    """
    K = y.shape[1]
    P = y.numel() // K
    chosen = launch.config("bn_apply", K, K, y)
    block_k = launch.channel_block(K, chosen.block_k)
    a = torch.empty_like(y)
    launch.launch(
        _bn_apply_fwd_kernel,
        (launch.pixel_programs(chosen, P, K // block_k, y.device), K // block_k),
        y_ptr=y,
        affine_ptr=affine,
        shortcut_ptr=shortcut,
        a_ptr=a,
        P=P,
        K=K,
        RELU=relu,
        BLOCK_P=chosen.block_p,
        BLOCK_K=block_k,
        **chosen.options(),
    )
    return a


@triton.jit
def _bn_reduce_bwd_kernel(
    da_ptr,
    y_ptr,
    affine_ptr,
    a_ptr,
    dz_ptr,
    partials_ptr,
    P,
    K: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of dz and dz * (y - mean), where dz is da with the ReLU undone.

    The ReLU's mask is a > 0 where a is given, else made from y; dz is written where dz_ptr is
    given. Program (i, j) owns tiles i, i + S, ... of channel block j.
    """
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mean = tl.load(affine_ptr + offs_k)[None, :]
    scale = tl.load(affine_ptr + 2 * K + offs_k)[None, :]
    shift = tl.load(affine_ptr + 3 * K + offs_k)[None, :]
    sum_dz = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    sum_dzy = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.num_programs(0)):
        offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        offs_pk = offs_p[:, None] * K + offs_k[None, :]
        mask_p = (offs_p < P)[:, None]
        dz = tl.load(da_ptr + offs_pk, mask=mask_p, other=0.0)
        y = tl.load(y_ptr + offs_pk, mask=mask_p, other=0.0).to(tl.float32)
        if RELU:
            if a_ptr is not None:
                keep = tl.load(a_ptr + offs_pk, mask=mask_p, other=0.0) > 0
            else:
                keep = y * scale + shift > 0
            dz = tl.where(keep, dz, 0.0)
        if dz_ptr is not None:
            tl.store(dz_ptr + offs_pk, dz, mask=mask_p)
        dz = dz.to(tl.float32)
        sum_dz += dz
        sum_dzy += dz * (y - mean)
    out = partials_ptr + tl.program_id(0) * (2 * K) + offs_k
    tl.store(out, tl.sum(sum_dz, 0))
    tl.store(out + K, tl.sum(sum_dzy, 0))


def bn_reduce_bwd(
    da: Tensor, y: Tensor, affine: Tensor, a: Tensor | None, relu: bool, write_dz: bool
) -> tuple[Tensor, Tensor]:
    """What the normalisation's backward must know of the whole batch.

    Args:
        da: [N, K, H, W] channels-last. gradient of the finished activation
        y: as da. raw
        affine: [4, K] float32
        a: as da. the finished activation, for the ReLU's mask; None makes the mask from y
        relu: whether there was a ReLU
        write_dz: whether da with the ReLU undone is wanted as a tensor

    Returns:
        dz: as da; da itself unless ``write_dz``
        partials: [S, 2, K] float32, sums of dz and dz * (y - mean)
    """
    K = y.shape[1]
    P = y.numel() // K
    chosen = launch.config("bn_reduce", K, K, y)
    block_k = launch.channel_block(K, chosen.block_k)
    programs = launch.pixel_programs(chosen, P, K // block_k, y.device)
    partials = torch.empty((programs, 2, K), dtype=torch.float32, device=y.device)
    dz = torch.empty_like(da) if write_dz else None
    launch.launch(
        _bn_reduce_bwd_kernel,
        (programs, K // block_k),
        da_ptr=da,
        y_ptr=y,
        affine_ptr=affine,
        a_ptr=a,
        dz_ptr=dz,
        partials_ptr=partials,
        P=P,
        K=K,
        RELU=relu,
        BLOCK_P=chosen.block_p,
        BLOCK_K=block_k,
        **chosen.options(),
    )
    return (da if dz is None else dz), partials


@triton.jit
def _bn_merge_bwd_kernel(
    partials_ptr,
    affine_ptr,
    coef_ptr,
    dbn_weight_ptr,
    dbn_bias_ptr,
    S,
    P,
    K: tl.constexpr,
    TRAINING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """coef and the gradients of weight and bias from the S partials; program i owns BLOCK_K
    channels. Without TRAINING the statistics were constants."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    dz_sk = tl.zeros([ROWS, BLOCK_K], tl.float64)
    dzy_sk = tl.zeros([ROWS, BLOCK_K], tl.float64)
    for first in tl.range(0, S, ROWS):
        rows = first + tl.arange(0, ROWS)
        offs_sk = rows[:, None] * (2 * K) + offs_k[None, :]
        mask_sk = (rows < S)[:, None]
        dz_sk += tl.load(partials_ptr + offs_sk, mask=mask_sk, other=0.0).to(tl.float64)
        dzy_sk += tl.load(partials_ptr + offs_sk + K, mask=mask_sk, other=0.0).to(tl.float64)
    mean = tl.load(affine_ptr + offs_k).to(tl.float64)
    invstd = tl.load(affine_ptr + K + offs_k).to(tl.float64)
    scale = tl.load(affine_ptr + 2 * K + offs_k)
    dbn_bias = tl.sum(dz_sk, 0)
    dbn_weight = tl.sum(dzy_sk, 0) * invstd
    tl.store(dbn_bias_ptr + offs_k, dbn_bias.to(dbn_bias_ptr.dtype.element_ty))
    tl.store(dbn_weight_ptr + offs_k, dbn_weight.to(dbn_weight_ptr.dtype.element_ty))
    if TRAINING:
        c1 = -scale.to(tl.float64) * invstd * (dbn_weight / P)
        c2 = -scale.to(tl.float64) * (dbn_bias / P) - c1 * mean
    else:
        c1 = tl.zeros([BLOCK_K], tl.float64)
        c2 = tl.zeros([BLOCK_K], tl.float64)
    tl.store(coef_ptr + offs_k, scale)
    tl.store(coef_ptr + K + offs_k, c1.to(tl.float32))
    tl.store(coef_ptr + 2 * K + offs_k, c2.to(tl.float32))
    tl.store(coef_ptr + 3 * K + offs_k, scale)
    tl.store(coef_ptr + 4 * K + offs_k, tl.load(affine_ptr + 3 * K + offs_k))


def bn_merge_bwd(
    partials: Tensor, affine: Tensor, pixels: int, training: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of the normalisation as an affine map a channel.

    Args:
        partials: [S, 2, K] float32. from ``bn_reduce_bwd`` or ``conv3x3_bwd``
        affine: [4, K] float32
        pixels: N * H * W of the normalised tensor
        training: False if the running statistics were taken
        dtype: of the gradients of weight and bias

    Returns:
        coef: [5, K] float32
        dbn_weight, dbn_bias: [K]
    """
    S, _, K = partials.shape
    coef = torch.empty((5, K), dtype=torch.float32, device=partials.device)
    dbn_weight = torch.empty(K, dtype=dtype, device=partials.device)
    dbn_bias = torch.empty_like(dbn_weight)
    chosen = launch.config("bn_merge", K, K, coef)
    block_k = launch.channel_block(K, chosen.block_k)
    launch.launch(
        _bn_merge_bwd_kernel,
        (K // block_k,),
        partials_ptr=partials,
        affine_ptr=affine,
        coef_ptr=coef,
        dbn_weight_ptr=dbn_weight,
        dbn_bias_ptr=dbn_bias,
        S=S,
        P=pixels,
        K=K,
        TRAINING=training,
        ROWS=chosen.block_p,
        BLOCK_K=block_k,
        **chosen.options(),
    )
    return coef, dbn_weight, dbn_bias
