"""Fill the launch table on the card at hand: ``python -m tools.tune [--dtype bf16]``.

For every convolution of the family and every kernel, configurations are searched one setting at a
time from the default on; each is checked against the default's result before it is timed. The
fastest is printed as a row for ``kernels/launch.py``'s TABLE, to be pasted there. Needs a CUDA GPU
of compute capability 8.0 or above; exit status 2 where there is none.
"""

import argparse
import datetime
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from bench.traffic import CONVOLUTIONS
from cifar_resnet_fast.kernels import bn, launch
from cifar_resnet_fast.kernels.conv3x3_bwd import conv3x3_bwd
from cifar_resnet_fast.kernels.conv3x3_dgrad import conv3x3_dgrad
from cifar_resnet_fast.kernels.conv3x3_fwd import conv3x3_fwd
from cifar_resnet_fast.kernels.conv3x3_wgrad import conv3x3_wgrad
from cifar_resnet_fast.kernels.launch import Config
from cifar_resnet_fast.ops import why_not
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.verification.measure import time_calls

SETTINGS = {
    "block_p": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
    "block_c": (16, 32, 64),
    "block_k": (16, 32, 64),
    "num_stages": (1, 2, 3, 4),
    "programs_per_sm": (1, 2, 4, 8, 16),
}
SECONDS = 0.02  # of sampling for a timing


def search(start: Config, measure: Callable[[Config], float | None]) -> tuple[Config, float]:
    """The best configuration found by varying one setting at a time until none helps.

    Args:
        start: a configuration that runs
        measure: milliseconds of a configuration; None if it is wrong or does not fit the card

    Returns:
        the configuration and its milliseconds

    Raises:
        RuntimeError: ``start`` does not run
    """
    known = {start: measure(start)}
    if known[start] is None:
        raise RuntimeError(f"the first configuration is wrong or does not fit: {start}")
    best = start
    improved = True
    while improved:
        improved = False
        for setting, values in SETTINGS.items():
            for value in values:
                config = replace(best, **{setting: value})
                if config not in known:
                    known[config] = measure(config)
                if known[config] is not None and known[config] < known[best]:
                    best, improved = config, True
    return best, known[best]


