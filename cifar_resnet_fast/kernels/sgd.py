"""SGD over flat buffers in Triton: a check for finite gradients, then one update (layer 0).

Twin: ``reference.sgd``, which has the formulas.

The check and the update are two launches, because no element may change before all have been
seen: the check leaves one flag a program, and each program of the update reads all the flags. No
atomics, so a run is bitwise reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cifar_resnet_fast.kernels import launch

BLOCK = 1024  # elements: two loads of 16 bytes a thread and buffer
FLAGS = 128  # most programs of the check, about one a multiprocessor; a power of two


@triton.jit
def _sgd_check_kernel(gradients_ptr, flags_ptr, elements, BLOCK: tl.constexpr):
    """flags[i] = 1 if a gradient of program i's is infinite or NaN, else 0; program i of S owns
    blocks i, i + S, ..."""
    bad = tl.zeros([BLOCK], tl.int32)
    for block in tl.range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        gradient = tl.load(gradients_ptr + offs, mask=offs < elements, other=0.0)
        # false for NaN, too
        bad |= tl.where(tl.abs(gradient) < float("inf"), 0, 1)
    tl.store(flags_ptr + tl.program_id(0), tl.max(bad, 0))


@triton.jit
def _sgd_kernel(
    parameters_ptr,
    gradients_ptr,
    momenta_ptr,
    flags_ptr,
    lr_ptr,
    loss_scale_ptr,
    skipped_ptr,
    elements,
    decayed,
    checked,
    plain,
    momentum,
    weight_decay,
    scaled_decay,
    lr_factor,
    NESTEROV: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of SGD, or none where one of the ``checked`` flags is set; program i owns BLOCK
    elements, program 0 the count of skipped steps. The elements from ``plain`` on have
    ``lr_factor`` times the learning rate, and ``scaled_decay``."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    offs_flag = tl.arange(0, FLAGS)
    bad = tl.max(tl.load(flags_ptr + offs_flag, mask=offs_flag < checked, other=0), 0)
    if tl.program_id(0) == 0:
        skipped = tl.load(skipped_ptr) + bad
        tl.debug_barrier()  # all threads have loaded it, and one stores it
        tl.store(skipped_ptr, skipped)
    if bad == 0:
        parameter = tl.load(parameters_ptr + offs, mask=mask, other=0.0)
        gradient = tl.load(gradients_ptr + offs, mask=mask, other=0.0)
        direction = gradient * tl.div_rn(1.0, tl.load(loss_scale_ptr))
        decay = tl.where(offs < plain, weight_decay, scaled_decay)
        direction += tl.where(offs < decayed, decay, 0.0) * parameter
        average = momentum * tl.load(momenta_ptr + offs, mask=mask, other=0.0) + direction
        tl.store(momenta_ptr + offs, average, mask=mask)
        if NESTEROV:
            direction += momentum * average
        else:
            direction = average
        parameter -= tl.load(lr_ptr) * tl.where(offs < plain, 1.0, lr_factor) * direction
        tl.store(parameters_ptr + offs, parameter, mask=mask)


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
    scaled: int,
    lr_factor: float,
) -> None:
    """See ``reference.sgd``; all tensors on one device."""
    elements = parameters.numel()
    blocks = triton.cdiv(elements, BLOCK)
    checked = min(blocks, FLAGS)
    flags = torch.empty(FLAGS, dtype=torch.int32, device=parameters.device)
    launch.launch(
        _sgd_check_kernel,
        (checked,),
        gradients_ptr=gradients,
        flags_ptr=flags,
        elements=elements,
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=1,
    )
    launch.launch(
        _sgd_kernel,
        (blocks,),
        parameters_ptr=parameters,
        gradients_ptr=gradients,
        momenta_ptr=momenta,
        flags_ptr=flags,
        lr_ptr=lr,
        loss_scale_ptr=loss_scale,
        skipped_ptr=skipped,
        elements=elements,
        decayed=decayed,
        checked=checked,
        plain=elements - scaled,
        momentum=float(momentum),
        weight_decay=float(weight_decay),
        scaled_decay=float(weight_decay / lr_factor),
        lr_factor=float(lr_factor),
        NESTEROV=nesterov,
        FLAGS=FLAGS,
        BLOCK=BLOCK,
        num_warps=4,
    )
