"""Cases that worker.py runs: name to function. They are those of the other test files."""

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

CPU = torch.device("cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
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


def bind(function, *arguments):
    return lambda: function(*arguments)


TRITON = {}
for name, dtype in DTYPES.items():
    TRITON[f"step-resnet8-{name}"] = bind(training_step, "triton", dtype, 8, 2)
    for key, case in units.CASES.items():
        TRITON[f"unit-{key}-{name}"] = bind(units.test_training, case, dtype, CPU)
    for key, sizes in SIZES.items():
        if name != "fp32":  # has no fused backward
            TRITON[f"raw-{key}-fused-{name}"] = bind(residual_block, True, sizes, dtype)
        TRITON[f"raw-{key}-two-launches-{name}"] = bind(residual_block, False, sizes, dtype)
    for cutout in (0, 8):
        TRITON[f"load-batch-cutout-{cutout}-{name}"] = bind(
            loader.test_kernel_has_the_references_bits, dtype, cutout, CPU
        )
    for key, sizes in {"border": (2, 16, 32, 32, 32), "odd": (1, 16, 7, 5, 32)}.items():
        TRITON[f"shortcut-a-{key}-{name}"] = bind(shortcut_a, sizes, dtype)
for parameters in loss.SHAPES:
    TRITON[f"loss-{parameters.id}"] = bind(cross_entropy, parameters.values, "smoothed-and-mixed")
TRITON["loss-no-bias"] = bind(cross_entropy, (37, 64, 10), "no-bias")
for settings in optimizer.SETTINGS:
    TRITON[f"sgd-{settings}"] = bind(
        optimizer.test_kernel_is_the_reference, 2500, 2000, settings, CPU
    )
TRITON["sgd-bad-gradient"] = bind(
    optimizer.test_one_bad_gradient_skips_the_step, "triton", float("nan"), 1024, CPU
)
TRITON["record-step"] = bind(record.test_record, 6, 4, 8, 8.0, "triton", CPU)
