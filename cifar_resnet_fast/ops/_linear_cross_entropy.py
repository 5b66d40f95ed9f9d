"""The last layer and the loss as one operation (layer 1).

Twin: ``reference.linear_cross_entropy``.

The Triton kernels make the gradients together with the loss; the backward pass multiplies them by
the gradient that arrives, in one launch.
"""

import contextlib

import torch
from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._checks import (
    autocast_dtype,
    check_dense,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
    once_differentiable,
)
from cifar_resnet_fast.ops._dispatch import choose

MOST_CLASSES, MOST_FEATURES = 1024, 1024


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    labels_b: Tensor | None = None,
    ratio: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of a linear layer, and its hits; see ``reference.linear_cross_entropy``.

    The loss is differentiable, once, in features, weight and bias. The arithmetic is that of the
    dtype of ``features``, under ``torch.autocast``, too. Nothing is read back to the host, so a
    CUDA graph can capture it.

    ``triton`` takes float32, 2 .. 1024 classes and 1 .. 1024 features; ``auto`` leaves the rest to
    the reference. If a label is not that of a class, ``triton`` gives NaN for the loss, the
    reference raises.

    Args:
        features: [N, C] floating
        weight: [K, C], of features' dtype, K at least 2
        bias: [K], of features' dtype, or None
        labels: [N] int64, contiguous, in 0 .. K - 1
        label_smoothing: 0 .. 1
        labels_b: [N] int64, contiguous, or None. second labels, as in mixup
        ratio: [] float32, on the device, or None. weight of ``labels``; the second labels have the
            rest. given together with ``labels_b``
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Returns:
        loss: [], of features' dtype
        hits: [], of features' dtype. not differentiable

    Raises:
        TypeError: a tensor is of another dtype
        ValueError: a shape, a device or a number breaks its rule
        RuntimeError: the named implementation cannot run here
    """
    _check(features, weight, bias, labels, label_smoothing, labels_b, ratio)
    chosen = choose(
        implementation,
        features.device,
        "linear_cross_entropy",
        lambda name: _broken_rule(name, features, len(weight)),
    )
    if chosen == "triton":
        return _LinearCrossEntropy.apply(
            features, weight, bias, labels, labels_b, ratio, label_smoothing
        )
    plain: contextlib.AbstractContextManager = contextlib.nullcontext()
    if autocast_dtype(features.device) is not None:
        plain = torch.autocast(features.device.type, enabled=False)
    with plain:
        return reference.linear_cross_entropy(
            features,
            weight,
            bias,
            labels,
            label_smoothing=label_smoothing,
            labels_b=labels_b,
            ratio=ratio,
        )


def _check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    labels_b: Tensor | None,
    ratio: Tensor | None,
) -> None:
    """The rules of every implementation."""
    check_tensor("features", features, "N C")
    N, C = features.shape
    check_tensor("weight", weight, "K C", like=features)
    check_dtype("weight", weight, features.dtype)
    K = len(weight)
    check_shape("weight", weight, (K, C))
    if K < 2:
        raise ValueError(f"weight must have at least 2 classes, got {K}")
    if bias is not None:
        check_tensor("bias", bias, "K", like=features)
        check_dtype("bias", bias, features.dtype)
        check_shape("bias", bias, (K,))
    if (labels_b is None) != (ratio is None):
        given = "labels_b" if ratio is None else "ratio"
        raise ValueError(f"labels_b and ratio must be given together, got {given} alone")
    rules: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]]
    rules = [("labels", labels, (N,), torch.int64)]
    if labels_b is not None and ratio is not None:
        rules += [("labels_b", labels_b, (N,), torch.int64), ("ratio", ratio, (), torch.float32)]
    for name, tensor, shape, dtype in rules:
        check_dense(name, tensor)
        check_dtype(name, tensor, dtype)
        check_shape(name, tensor, shape)
        if tensor.device != features.device:
            raise ValueError(
                f"{name} must be on the device of features, {features.device}, got {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0 .. 1, got {label_smoothing}")


def _broken_rule(implementation: str, features: Tensor, K: int) -> Exception | None:
    """The first rule of an implementation that the arguments break."""
    if implementation != "triton":
        return None
    if features.dtype != torch.float32:
        return TypeError(
            f"features must be torch.float32 for implementation 'triton', got {features.dtype}"
        )
    if K > MOST_CLASSES:
        return ValueError(
            f"weight must have at most {MOST_CLASSES} classes for implementation 'triton', got {K}"
        )
    if features.shape[1] > MOST_FEATURES or features.numel() >= 2**31:
        return ValueError(
            f"features must have at most {MOST_FEATURES} columns and fewer than 2**31 elements "
            f"for implementation 'triton', got shape {tuple(features.shape)}"
        )
    return None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, labels, labels_b, ratio, label_smoothing):
        # triton is imported only if it is used
        from cifar_resnet_fast.kernels.linear_cross_entropy import linear_cross_entropy

        loss, hits, *gradients = linear_cross_entropy(
            features.contiguous(),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            labels,
            labels_b,
            ratio,
            label_smoothing=label_smoothing,
            gradients=any(ctx.needs_input_grad),
        )
        ctx.mark_non_differentiable(hits)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*gradients)
        return loss, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        dfeatures, dweight, dbias = torch._foreach_mul(list(ctx.saved_tensors), dloss)
        wanted = ctx.needs_input_grad
        return (
            dfeatures if wanted[0] else None,
            dweight if wanted[1] else None,
            dbias if wanted[2] else None,
            None,  # labels
            None,  # labels_b
            None,  # ratio
            None,  # label_smoothing
        )
