"""Linear layer, softmax cross entropy and their gradients in Triton, two launches (layer 0).

Twin: ``reference.linear_cross_entropy``. All arithmetic is float32, products included.

The first launch gives a program some tiles of rows; of its rows it writes the gradient of the
features, and it leaves a row of partial sums: gradient of weight and of bias, loss, hits. The
second adds up these rows in a fixed order. No atomics, so a run is bitwise reproducible.

==========  ==================================================
N C K       rows, features, classes
L           numbers in a row of partial sums, K * C + K + 2
S           programs of the first launch, rows of partial sums
==========  ==================================================
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch

BLOCK_N = 16  # rows a tile
BLOCK_C = 32  # features that a product takes at a time
MOST_CLASSES_AT_ONCE = 64


@triton.jit
def _logits(
    features_ptr,
    weight_ptr,
    bias_ptr,
    offs_n,
    offs_k,
    N,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] float32; -inf for classes from K on."""
    logits = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in tl.range(0, C, BLOCK_C, num_stages=1):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        x = tl.load(
            features_ptr + offs_n[:, None] * C + offs_c[None, :],
            mask=(offs_n < N)[:, None] & mask_c[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + offs_k[None, :] * C + offs_c[:, None],
            mask=(offs_k < K)[None, :] & mask_c[:, None],
            other=0.0,
        )
        logits = tl.dot(x, w, logits, input_precision="ieee")
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_k, mask=offs_k < K, other=0.0)[None, :]
    return tl.where((offs_k < K)[None, :], logits, float("-inf"))


