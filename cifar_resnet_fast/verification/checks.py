"""All checks of ``selfcheck``, by name (layer 4).

A check of an operation holds every kernel that an implementation of it has against float64, by
the budget of the tests, at the shapes of the network. Its batches are ragged: one image, a prime
number, and on a GPU one that is larger than any number of multiprocessors.
"""

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cifar_resnet_fast import ops
from cifar_resnet_fast.ops._trunk import plain as plain_kernels
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.verification import exchange, operations, repeats, trunk
from cifar_resnet_fast.verification.budget import (
    Compared,
    Unavailable,
    WrongResult,
    assert_within_budget,
    without_tf32,
)
from cifar_resnet_fast.verification.measure import copy_bandwidth, time_calls
from cifar_resnet_fast.verification.networks import Problem, make_step, verify_step

LIMIT, EXCHANGE_LIMIT = 120.0, 180.0  # seconds: a Triton check compiles a dozen kernels
QUICK_BATCH = 131
FLOAT32_ALONE = ("linear_cross_entropy", "record_step", "sgd")  # take no 16-bit activations
SUMS = (  # over all pixels or images
    *("loss", "norm", "running_mean", "running_var", "dweight"),
    *("dbn_weight", "dbn_bias", "dscale", "dshift", "dbias"),
)
TIMED = Problem(56, 1024, "fp16", torch.device("cuda"))
TIMED_STEPS = ("cuda", "triton", "eager graph")
_TIMED_SECONDS = 1.0
BANDWIDTH, STEP_TIME = "copy bandwidth", "time of a step, "  # names


@dataclass(frozen=True)
class Check:
    """One line of the self-check.

    name: of its own
    run: what it does, in a worker process. Gives None, a remark, or figures by name; raises
        WrongResult, or Unavailable if it is not possible here
    limit: seconds after which it hangs
    operation, implementation: whose kernels it is about; empty if it is about a whole step
    kernel: the name of the kernels that it is about, the same for a quick check and a full one
    after: names of checks without which it is not worth its time: a time of something wrong
    """

    name: str
    run: Callable[[], dict | str | None]
    limit: float = LIMIT
    operation: str = ""
    implementation: str = ""
    kernel: str = ""
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """How much is checked: on a CPU little, for kernels are emulated or interpreted there."""

    depth: int
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    side: int  # pixels a row of the trunk's images, for kernels that take any


def sizes_of(device: torch.device, implementation: str) -> Sizes:
    if device.type == "cuda":
        return Sizes(20, (1, QUICK_BATCH, 512), ("fp16", "bf16", "fp32"), operations.SIDES[0])
    if implementation == "triton":  # the interpreter has no bfloat16
        return Sizes(8, (2,), ("fp16", "fp32"), 8)
    return Sizes(8, (1, 3), ("fp16", "bf16", "fp32"), operations.SIDES[0])


def catalogue(device: torch.device) -> list[Check]:
    """Every check by which a worker may be asked, those that cannot be done on ``device`` too."""
    quick = kernel_checks(device, quick=True)
    return [*kernel_checks(device), *quick, *step_checks(device), *timings(device)]


# --- the operations -----------------------------------------------------------------------------


def kernel_checks(device: torch.device, quick: bool = False) -> list[Check]:
    """Every kernel of every implementation; one batch each if ``quick``."""
    checks = []
    for operation, implementations in ops.OPERATIONS.items():
        for implementation in implementations:
            if implementation == "reference":
                continue
            for dtype in sizes_of(device, implementation).dtypes:
                if operation in FLOAT32_ALONE and dtype != "fp32":
                    continue
                if (operation, implementation, dtype) == ("trunk", "cuda", "fp32"):
                    continue  # its activations have 16 bits
                checks.append(_kernel_check(device, operation, implementation, dtype, quick))
    return checks


def kernel_check_name(operation: str, implementation: str, dtype: str, quick: bool = False) -> str:
    return f"{operation}, {implementation}, {dtype}" + (", quick" if quick else "")


def quick_checks(device: torch.device, kernels: dict[str, str], dtype: str) -> list[Check]:
    """One batch each of what a run uses.

    Args:
        kernels: the implementation of each operation
        dtype: of the activations
    """
    return [
        _kernel_check(device, *pair, "fp32" if pair[0] in FLOAT32_ALONE else dtype, quick=True)
        for pair in kernels.items()
        if pair[1] != "reference"
    ]


