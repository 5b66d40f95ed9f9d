"""The trunk's kernels as one autograd function, and for torch.compile (layer 1).

Saved for the backward, of the activations: x, y1 and y2 of every block, y of the first
convolution, the pictures and the mask of the last ReLU. On 32x32 pictures in 16 bits, with n
blocks a stage, these are 168 n + 65 KiB a picture with ``cuda``: 33 MiB for ResNet-1202.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from cifar_resnet_fast.ops._checks import once_differentiable
from cifar_resnet_fast.ops._saved import save, saved
from cifar_resnet_fast.ops._shortcut_a.cuda import empty_channels_last
from cifar_resnet_fast.ops._trunk import cuda as trunk_cuda
from cifar_resnet_fast.ops._trunk import schedule
from cifar_resnet_fast.ops._trunk.schedule import Kept
from cifar_resnet_fast.reference import Unit


def kernels_of(implementation: str) -> ModuleType:
    """The module with an implementation's kernels; triton is imported only if it is used."""
    if implementation == "cuda":
        return trunk_cuda
    from cifar_resnet_fast.ops._trunk import triton as trunk_triton

    return trunk_triton


def trunk(
    implementation: str,
    pictures: Tensor,
    units: Sequence[Unit],
    dtype: torch.dtype,
    training: bool,
    wants_grad: bool,
    places: list[Tensor | None] | None,
) -> Tensor:
    """``reference.trunk`` on the kernels of ``implementation``; see ``ops.trunk``.

    Args:
        dtype: of the activations
        wants_grad: whether a unit's parameters are to have gradients
        places: of each unit, where the gradient of the weight goes; None for a new tensor
        all others: as ``ops.trunk``, checked
    """
    pictures = kernels_of(implementation).pictures_for_kernels(pictures, dtype)
    *columns, momenta, eps = (list(column) for column in zip(*units, strict=True))
    if training and wants_grad:
        tensors = [tensor for column in columns for tensor in column]
        return _Trunk.apply(implementation, pictures, momenta, eps, places, *tensors)
    columns = [[tensor.detach() for tensor in column] for column in columns]
    compiling = torch.compiler.is_compiling()
    if training:
        train: Callable[..., list[Tensor]] = _compiled_fwd if compiling else trunk_fwd
        return train(implementation, pictures, *columns, momenta, eps, False)[0]
    evaluate: Callable[..., Tensor] = _eval_op if compiling else trunk_eval
    return evaluate(implementation, pictures, *columns, eps)


# Functions of plain lists, as torch.library takes them: one list for each field of Unit.


def _units(*columns: Sequence) -> list[Unit]:
    return [Unit(*fields) for fields in zip(*columns, strict=True)]


def trunk_fwd(
    implementation: str,
    pictures: Tensor,
    weights: list[Tensor],
    bn_weights: list[Tensor],
    bn_biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    momenta: list[float],
    eps: list[float],
    keep: bool,
) -> list[Tensor]:
    """The pooled activation and, where ``keep``, all of ``Kept``; updates the running values."""
    units = _units(weights, bn_weights, bn_biases, running_means, running_vars, momenta, eps)
    kernels = kernels_of(implementation).Kernels(units, pictures)
    pooled, kept = schedule.forward(kernels, pictures, len(units), keep)
    return [pooled, *kept.flat()] if keep else [pooled]


def trunk_bwd(
    implementation: str,
    dpooled: Tensor,
    pictures: Tensor,
    kept: list[Tensor],
    weights: list[Tensor],
    bn_weights: list[Tensor],
    places: list[Tensor | None] | None = None,
) -> list[Tensor]:
    """Gradients of all weights, in their ``places``, then of all bn_weights, then of all
    bn_biases."""
    nothing = [None] * len(weights)  # the backward pass reads no more of a unit
    units = _units(weights, bn_weights, *[nothing] * 5)
    tensors = Kept.of(kept, len(units))
    kernels = kernels_of(implementation).Kernels(units, pictures, tensors, places)
    schedule.backward(kernels, dpooled, pictures, tensors)
    return [gradient for column in zip(*kernels.gradients, strict=True) for gradient in column]


def trunk_eval(
    implementation: str,
    pictures: Tensor,
    weights: list[Tensor],
    bn_weights: list[Tensor],
    bn_biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    eps: list[float],
) -> Tensor:
    """The pooled activation with the running statistics."""
    nothing = [None] * len(weights)
    units = _units(weights, bn_weights, bn_biases, running_means, running_vars, nothing, eps)
    return kernels_of(implementation).evaluate(units, pictures)


# torch.compile sees these as opaque operations; called plainly they would cost more host time.
# One that updates a list and gives a list cannot be, so the first works on copies.


