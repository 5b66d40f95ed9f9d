"""Cases that worker.py runs: name to function. They are those of the other test files."""

import functools

import pytest
import test_conv_bn_relu as units
import test_kernels_raw as raw
import test_linear_cross_entropy as loss
import test_loader as loader
import test_optimizer as optimizer
import test_record_step as record
import test_trunk as trunk
import torch

from cifar_resnet_fast import ops, reference
from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.ops import (
    _dispatch,
    _linear_cross_entropy,
    _load_batch,
    _record_step,
    _sgd,
)
from cifar_resnet_fast.ops._trunk import cuda as trunk_cuda
from cifar_resnet_fast.verification import networks
from ptx import build, cuda

CPU = torch.device("cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LOADED = []  # architectures whose operations torch knows, the last ones in use
SIZES = {"ragged-tiles": (2, 16, 16, 13, 11, 1), "stride-2-from-odd-sizes": (2, 16, 16, 5, 7, 2)}


def residual_block(fused: bool, sizes, dtype):
    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr(launch, "fused_config", lambda *_: None)
        raw.test_residual_block(fused, sizes, dtype, CPU, patch)


def shortcut_a(sizes, dtype):
    N, C, H, W, K = sizes
    x = torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(N)).to(dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    made, expected = (
        ops.shortcut_a(x, K, implementation="triton"),
        reference.shortcut_a(x, K),
    )
    assert torch.equal(made, expected)
    dout = torch.randn(made.shape, generator=torch.Generator().manual_seed(K)).to(dtype)
    assert torch.equal(*(torch.autograd.grad(out, x, dout)[0] for out in (made, expected)))


def cross_entropy(shape, variant):
    with pytest.MonkeyPatch.context() as patch:
        loss.test_within_budget(*shape, variant, CPU, patch)


def training_step(implementation, dtype, depth, batch):
    with pytest.MonkeyPatch.context() as patch:
        trunk.test_training_step(implementation, dtype, depth, batch, lambda _: None, CPU, patch)


def compiled_trunk(architecture: int) -> cuda.Kernels:
    """The trunk's operations on CPU tensors run the compiled kernels from now on."""
    kernels = cuda.kernels(architecture)
    if architecture not in LOADED:
        build.load_operations(kernels.folder)
        LOADED.append(architecture)
    assert LOADED[-1] == architecture, "operations that were loaded later cannot be taken back"
    _dispatch.why_not = lambda *_: None
    trunk_cuda.multiprocessors = lambda _: 2
    return kernels


def cuda_training_step(dtype, depth, batch, architecture):
    """Within the error budget, with the same bits in every order of warps."""
    kernels = compiled_trunk(architecture)
    problem = trunk.Problem(depth, batch, dtype, CPU)
    first = None
    for order in cuda.ORDERS:
        kernels.set_order(order)
        made, _ = problem.kernels("cuda")
        kernels.check(f"training step, warps {order}")
        first = first or made
        for name, value in made.items():
            assert torch.equal(value, first[name]), f"{name} with warps {order}"
    training_step("cuda", dtype, depth, batch)
    kernels.check("training step")


def cuda_evaluation(dtype, depth, batch, architecture):
    kernels = compiled_trunk(architecture)
    trunk.test_evaluation("cuda", dtype, depth, batch, lambda _: None, CPU)
    kernels.check("evaluation")


def whole_step(dtype, depth, batch, architecture):
    """The engine's: the trunk, forward and backward, on its CUDA kernels; the batch, the last
    layer with the loss, the optimizer and the record of the step on their Triton kernels."""
    kernels = compiled_trunk(architecture)
    kernels.set_order("random")
    problem = networks.Problem(depth, batch, NAMES[dtype], CPU)
    launched = launch.launch.__self__.launched
    launched.clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (_load_batch, _linear_cross_entropy, _sgd, _record_step):
            patch.setattr(module, "choose", lambda *_: "triton")
        networks.verify_step(problem, "cuda")
    kernels.check("whole step")
    assert launched >= {
        "_load_batch_kernel",
        "_linear_cross_entropy_kernel",
        "_linear_cross_entropy_merge_kernel",
        "_sgd_check_kernel",
        "_sgd_kernel",
        "_record_step_kernel",
    }


CUDA = {
    f"{kind.__name__}-{name}": functools.partial(kind, DTYPES[name], 8, 3)
    for kind in (cuda_training_step, cuda_evaluation, whole_step)
    for name in ("fp16", "bf16")
}

TRITON = {}
for name, dtype in DTYPES.items():
    TRITON[f"step-resnet8-{name}"] = functools.partial(training_step, "triton", dtype, 8, 2)
    for key, case in units.CASES.items():
        if (key, name) == ("stride-2-of-one-pixel", "bf16"):
            continue  # of eager's gradient oneDNN leaves a tap unwritten, with AVX-512 BF16
        TRITON[f"unit-{key}-{name}"] = functools.partial(units.test_training, case, dtype, CPU)
    for key, sizes in SIZES.items():
        if name != "fp32":  # has no fused backward
            TRITON[f"raw-{key}-fused-{name}"] = functools.partial(
                residual_block, True, sizes, dtype
            )
        TRITON[f"raw-{key}-two-launches-{name}"] = functools.partial(
            residual_block, False, sizes, dtype
        )
    for cutout in (0, 8):
        TRITON[f"load-batch-cutout-{cutout}-{name}"] = functools.partial(
            loader.test_kernel_has_the_references_bits, dtype, cutout, CPU
        )
    for key, sizes in {"border": (2, 16, 32, 32, 32), "odd": (1, 16, 7, 5, 32)}.items():
        TRITON[f"shortcut-a-{key}-{name}"] = functools.partial(shortcut_a, sizes, dtype)
for parameters in loss.SHAPES:
    TRITON[f"loss-{parameters.id}"] = functools.partial(
        cross_entropy, parameters.values, "smoothed-and-mixed"
    )
TRITON["loss-no-bias"] = functools.partial(cross_entropy, (37, 64, 10), "no-bias")
for settings in optimizer.SETTINGS:
    TRITON[f"sgd-{settings}"] = functools.partial(
        optimizer.test_kernel_is_the_reference, 2500, 2000, 0, settings, CPU
    )
TRITON["sgd-scaled"] = functools.partial(
    optimizer.test_kernel_is_the_reference, 2500, 2500, 1400, "nesterov", CPU
)
TRITON["sgd-bad-gradient"] = functools.partial(
    optimizer.test_one_bad_gradient_skips_the_step, "triton", float("nan"), 1024, CPU
)
TRITON["record-step"] = functools.partial(record.test_record, 6, 4, 8, 8.0, "triton", CPU)