def _kernel_check(
    device: torch.device, operation: str, implementation: str, dtype: str, quick: bool = False
) -> Check:
    run = _trunk_is_right if operation == "trunk" else _operation_is_right
    return Check(
        kernel_check_name(operation, implementation, dtype, quick),
        lambda: run(device, operation, implementation, dtype, quick),
        operation=operation,
        implementation=implementation,
        kernel=kernel_check_name(operation, implementation, dtype),
    )


def _batches(device: torch.device, implementation: str, quick: bool) -> tuple[int, ...]:
    batches = sizes_of(device, implementation).batches
    return tuple(b for b in batches if b == QUICK_BATCH) or batches[-1:] if quick else batches


def _operation_is_right(
    device: torch.device, operation: str, implementation: str, dtype: str, quick: bool
) -> str:
    _can_run(implementation, device, operation)
    places, held = 0, _Held(dtype)
    for case in operations.CASES:
        if case.operation != operation:
            continue
        batches = _batches(device, implementation, quick) if case.batched else (None,)
        for batch in batches:
            tensors, dout = operations.draw(case, batch, DTYPES[dtype], device, seed=0)

            def run(tensors: dict[str, Tensor], case: operations.Case = case) -> dict[str, Tensor]:
                return case.call(tensors, implementation)

            found = operations.compare(case, run, tensors, dout)
            held.check(found, case.place, batch)
            places += 1
    held.check_sums()
    return f"{places} case" + ("s" if places > 1 else "")


def _trunk_is_right(
    device: torch.device, operation: str, implementation: str, dtype: str, quick: bool
) -> str:
    """Each kernel of a training step, and evaluation."""
    _can_run(implementation, device, operation)
    sizes = sizes_of(device, implementation)
    # imported only if it is used: torch.library's custom operations import triton
    from cifar_resnet_fast.ops._trunk.autograd import kernels_of

    module = kernels_of(implementation)
    places, evaluated, held = 0, [], _Held(dtype)
    for batch in _batches(device, implementation, quick):
        problem = trunk.draw(sizes.depth, batch, DTYPES[dtype], device, side=sizes.side)
        steps = trunk.record(module, problem)
        for position in trunk.places(steps):
            held.check(trunk.compare(steps, position), trunk.title(steps[position]), batch)
            places += 1
        evaluated.append(_evaluated(problem, implementation))
    held.check_sums()
    ours, eager, exact = (torch.cat(parts) for parts in zip(*evaluated, strict=True))
    # through all layers one number's error is chance, and of one image there are few numbers
    assert_within_budget("evaluation: pooled", ours, eager, exact, measures=("norm",))
    return f"{places} kernels in their places"


