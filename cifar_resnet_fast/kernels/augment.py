"""A batch out of the bytes of a data set, in one Triton kernel: gather, crop, flip, normalise, cut
out (layer 0).

Twin: ``reference.load_batch``, which says what the draws are.

Normalising is a look-up: a byte has 256 values, and the table of what each becomes was made by
the reference, so the result has its bits whatever a compiler does to arithmetic. A pixel is
written as 4 channels, the fourth zero, so that it is one store of 8 bytes and the first
convolution may load it as one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch

CHANNELS = 4  # of a written pixel


@triton.jit
def _image(
    images_ptr,
    labels_ptr,
    values_ptr,
    draws_ptr,
    row,
    rows,
    H,
    W,
    padding,
    cutout,
    CUTOUT: tl.constexpr,
    REFLECT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """[BLOCK_P, 4] value[p, c] = values[images[index, h + dy - padding, w' + dx - padding, c], c]
    of the image that ``row`` of the draws names, reflected at its border if REFLECT; and its
    label."""
    index = tl.load(draws_ptr + row).to(tl.int64)
    dy = tl.load(draws_ptr + rows + row)
    dx = tl.load(draws_ptr + 2 * rows + row)
    flip = tl.load(draws_ptr + 3 * rows + row)
    present = index >= 0
    label = tl.load(labels_ptr + index, mask=present, other=-1)

    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.arange(0, 4)
    h = offs_p // W
    w = offs_p % W
    from_h = h + dy - padding
    from_w = tl.where(flip != 0, W - 1 - w, w) + dx - padding
    if REFLECT:
        from_h = H - 1 - tl.abs(H - 1 - tl.abs(from_h))
        from_w = W - 1 - tl.abs(W - 1 - tl.abs(from_w))
    inside_p = present & (h < H) & (from_h >= 0) & (from_h < H) & (from_w >= 0) & (from_w < W)
    inside_pc = inside_p[:, None] & (offs_c < 3)[None, :]
    offs_pc = (from_h * W + from_w)[:, None] * 3 + offs_c[None, :]
    byte = tl.load(images_ptr + index * (H * W * 3) + offs_pc, mask=inside_pc, other=0)
    # outside the picture is black, byte 0, not zero; only the fourth channel and a cut are
    filled_pc = (offs_p >= 0)[:, None] & (offs_c < 3)[None, :]
    if CUTOUT:
        top = tl.load(draws_ptr + 4 * rows + row) - cutout // 2
        left = tl.load(draws_ptr + 5 * rows + row) - cutout // 2
        cut_p = (h >= top) & (h < top + cutout) & (w >= left) & (w < left + cutout)
        filled_pc = filled_pc & (cut_p == 0)[:, None]
    offs_value = byte.to(tl.int32) * 3 + offs_c[None, :]
    value = tl.load(values_ptr + offs_value, mask=filled_pc, other=0.0)
    return value, label


@triton.jit
def _load_batch_kernel(
    images_ptr,
    labels_ptr,
    values_ptr,
    draws_ptr,
    step_ptr,
    mix_ptr,
    batch_ptr,
    batch_labels_ptr,
    ratio_ptr,
    steps,
    rows,
    H,
    W,
    padding,
    cutout,
    CUTOUT: tl.constexpr,
    REFLECT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """batch[n] = image, or weight * image + (1 - weight) * partner outside and partner inside the
    step's box; program n owns image n of the batch and its label or two, program 0 the ratio."""
    n = tl.program_id(0)
    place = (tl.load(step_ptr) % steps).to(tl.int32)
    row = place * tl.num_programs(0) + n
    value, label = _image(
        images_ptr,
        labels_ptr,
        values_ptr,
        draws_ptr,
        row,
        rows,
        H,
        W,
        padding,
        cutout,
        CUTOUT,
        REFLECT,
        BLOCK_P,
    )
    tl.store(batch_labels_ptr + n, label)
    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.arange(0, 4)
    h = offs_p // W
    w = offs_p % W
    if mix_ptr is not None:
        partner, label_b = _image(
            images_ptr,
            labels_ptr,
            values_ptr,
            draws_ptr + 6 * rows,
            row,
            rows,
            H,
            W,
            padding,
            cutout,
            CUTOUT,
            REFLECT,
            BLOCK_P,
        )
        tl.store(batch_labels_ptr + tl.num_programs(0) + n, label_b)
        if n == 0:
            tl.store(ratio_ptr, tl.load(mix_ptr + 5 * steps + place))
        weight = tl.load(mix_ptr + place)
        top = tl.load(mix_ptr + steps + place)
        bottom = tl.load(mix_ptr + 2 * steps + place)
        left = tl.load(mix_ptr + 3 * steps + place)
        right = tl.load(mix_ptr + 4 * steps + place)
        # launched without fusion into multiply-adds, which would give other bits than the twin's
        blended = weight * value.to(tl.float32) + (1 - weight) * partner.to(tl.float32)
        inside_p = (h >= top) & (h < bottom) & (w >= left) & (w < right)
        value = tl.where(inside_p[:, None], partner, blended.to(partner.dtype))
    out = batch_ptr + n.to(tl.int64) * (H * W * 4) + offs_p[:, None] * 4 + offs_c[None, :]
    tl.store(out, value, mask=(h < H)[:, None])


def load_batch(
    images: Tensor,
    labels: Tensor,
    values: Tensor,
    draws: Tensor,
    step: Tensor,
    *,
    batch_size: int,
    padding: int,
    padding_mode: str,
    cutout: int,
    mix: Tensor | None,
) -> tuple[Tensor, ...]:
    """See ``reference.load_batch``; the pictures are the first 3 channels of 4."""
    _, H, W, _ = images.shape
    rows = draws.shape[1]
    batch = torch.empty(
        (batch_size, CHANNELS, H, W),
        dtype=values.dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    sets = 1 if mix is None else 2
    batch_labels = torch.empty((sets, batch_size), dtype=torch.int64, device=images.device)
    ratio = None if mix is None else torch.empty((), device=images.device)
    launch.launch(
        _load_batch_kernel,
        (batch_size,),
        images_ptr=images,
        labels_ptr=labels,
        values_ptr=values,
        draws_ptr=draws,
        step_ptr=step,
        mix_ptr=mix,
        batch_ptr=batch,
        batch_labels_ptr=batch_labels,
        ratio_ptr=ratio,
        steps=rows // batch_size,
        rows=rows,
        H=H,
        W=W,
        padding=padding,
        cutout=cutout,
        CUTOUT=cutout > 0,
        REFLECT=padding_mode == "reflect",
        BLOCK_P=triton.next_power_of_2(H * W),
        num_warps=4,
        enable_fp_fusion=False,
    )
    if mix is None:
        return batch[:, :3], batch_labels[0]
    return batch[:, :3], *batch_labels, ratio