@torch.library.custom_op("cifar_resnet_fast::trunk_fwd", mutates_args=())
def _forward_op(
    implementation: str,
    pictures: Tensor,
    weights: list[Tensor],
    bn_weights: list[Tensor],
    bn_biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    momenta: list[float],
    eps: list[float],
    keep: bool,
) -> list[Tensor]:
    means, variances = (
        [tensor.clone() for tensor in column] for column in (running_means, running_vars)
    )
    columns = (weights, bn_weights, bn_biases, means, variances, momenta, eps)
    return [*means, *variances, *trunk_fwd(implementation, pictures, *columns, keep)]


def _compiled_fwd(implementation, pictures, *columns_and_keep) -> list[Tensor]:
    """``trunk_fwd`` for torch.compile."""
    _, _, _, running_means, running_vars, *_ = columns_and_keep
    running = [*running_means, *running_vars]
    made = _forward_op(implementation, pictures, *columns_and_keep)
    torch._foreach_copy_(running, made[: len(running)])
    return made[len(running) :]


@torch.library.custom_op("cifar_resnet_fast::trunk_bwd", mutates_args=())
def _backward_op(
    implementation: str,
    dpooled: Tensor,
    pictures: Tensor,
    kept: list[Tensor],
    weights: list[Tensor],
    bn_weights: list[Tensor],
) -> list[Tensor]:
    return trunk_bwd(implementation, dpooled, pictures, kept, weights, bn_weights)


_eval_op = torch.library.custom_op("cifar_resnet_fast::trunk_eval", trunk_eval, mutates_args=())


@_forward_op.register_fake
def _(implementation, pictures, weights, bn_weights, bn_biases, means, variances, *rest):
    running = [torch.empty_like(tensor) for tensor in (*means, *variances)]
    return [*running, *fake_trunk_fwd(implementation, pictures, weights, keep=rest[-1])]


def fake_trunk_fwd(
    implementation: str, pictures: Tensor, weights: list[Tensor], keep: bool
) -> list[Tensor]:
    """Tensors like those of ``trunk_fwd``, which nobody has written."""
    shapes = schedule.shapes_of_y(pictures, weights)
    pooled = pictures.new_empty(shapes[-1][:2], dtype=torch.float32)
    if not keep:
        return [pooled]
    y = [empty_channels_last(shape, pictures) for shape in shapes]
    norm = [pictures.new_empty((4, K), dtype=torch.float32) for _, K, _, _ in shapes]
    x = [torch.empty_like(before) for before in y[:-1:2]]  # what a block's input is made from
    mask, packed = kernels_of(implementation).like_mask_and_weights(y[-1], weights)
    return [pooled, *Kept(mask, y, norm, x, packed).flat()]


@_backward_op.register_fake
def _(implementation, dpooled, pictures, kept, weights, bn_weights):
    vectors = [torch.empty_like(bn_weight) for bn_weight in bn_weights]
    return [torch.empty_like(w) for w in weights] + vectors + [v.clone() for v in vectors]


@_eval_op.register_fake
def _(implementation, pictures, weights, *_):
    return pictures.new_empty((len(pictures), len(weights[-1])), dtype=torch.float32)


class _Trunk(torch.autograd.Function):
    """Differentiable in weight, bn_weight and bn_bias of every unit, once."""

    @staticmethod
    def forward(ctx, implementation, pictures, momenta, eps, places, *tensors):
        count = len(momenta)
        columns = [list(tensors[i : i + count]) for i in range(0, len(tensors), count)]
        weights, bn_weights, bn_biases, means, variances = columns
        run = _compiled_fwd if torch.compiler.is_compiling() else trunk_fwd
        pooled, *kept = run(
            implementation,
            pictures,
            weights,
            bn_weights,
            bn_biases,
            means,
            variances,
            momenta,
            eps,
            True,
        )
        ctx.implementation, ctx.count, ctx.places = implementation, count, places
        save(ctx, pictures, *weights, *bn_weights, *kept)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, dpooled):
        count = ctx.count
        pictures, *rest = saved(ctx)
        weights, bn_weights, kept = rest[:count], rest[count : 2 * count], rest[2 * count :]
        arguments = (ctx.implementation, dpooled, pictures, kept, weights, bn_weights)
        if torch.compiler.is_compiling():
            gradients = _backward_op(*arguments)
        else:
            gradients = trunk_bwd(*arguments, ctx.places)
        return (
            None,  # implementation
            None,  # pictures
            None,  # momenta
            None,  # eps
            None,  # places
            *gradients,  # weights, bn_weights, bn_biases
            *[None] * (2 * count),  # running_means, running_vars
        )