def _evaluated(problem: trunk.Problem, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The pooled activation in evaluation: the implementation's, eager PyTorch's, in float64."""
    wide = [
        unit._replace(**{name: getattr(unit, name).double() for name in ops.Unit._fields[:5]})
        for unit in problem.units
    ]
    images = problem.pictures
    with without_tf32():
        exact = ops.trunk(images.double(), wide, training=False, implementation="reference")
        eager, ours = (
            ops.trunk(images, problem.units, training=False, implementation=name)
            for name in ("reference", implementation)
        )
    return ours, eager, exact


def _can_run(implementation: str, device: torch.device, operation: str) -> None:
    reason = ops.why_not(implementation, device, operation)
    if reason is not None:
        raise Unavailable(reason)


class _Held:
    """Results held to the budget, place by place.

    In float32, sums over all pixels are held to it together at the end, those of one name from
    all places: float32's last bits are the order of additions, and over a few channels it is
    chance whose order was the better one. With 16 bits, they are rounded to these.
    """

    def __init__(self, dtype: str):
        self._apart = dtype == "fp32"
        self._sums: dict[str, list[tuple[str, Compared]]] = {}

    def check(self, found: list[Compared], place: str, batch: int | None) -> None:
        where = place + (f", batch {batch}" if batch else "")
        for result in found:
            if self._apart and result.name in SUMS:
                _at(where, result.check_form)
                self._sums.setdefault(result.name, []).append((where, result))
            else:
                _at(where, result.check)

    def check_sums(self) -> None:
        for name, found in self._sums.items():
            worst, _ = max(found, key=lambda pair: pair[1].ratio())
            joined = Compared.joined(name, [result for _, result in found])
            _at(f"all places, the worst {worst}", joined.check)


def _at(where: str, check: Callable[[], None]) -> None:
    """A WrongResult of ``check`` says where it was found."""
    try:
        check()
    except WrongResult as error:
        raise WrongResult(f"{where}: {error}") from None


# --- whole steps --------------------------------------------------------------------------------


def step_checks(device: torch.device) -> list[Check]:
    """Training steps: against float64, captured, replayed, run twice; and several GPUs."""
    checks = []
    kinds = {
        "step": verify_step,
        "step captured and not": repeats.captured_as_not,
        "replays": repeats.replays,
        "same run twice": repeats.same_run,
    }
    # on a CPU, auto is the reference, and the only one that is fast enough to train with
    names = ("cuda", "triton") if device.type == "cuda" else ("auto", "cuda", "triton")
    for (kind, run), name in itertools.product(kinds.items(), names):
        checks.append(
            Check(
                f"{kind}, {name}",
                functools.partial(_on_network, run, device, name),
                implementation=name,
            )
        )
    checks.append(
        Check("all-reduce in a graph", lambda: _gpus_exchange(device), limit=EXCHANGE_LIMIT)
    )
    return checks


def _on_network(run: Callable, device: torch.device, implementation: str) -> str:
    if implementation != "auto":
        _can_run(implementation, device, "trunk")
    sizes = sizes_of(device, implementation)
    batch = 128 if device.type == "cuda" else sizes.batches[-1]
    dtype = "fp32" if implementation == "auto" else "fp16"
    problem = Problem(sizes.depth, batch, dtype, device)
    run(problem, implementation)
    return f"ResNet-{problem.depth}, batch {batch}, {problem.dtype}"


def _gpus_exchange(device: torch.device) -> str:
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        raise Unavailable(f"several GPUs are needed, there {'is 1' if count else 'are none'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", exchange.__name__, device.type]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if "Error" in line or "sums" in line]
        why = said[0].strip() if said else f"exit status {ended.returncode}"
        raise WrongResult(f"{count} GPUs: {why}")
    return f"{count} GPUs"


# --- times --------------------------------------------------------------------------------------


def timings(device: torch.device) -> list[Check]:
    """How long a training step takes, each only if it is right."""
    bandwidth = Check(BANDWIDTH, lambda: _bandwidth(device))
    return [bandwidth] + [
        Check(
            STEP_TIME + name,
            functools.partial(_step_time, device, name),
            implementation=name,
            after=(f"step, {name}",) if name in ops.IMPLEMENTATIONS else (),
        )
        for name in TIMED_STEPS
    ]


def _bandwidth(device: torch.device) -> dict:
    _needs_gpu(device)
    return {"gb_s": round(copy_bandwidth(device, 0.1) / 1e9, 1)}


def _step_time(device: torch.device, name: str) -> dict:
    """A replayed step, timed by events; what it moves is what the trunk's tensors have."""
    _needs_gpu(device)
    if name in ops.IMPLEMENTATIONS:
        _can_run(name, device, "trunk")
    torch.backends.cudnn.benchmark = True  # what anyone who wants speed sets
    step = make_step(TIMED, name)
    timing = time_calls(
        lambda _: step, device, input_bytes=2**40, seconds=_TIMED_SECONDS, graph=False
    )
    return {
        "ms": round(timing.median * 1e3, 3),
        "images_per_second": round(TIMED.batch / timing.median),
        "gb": round(step_bytes(TIMED) / 1e9, 2),
    }


def step_bytes(problem: Problem) -> int:
    """What a training step's activations move, at least, if each is read and written in turn."""
    one = trunk.draw(problem.depth, 1, DTYPES[problem.dtype], torch.device("cpu"))
    steps = trunk.record(plain_kernels, one)
    return problem.batch * sum(trunk.moved_bytes(step) for step in steps)


def _needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("times need a CUDA GPU")
