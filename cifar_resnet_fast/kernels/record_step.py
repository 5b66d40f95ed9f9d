"""A step's metrics and the next step's learning rate in Triton, one launch (layer 0).

Twin: ``reference.record_step``.
"""

import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch


@triton.jit
def _record_step_kernel(
    metrics_ptr,
    loss_ptr,
    hits_ptr,
    skipped_ptr,
    step_ptr,
    lr_ptr,
    schedule_ptr,
    columns,
    steps,
):
    """One program owns everything."""
    step = tl.load(step_ptr)
    column = metrics_ptr + step % columns
    following = step + 1
    tl.debug_barrier()  # all threads have loaded the step, and one stores it
    tl.store(column, tl.load(loss_ptr))
    tl.store(column + columns, tl.load(hits_ptr))
    tl.store(column + 2 * columns, tl.load(skipped_ptr).to(tl.float32))
    tl.store(lr_ptr, tl.load(schedule_ptr + tl.minimum(following, steps - 1)))
    tl.store(step_ptr, following)


def record_step(
    metrics: Tensor,
    loss: Tensor,
    hits: Tensor,
    skipped: Tensor,
    step: Tensor,
    lr: Tensor,
    schedule: Tensor,
) -> None:
    """See ``reference.record_step``; all tensors contiguous on one device."""
    launch.launch(
        _record_step_kernel,
        (1,),
        metrics_ptr=metrics,
        loss_ptr=loss,
        hits_ptr=hits,
        skipped_ptr=skipped,
        step_ptr=step,
        lr_ptr=lr,
        schedule_ptr=schedule,
        columns=metrics.shape[1],
        steps=len(schedule),
        num_warps=1,
    )