@triton.jit
def _linear_cross_entropy_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    labels_b_ptr,
    ratio_ptr,
    dfeatures_ptr,
    partials_ptr,
    N,
    share,
    smoothing,
    C: tl.constexpr,
    K: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dfeatures = (softmax(logits) - target) weight / N, and a row of partial sums; program i of
    S owns the tiles of rows i, i + S, ..."""
    L: tl.constexpr = K * C + K + 2
    partials_ptr += tl.program_id(0).to(tl.int64) * L
    loss = tl.zeros([BLOCK_N], tl.float32)
    hits = tl.zeros([BLOCK_N], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=1):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        label = tl.load(labels_ptr + offs_n, mask=mask_n, other=0)
        known = (label >= 0) & (label < K)
        label_b = label
        ratio = 1.0
        if labels_b_ptr is not None:
            label_b = tl.load(labels_b_ptr + offs_n, mask=mask_n, other=0)
            known &= (label_b >= 0) & (label_b < K)
            ratio = tl.load(ratio_ptr)

        # over the classes: maximum and its place, sum of exp(logit - maximum), sum of logits;
        # and the logits of the labels
        largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
        place = tl.zeros([BLOCK_N], tl.int32)
        total = tl.zeros([BLOCK_N], tl.float32)
        added = tl.zeros([BLOCK_N], tl.float32)
        found = tl.zeros([BLOCK_N], tl.float32)
        found_b = tl.zeros([BLOCK_N], tl.float32)
        logits = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for first in tl.range(0, K, BLOCK_K, num_stages=1):
            offs_k = first + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            logits = _logits(
                features_ptr, weight_ptr, bias_ptr, offs_n, offs_k, N,
                C, K, BLOCK_N, BLOCK_K, BLOCK_C,
            )  # fmt: skip
            here = tl.max(logits, 1)
            place = tl.where(here > largest, first + tl.argmax(logits, 1), place)
            larger = tl.maximum(largest, here)
            total = total * tl.exp(largest - larger)
            total += tl.sum(tl.exp(logits - larger[:, None]), 1)
            largest = larger
            added += tl.sum(tl.where(mask_k[None, :], logits, 0.0), 1)
            found += tl.sum(tl.where(offs_k[None, :] == label[:, None], logits, 0.0), 1)
            if labels_b_ptr is not None:
                found_b += tl.sum(tl.where(offs_k[None, :] == label_b[:, None], logits, 0.0), 1)
        # logarithms of probabilities; the maximum is taken off first, so that little cancels
        missing = tl.log(total)
        chance = (found - largest) - missing
        if labels_b_ptr is not None:
            chance = ratio * chance + (1.0 - ratio) * ((found_b - largest) - missing)
        chance_of_all = (added / K - largest) - missing
        row = -(1.0 - smoothing) * chance - smoothing * chance_of_all
        row = tl.where(known, row, float("nan"))
        hit = ratio * (place == label).to(tl.float32)
        if labels_b_ptr is not None:
            hit += (1.0 - ratio) * (place == label_b).to(tl.float32)
        loss += tl.where(mask_n, row, 0.0)
        hits += tl.where(mask_n, hit, 0.0)

        if GRADIENTS:
            again = tile > tl.program_id(0)  # the sums of the program's earlier tiles are there
            scale = tl.where(mask_n, share, 0.0)
            for first in tl.range(0, K, BLOCK_K, num_stages=1):
                offs_k = first + tl.arange(0, BLOCK_K)
                mask_k = offs_k < K
                if K > BLOCK_K:
                    logits = _logits(
                        features_ptr, weight_ptr, bias_ptr, offs_n, offs_k, N,
                        C, K, BLOCK_N, BLOCK_K, BLOCK_C,
                    )  # fmt: skip
                target = ratio * (offs_k[None, :] == label[:, None]).to(tl.float32)
                if labels_b_ptr is not None:
                    is_label_b = (offs_k[None, :] == label_b[:, None]).to(tl.float32)
                    target += (1.0 - ratio) * is_label_b
                target = (1.0 - smoothing) * target + smoothing / K
                dlogits = (tl.exp(logits - largest[:, None]) / total[:, None] - target) * scale[
                    :, None
                ]
                dlogits = tl.where(mask_k[None, :], dlogits, 0.0)
                dbias = tl.sum(dlogits, 0)
                out = partials_ptr + K * C + offs_k
                dbias += tl.load(out, mask=mask_k & again, other=0.0)
                tl.debug_barrier()  # several threads have loaded an element, and one stores it
                tl.store(out, dbias, mask=mask_k)
                for first_c in tl.range(0, C, BLOCK_C, num_stages=1):
                    offs_c = first_c + tl.arange(0, BLOCK_C)
                    mask_c = offs_c < C
                    offs_kc = offs_k[:, None] * C + offs_c[None, :]
                    mask_kc = mask_k[:, None] & mask_c[None, :]
                    offs_nc = offs_n[:, None] * C + offs_c[None, :]
                    mask_nc = mask_n[:, None] & mask_c[None, :]
                    w = tl.load(weight_ptr + offs_kc, mask=mask_kc, other=0.0)
                    dx = tl.dot(dlogits, w, input_precision="ieee")
                    if first > 0:
                        dx += tl.load(dfeatures_ptr + offs_nc, mask=mask_nc, other=0.0)
                    tl.store(dfeatures_ptr + offs_nc, dx, mask=mask_nc)
                    x = tl.load(features_ptr + offs_nc, mask=mask_nc, other=0.0)
                    dw = tl.dot(tl.trans(dlogits), x, input_precision="ieee")
                    dw += tl.load(partials_ptr + offs_kc, mask=mask_kc & again, other=0.0)
                    tl.store(partials_ptr + offs_kc, dw, mask=mask_kc)
    tl.store(partials_ptr + K * C + K, tl.sum(loss, 0) * share)
    tl.store(partials_ptr + K * C + K + 1, tl.sum(hits, 0))


@triton.jit
def _linear_cross_entropy_merge_kernel(
    partials_ptr,
    gradients_ptr,
    loss_ptr,
    hits_ptr,
    S,
    begin,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of S rows of partial sums; program i owns BLOCK of their numbers from ``begin`` on and
    adds ROWS rows at a time."""
    offs = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, S, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        offs_rows = rows.to(tl.int64)[:, None] * L + offs[None, :]
        acc += tl.load(
            partials_ptr + offs_rows, mask=(rows < S)[:, None] & (offs < L)[None, :], other=0.0
        )
    total = tl.sum(acc, 0)
    if gradients_ptr is not None:
        tl.store(gradients_ptr + offs, total, mask=offs < L - 2)
    place = tl.zeros([BLOCK], tl.int32)
    tl.store(loss_ptr + place, total, mask=offs == L - 2)
    tl.store(hits_ptr + place, total, mask=offs == L - 1)


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    labels_b: Tensor | None,
    ratio: Tensor | None,
    *,
    label_smoothing: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """See ``reference.linear_cross_entropy``; all tensors contiguous on one device.

    Returns:
        loss, hits: [] float32
        dfeatures: [N, C] float32, of the loss; None without ``gradients``
        dweight: [K, C] float32, likewise
        dbias: [K] float32, likewise, whether there is a bias or not
    """
    (N, C), K = features.shape, len(weight)
    tiles = triton.cdiv(N, BLOCK_N)
    S = min(tiles, launch.multiprocessors(features.device))
    L = K * C + K + 2
    block_k = max(16, min(triton.next_power_of_2(K), MOST_CLASSES_AT_ONCE))
    partials, loss, hits = (
        torch.empty(shape, dtype=torch.float32, device=features.device)
        for shape in ((S, L), (), ())
    )
    dfeatures = torch.empty_like(features) if gradients else None
    launch.launch(
        _linear_cross_entropy_kernel,
        (S,),
        features_ptr=features,
        weight_ptr=weight,
        bias_ptr=bias,
        labels_ptr=labels,
        labels_b_ptr=labels_b,
        ratio_ptr=ratio,
        dfeatures_ptr=dfeatures,
        partials_ptr=partials,
        N=N,
        share=1.0 / N,
        smoothing=float(label_smoothing),
        C=C,
        K=K,
        GRADIENTS=gradients,
        BLOCK_N=BLOCK_N,
        BLOCK_K=block_k,
        BLOCK_C=BLOCK_C,
        num_warps=4 if block_k == 16 else 8,
        num_stages=1,
    )
    made = torch.empty(K * C + K, dtype=torch.float32, device=weight.device) if gradients else None
    begin = 0 if gradients else L - 2
    launch.launch(
        _linear_cross_entropy_merge_kernel,
        (triton.cdiv(L - begin, 64),),
        partials_ptr=partials,
        gradients_ptr=made,
        loss_ptr=loss,
        hits_ptr=hits,
        S=S,
        begin=begin,
        L=L,
        ROWS=min(64, triton.next_power_of_2(S)),
        BLOCK=64,
        num_warps=4,
        num_stages=1,
    )
    if made is None:
        return loss, hits, None, None, None
    return loss, hits, dfeatures, made[: K * C].view(K, C), made[K * C :]
