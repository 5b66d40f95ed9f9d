"""Every operation of the package in plain PyTorch: the specification (layer 0).

Each function has the name and the arguments of its twin in ``ops``. The fused kernels are tested
against these functions, which also run if no kernel can. They take any device, floating dtype and
memory layout; their gradients come from PyTorch's own autograd.

=======  =======================================================================
N H W C  batch, height, width, channels of the input
K        output channels
y        output of the convolution, before normalisation ("raw")
z        output of batch normalisation and shortcut, before the ReLU
=======  =======================================================================
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    stride: int = 1,
    shortcut: Tensor | None = None,
    relu: bool = True,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """3x3 convolution with zero padding 1, batch normalisation, optional shortcut, ReLU.

    Args:
        x: [N, C, H, W]. input activation
        weight: [K, C, 3, 3]. convolution weight; taken in x's dtype
        bn_weight, bn_bias: [K]. scale and offset of the normalisation
        running_mean, running_var: [K]. updated in place when ``training``
        stride: 1 or 2
        shortcut: [N, K, ceil(H / stride), ceil(W / stride)] or None. added before the ReLU
        relu: False leaves the ReLU out
        training: True normalises with the batch's statistics, False with the running ones
        momentum: weight of the batch in the running statistics
        eps: added to the variance

    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)]

    Source: Ioffe and Szegedy 2015, algorithm 1; He et al. 2015, figure 2.
    """
    y = F.conv2d(x, weight.to(x.dtype), stride=stride, padding=1)
    z = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if shortcut is not None:
        z = z + shortcut
    return F.relu(z) if relu else z


def shortcut_a(x: Tensor, out_channels: int, stride: int = 2) -> Tensor:
    """Option-A shortcut: every ``stride``-th pixel, new channels zero, half of them in front.

    Args:
        x: [N, C, H, W]
        out_channels: K >= C, with K - C even
        stride: 1 or 2

    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], in the memory format of ``x``

    Source: He et al. 2015, section 4.2, option (A).
    """
    new = (out_channels - x.shape[1]) // 2
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, new, new))


class Unit(NamedTuple):
    """A 3x3 convolution and its batch normalisation; arguments as in ``conv_bn_relu``."""

    weight: Tensor
    bn_weight: Tensor
    bn_bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


def trunk(pictures: Tensor, units: Sequence[Unit], *, training: bool) -> Tensor:
    """The whole network before its last layer: first convolution, residual blocks, average pool.

    Args:
        pictures: [N, 3, H, W]
        units: the first convolution, then two for each block. The first one of a block has stride
            2 if it has more output channels than input channels
        training: True normalises with the batch's statistics, False with the running ones

    Returns:
        [N, K], with K the last unit's channels; float32, or float64 if pictures is

    Source: He et al. 2015, section 4.2.
    """

    def apply(x: Tensor, unit: Unit, stride: int = 1, shortcut: Tensor | None = None) -> Tensor:
        return conv_bn_relu(
            x,
            *unit[:5],
            stride=stride,
            shortcut=shortcut,
            training=training,
            momentum=unit.momentum,
            eps=unit.eps,
        )

    x = apply(pictures, units[0])
    for first, second in zip(units[1::2], units[2::2], strict=True):
        K, C = first.weight.shape[:2]
        stride = 1 if K == C else 2
        shortcut = x if K == C else shortcut_a(x, K, stride)
        x = apply(apply(x, first, stride), second, 1, shortcut)
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    labels_b: Tensor | None = None,
    ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The last layer and the loss: mean cross entropy of ``features @ weight.T + bias``.

    Args:
        features: [N, C]
        weight: [K, C]
        bias: [K] or None
        labels: [N] int64, in 0 .. K - 1
        label_smoothing: the target is 1 minus it at the label, plus it divided by K everywhere
        labels_b: [N] int64 or None. second labels, as in mixup
        ratio: [] or None. with ``labels_b``, loss and hits are ``ratio`` times those of ``labels``
            plus ``1 - ratio`` times those of ``labels_b``

    Returns:
        loss: [], of features' dtype
        hits: [], of features' dtype. number of rows whose label has the largest logit

    Source: Szegedy et al. 2016, section 7 (label smoothing); Zhang et al. 2018 (mixup).
    """
    logits = F.linear(features, weight, bias)
    largest = logits.detach().argmax(1)

    def score(labels: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return loss, (largest == labels).sum().to(loss.dtype)

    loss, hits = score(labels)
    if labels_b is None or ratio is None:
        return loss, hits
    loss_b, hits_b = score(labels_b)
    return ratio * loss + (1 - ratio) * loss_b, ratio * hits + (1 - ratio) * hits_b


def augment(
    images: Tensor,
    dy: Tensor,
    dx: Tensor,
    flip: Tensor,
    padding: int,
    padding_mode: str = "zeros",
) -> Tensor:
    """Random crop of a padded image, then horizontal flip, with given draws.

    Output pixel (h, w) is input pixel (h + dy - padding, w' + dx - padding), with w' = w, or
    W - 1 - w if the image is flipped. Outside the image it is 0, or with ``reflect`` the image
    mirrored at its border pixel.

    Args:
        images: [N, H, W, C] uint8
        dy, dx: [N] integers in 0 .. 2 * padding. the crop's corner in the padded image
        flip: [N] bool
        padding: pixels on each side
        padding_mode: ``zeros`` or ``reflect``, as torch.nn.functional.pad has it

    Returns:
        [N, H, W, C] uint8

    Source: He et al. 2015, section 4.2; the order is torchvision's RandomCrop, then flip.
    """
    N, H, W, _ = images.shape
    if padding_mode == "reflect":
        # PyTorch does not reflect bytes
        planes = images.permute(0, 3, 1, 2).float()
        padded = F.pad(planes, (padding,) * 4, mode="reflect").permute(0, 2, 3, 1).byte()
    else:
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    columns = torch.arange(W, device=images.device)
    columns = torch.where(flip[:, None], W - 1 - columns, columns)
    rows = torch.arange(H, device=images.device) + dy[:, None]
    columns = columns + dx[:, None]
    n = torch.arange(N, device=images.device)
    return padded[n[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalize(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes to normalised activations: ``(image / 255 - mean) / std``, computed in float32.

    Args:
        images: [N, H, W, C] uint8
        mean, std: [C] float32, for images in 0 .. 1
        dtype: the dtype of the result

    Returns:
        [N, C, H, W], channels-last
    """
    scaled = images.float() * (1 / (255 * std)) - mean / std
    return scaled.to(dtype).permute(0, 3, 1, 2)


def load_batch(
    images: Tensor,
    labels: Tensor,
    values: Tensor,
    draws: Tensor,
    step: Tensor,
    *,
    batch_size: int,
    padding: int,
    padding_mode: str = "zeros",
    cutout: int = 0,
    mix: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The batch of a step: gathered, cropped, flipped, normalised, with a square cut out.

    With ``mix``, each image is then mixed with a partner that was made in the same way: outside a
    box the result is ``weight * image + (1 - weight) * partner``, computed in float32, and inside
    the box it is the partner.

    Image n of the batch has row ``step % (R / batch_size) * batch_size + n`` of the draws.

    Args:
        images: [N, H, W, 3] uint8
        labels: [N] int64
        values: [256, 3], the dtype of the result. the activation of each byte, see ``normalize``
        draws: [6, R] int32, R a multiple of batch_size. index of the image, or -1 for a black
            one with label -1; dy, dx, flip as ``augment`` has them; cy, cx, centre of the square
        step: [] int64. number of the batch; on the device, so that the host never waits for it
        batch_size: B
        padding, padding_mode: around the image before the crop, as ``augment`` has them
        cutout: side of a square, cut off at the image's border, that is zero in the result; or 0
        mix: [6, R / batch_size] float32 or None. of each step: weight; top, bottom, left and right
            of the box, the second and the fourth exclusive; share of the first labels in the
            loss. the draws are then [12, R], with those of the partners in the last six rows

    Returns:
        images: [B, 3, H, W], channels-last
        labels: [B] int64
        labels_b: [B] int64, with ``mix`` only. labels of the partners
        ratio: [] float32, with ``mix`` only. share of the first labels

    Source: He et al. 2015, section 4.2; DeVries and Taylor 2017 (cutout); Zhang et al. 2018
    (mixup); Yun et al. 2019 (cutmix).
    """
    if mix is not None:
        own, partner = (
            load_batch(
                images,
                labels,
                values,
                part,
                step,
                batch_size=batch_size,
                padding=padding,
                padding_mode=padding_mode,
                cutout=cutout,
            )
            for part in (draws[:6], draws[6:])
        )
        weight, top, bottom, left, right, ratio = mix.index_select(
            1, (step % mix.shape[1]).reshape(1)
        )[:, 0]
        blended = weight * own[0].float() + (1 - weight) * partner[0].float()
        h = torch.arange(images.shape[1], device=images.device)[:, None]
        w = torch.arange(images.shape[2], device=images.device)
        inside = (h >= top) & (h < bottom) & (w >= left) & (w < right)
        mixed = torch.where(inside, partner[0], blended.to(values.dtype))
        return mixed, own[1], partner[1], ratio
    _, H, W, C = images.shape
    device = images.device
    rows = step % (draws.shape[1] // batch_size) * batch_size
    index, dy, dx, flip, cy, cx = draws[:, rows + torch.arange(batch_size, device=device)].long()
    present = index >= 0
    gathered = images[index] * present[:, None, None, None]
    crops = augment(gathered, dy, dx, flip.bool(), padding, padding_mode)
    batch = values[crops.long(), torch.arange(C, device=device)]
    if cutout:
        below_top = torch.arange(H, device=device) - (cy[:, None] - cutout // 2)
        right_of_left = torch.arange(W, device=device) - (cx[:, None] - cutout // 2)
        cut_h = (below_top >= 0) & (below_top < cutout)
        cut_w = (right_of_left >= 0) & (right_of_left < cutout)
        batch = batch.masked_fill((cut_h[:, :, None] & cut_w[:, None, :])[..., None], 0)
    return batch.permute(0, 3, 1, 2), labels[index].masked_fill(~present, -1)


def record_step(
    metrics: Tensor,
    loss: Tensor,
    hits: Tensor,
    skipped: Tensor,
    step: Tensor,
    lr: Tensor,
    schedule: Tensor,
) -> None:
    """Record the metrics of a step, and set the number and the learning rate of the next one.

    Args:
        metrics: [3, E] float32. column ``step % E`` becomes loss, hits, skipped
        loss, hits: [] float32
        skipped: [] int32
        step: [] int64. incremented
        lr: [] float32. becomes the schedule's value for the new ``step``; after the last step it
            keeps the last value
        schedule: [S] float32
    """
    here = step.reshape(1)
    column = torch.stack((loss, hits, skipped.to(loss.dtype)))
    metrics.index_copy_(1, here % metrics.shape[1], column[:, None])
    step += 1
    lr.copy_(schedule.index_select(0, step.reshape(1).clamp(max=len(schedule) - 1))[0])


def sgd(
    parameters: Tensor,
    gradients: Tensor,
    momenta: Tensor,
    lr: Tensor,
    loss_scale: Tensor,
    skipped: Tensor,
    *,
    decayed: int,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scaled: int = 0,
    lr_factor: float = 1.0,
) -> None:
    """One step of SGD in place, or none if a gradient is infinite or NaN.

    With g the gradient, divided by the loss scale, plus weight_decay * parameter for the first
    ``decayed`` elements:
    ``momenta = momentum * momenta + g``; ``parameters -= lr * momenta``, or with ``nesterov``
    ``parameters -= lr * (g + momentum * momenta)``. The last ``scaled`` elements have
    ``lr * lr_factor`` instead of lr and ``weight_decay / lr_factor`` instead of weight_decay, so
    that the decay alone shrinks them as fast as without the factor. The operations are those of
    torch.optim.SGD one by one, so on a CPU the results are bitwise the same.

    Args:
        parameters, gradients, momenta: [P] float32
        lr, loss_scale: [] float32
        skipped: [] int32. incremented if the step is left out
        decayed: 0 .. P
        momentum, weight_decay, nesterov: as torch.optim.SGD has them
        scaled: 0 .. P
        lr_factor: more than 0

    Source: Sutskever et al. 2013, section 2; the form without lr in the momenta is PyTorch's.
    Jordan 2024, section 3.4 (lr_factor, for the biases of normalisations).
    """
    finite = gradients.isfinite().all()
    direction = gradients * loss_scale.reciprocal()
    plain = len(parameters) - scaled
    for part, decay in (
        (slice(min(decayed, plain)), weight_decay),
        (slice(plain, max(decayed, plain)), weight_decay / lr_factor),
    ):
        direction[part].add_(parameters[part], alpha=decay)
    average = (momenta * momentum).add_(direction)
    direction = direction.add_(average, alpha=momentum) if nesterov else average
    rates = torch.cat((lr.expand(plain), (lr * lr_factor).expand(scaled)))
    # float64 gives one rounding in all, like the fused multiply-add of torch.optim.SGD
    moved = (parameters.double() - rates.double() * direction.double()).float()
    parameters.copy_(torch.where(finite, moved, parameters))
    momenta.copy_(torch.where(finite, average, momenta))
    skipped += ~finite


def muon(
    parameter: Tensor,
    gradient: Tensor,
    momenta: Tensor,
    lr: float,
    *,
    momentum: float,
    nesterov: bool,
    iterations: int = 3,
) -> None:
    """One step of Muon in place, for the weight of a convolution that a normalisation follows.

    Args:
        parameter, gradient, momenta: [K, C, 3, 3], K <= 9 C, of one floating dtype
        lr: learning rate of Muon
        momentum, nesterov: as torch.optim.SGD has them
        iterations: number of Newton-Schulz iterations

    Source: Jordan et al. 2024, as in cifar10-airbench's airbench94_muon.py.
    """
    momenta.mul_(momentum).add_(gradient)
    direction = gradient + momentum * momenta if nesterov else momenta
    x = direction.reshape(len(direction), -1)
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
    parameter.sub_(lr * x.reshape(parameter.shape))