def problems(C: int, K: int, H: int, stride: int, batch: int, dtype: torch.dtype) -> dict:
    """What to time for one layer: operation -> (C, K in the table, a call that makes tensors)."""
    device, last = torch.device("cuda"), torch.channels_last

    def randn(*shape):
        value = torch.randn(shape, device=device).to(dtype)
        return value.contiguous(memory_format=last) if len(shape) == 4 else value

    x, weight = randn(batch, C, H, H), randn(K, C, 3, 3) * (2 / (9 * C)) ** 0.5
    ones, zeros = torch.ones(K, device=device), torch.zeros(K, device=device)
    y, partials, _ = conv3x3_fwd(x, weight, stride=stride, sums=True)
    affine = bn.bn_merge_fwd(partials, ones, zeros, zeros.clone(), ones.clone(), 0.1, 1e-5)
    da = torch.randn_like(y)
    _, partials = bn.bn_reduce_bwd(da, y, affine, None, relu=True, write_dz=False)
    coef, _, _ = bn.bn_merge_bwd(partials, affine, y.numel() // K, True, torch.float32)
    dweight = torch.empty((K, C, 3, 3), device=device)

    def wgrad():
        dy = torch.empty_like(da)
        conv3x3_wgrad(da, y, coef, x, dweight, stride=stride, relu=True, dy=dy)
        return dweight, dy

    def fused():
        dx, _ = conv3x3_bwd(
            da, y, coef, x, weight, stride=stride, relu=True, dx=True, dweight=dweight
        )
        return dx, dweight

    made = {
        "conv3x3_fwd": (C, K, lambda: conv3x3_fwd(x, weight, stride=stride, sums=True)[:1]),
        "conv3x3_wgrad": (C, K, wgrad),
    }
    if C > 3:
        made["conv3x3_dgrad"] = (
            C,
            K,
            lambda: conv3x3_dgrad(da, None, None, x, weight, stride=stride, relu=False)[:1],
        )
        made["conv3x3_bwd"] = (C, K, fused)
    if C == K:
        made["bn_apply"] = (K, K, lambda: (bn.bn_apply_fwd(y, affine, None, relu=True),))
        made["bn_reduce"] = (
            K,
            K,
            lambda: (bn.bn_reduce_bwd(da, y, affine, None, True, False)[1].sum(0),),
        )
    return made


def milliseconds(call: Callable) -> float:
    """Median time of one call in a CUDA graph, with the same tensors each time."""
    cuda = torch.device("cuda")
    timing = time_calls(lambda _: call, cuda, input_bytes=sys.maxsize, seconds=SECONDS)
    return 1e3 * timing.median


def agree(made: tuple, expected: tuple, dtype: torch.dtype) -> bool:
    """Whether two configurations' results differ by no more than their order of summation."""
    allowed = 4 * torch.finfo(dtype).eps
    return all(
        (a.double() - b.double()).norm() <= allowed * b.double().norm()
        for a, b in zip(made, expected, strict=True)
    )


def tune(operation: str, key: tuple, call: Callable, dtype: torch.dtype) -> tuple[Config, float]:
    """The fastest configuration of ``operation`` that is right, and its milliseconds; the table
    has it afterwards."""
    _, C, K, _, _ = key
    launch.TABLE.pop(key, None)
    expected = tuple(t.clone() for t in call())
    start = launch.DEFAULTS[operation, 2 if dtype.itemsize == 2 else 4]
    if operation == "conv3x3_bwd":
        # the fused kernel takes K whole: the default may be not to take it
        start = replace(start, block_p=16, block_c=16, block_k=K)

    def measure(config: Config) -> float | None:
        if operation == "conv3x3_bwd" and launch.channel_block(K, config.block_k) != K:
            return None
        launch.TABLE[key] = config
        try:
            return milliseconds(call) if agree(call(), expected, dtype) else None
        except (OutOfResources, PTXASError, CompilationError):
            return None

    launch.TABLE[key], time = search(start, measure)
    return launch.TABLE[key], time


def print_row(key: tuple, config: Config, note: str) -> None:
    operation, C, K, dtype, capability = key
    values = ", ".join(str(value) for value in vars(config).values())
    print(
        f'    ("{operation}", {C}, {K}, {dtype}, {capability}): Config({values}),  # {note}',
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune", description=__doc__.split(":")[0]
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="data types (default: bf16)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1024, metavar="N", help="batch size (default: 1024)"
    )
    options = parser.parse_args()
    batch = options.batch_size
    if batch < 1:
        parser.error(f"--batch-size must be at least 1, got {batch}")
    reason = "no GPU is visible"
    if torch.cuda.is_available():
        reason = why_not("triton", torch.device("cuda"), "conv_bn_relu")
    if reason is not None:
        print(f"tools.tune needs a CUDA GPU that runs Triton: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    capability = launch.capability(device)
    print(
        f"    # {torch.cuda.get_device_name()}, torch {torch.__version__}, batch {batch}, "
        f"{datetime.date.today()}; microseconds"
    )
    for name, (C, K, H, stride) in itertools.product(options.dtype, CONVOLUTIONS):
        dtype, times = DTYPES[name], {}
        for operation, (c, k, call) in problems(C, K, H, stride, batch, dtype).items():
            key = (operation, c, k, dtype, capability)
            config, times[operation] = tune(operation, key, call, dtype)
            if operation != "conv3x3_bwd":
                print_row(key, config, f"{1e3 * times[operation]:.1f}")
                continue
            # the fused kernel against the two that it replaces
            split = times["conv3x3_wgrad"] + times["conv3x3_dgrad"]
            if times[operation] > split:
                config = Config(0, 0, 0, 0, 0, 0)
            note = f"fused {1e3 * times[operation]:.1f}, two launches {1e3 * split:.1f}"
            print_row(key, config, note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
