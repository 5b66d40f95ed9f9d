"""What a step leaves behind besides the weights (layer 1). Twin: ``reference.record_step``."""

import torch
from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops._checks import check_dense
from cifar_resnet_fast.ops._dispatch import choose


def record_step(
    metrics: Tensor,
    loss: Tensor,
    hits: Tensor,
    skipped: Tensor,
    step: Tensor,
    lr: Tensor,
    schedule: Tensor,
    *,
    implementation: str = "auto",
) -> None:
    """Write a step's metrics and the next step's number and learning rate; see
    ``reference.record_step``.

    Nothing is read back to the host, so a CUDA graph can capture it.

    Args:
        metrics: [3, E] float32, contiguous. written
        loss, hits: [] float32
        skipped: [] int32
        step: [] int64, at least 0. written
        lr: [] float32. written
        schedule: [S] float32, contiguous, S at least 1
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Raises:
        TypeError: a tensor is of another dtype
        ValueError: a shape or a device breaks its rule
        RuntimeError: the named implementation cannot run here
    """
    check_dense("metrics", metrics)
    check_dense("schedule", schedule)
    scalar = ()
    for name, tensor, shape, dtype in (
        ("metrics", metrics, (3, *metrics.shape[-1:]), torch.float32),
        ("loss", loss, scalar, torch.float32),
        ("hits", hits, scalar, torch.float32),
        ("skipped", skipped, scalar, torch.int32),
        ("step", step, scalar, torch.int64),
        ("lr", lr, scalar, torch.float32),
        ("schedule", schedule, (schedule.numel(),), torch.float32),
    ):
        check_dense(name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.numel() == 0:
            raise ValueError(
                f"{name} must be contiguous and not empty with shape {shape}, got shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()}"
            )
        if tensor.device != metrics.device:
            raise ValueError(
                f"{name} must be on the device of metrics, {metrics.device}, got {tensor.device}"
            )
    run = reference.record_step
    if choose(implementation, metrics.device, "record_step") == "triton":
        from cifar_resnet_fast.kernels.record_step import record_step as run
    run(metrics, loss, hits, skipped, step, lr, schedule)
