"""The whole training step and inference, beside plain PyTorch: ``python -m bench.step``.

A training step is forward, loss, backward and SGD. The package's own (``auto``, and each
implementation by name) is the engine's, which also makes its batch; plain PyTorch's is given one.
Beside it run eager float32 (NCHW), eager autocast (channels-last), the same in a CUDA graph, and
torch.compile, default and max-autotune, in a CUDA graph; for inference also ``tensorrt``, if
torch_tensorrt is installed. The first step's change of the weights,
and inference's logits, are held against float64 before anything is timed.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable

from torch import Tensor

from bench import roofline
from bench.cards import Card
from bench.suite import Suite, flags, rates, timed
from cifar_resnet_fast.resnet import check_depth
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.verification.budget import Unavailable, check
from cifar_resnet_fast.verification.measure import peak_memory, time_calls
from cifar_resnet_fast.verification.networks import (
    EAGER,
    EXACT,
    PACKAGE,
    PLAIN,
    Problem,
    make_step,
    package_inference,
    plain_inference,
    tensorrt_inference,
    verify_step,
)

TENSORRT = "tensorrt"


def make_inference(problem: Problem, name: str) -> tuple[Callable[[], Tensor], bool]:
    if name == TENSORRT:
        return tensorrt_inference(problem)
    if name in PACKAGE:
        return package_inference(problem, name)
    return plain_inference(problem, PLAIN[name])


def measure(suite: Suite, card: Card, problem: Problem, phase: str, name: str) -> None:
    """Verify one implementation of a training step or of inference, then time it."""
    key = {
        "phase": phase,
        "depth": problem.depth,
        "dtype": problem.dtype,
        "batch": problem.batch,
        "implementation": name,
    }
    with suite.attempt([key]):
        row = measured(suite, card, problem, phase, name)
        suite.add({**key, **row}, line({**key, **row}))


def measured(suite: Suite, card: Card, problem: Problem, phase: str, name: str) -> dict:
    """What ``measure`` finds out, as fields of a result."""
    shape = (problem.depth, problem.batch, problem.dtype)
    if phase == "training":
        if name == TENSORRT:
            raise Unavailable("tensorrt is for inference")
        works = roofline.training_step(*shape)
        if name not in PACKAGE:
            works = works[1:]  # no loader
        verify_step(problem, name)
        with peak_memory(suite.device) as peak:
            run = make_step(problem, name)
            run()
        replays = run.replays
    else:
        works = roofline.inference(*shape)
        with peak_memory(suite.device) as peak:
            run, replays = make_inference(problem, name)
            run()
        eager, exact = (plain_inference(problem, how)[0]() for how in (EAGER, EXACT))
        check({"logits": run()}, {"logits": eager}, {"logits": exact}, maximum=True)
        del eager, exact
    moved, flops = (sum(getattr(work, what) for work in works) for what in ("bytes", "flops"))
    timing = time_calls(
        lambda _: run, suite.device, input_bytes=moved, seconds=suite.seconds, graph=False
    )
    return {
        **timed(timing),
        "peak_mib": peak.mib,  # with weights, optimiser and a graph's own memory
        **rates(timing, card, problem.dtype, moved, flops),
        # launch after launch: tighter than the sums' floor
        "floor_us": round(1e6 * roofline.floors(works, card, problem.dtype).kernels, 3),
        "images_per_second": round(problem.batch / timing.median, 1),
        "own_graph": replays,
    }


def line(row: dict) -> str:
    """A result for people."""
    return (
        f"{row['phase']:9} ResNet-{row['depth']:<4} {row['dtype']} {row['batch']:5} "
        f"{row['implementation']:26} "
        f"{row['us'] / 1e3:9.3f} ms ({row['us_20'] / 1e3:.3f} - {row['us_80'] / 1e3:.3f})  "
        f"{row['images_per_second']:9.0f} images/s  floor {row['floor_us'] / 1e3:.3f} ms"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = flags("step", __doc__.partition("\n\n")[2])
    parser.add_argument("--phase", nargs="+", choices=("training", "inference"))
    parser.add_argument("--depth", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--batch-size", type=int, nargs="+")
    names = (*PLAIN, TENSORRT, *PACKAGE)
    parser.add_argument("--implementation", nargs="+", choices=names, metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        for depth in options.depth or ():
            check_depth(depth)
    except ValueError as error:
        parser.error(f"--{error}")
    if min(options.batch_size or (1,)) < 1:
        parser.error(f"--batch-size must be at least 1, got {min(options.batch_size)}")
    suite = Suite("step", options)
    depths, dtypes = options.depth or (20, 56, 110), options.dtype or ("fp16", "bf16")
    batches = {"training": (128, 1024), "inference": (1, 1024)}
    chosen = options.implementation or names
    if suite.quick:
        depths, dtypes = options.depth or (56,), options.dtype or ("fp16",)
        batches = {"training": (1024,), "inference": (1024,)}
        # compiling takes minutes
        chosen = options.implementation or [name for name in names if "compile" not in name]
    if not suite.on_gpu:
        depths, dtypes = options.depth or (8,), options.dtype or ("fp32",)
        batches = {"training": (4,), "inference": (4,)}
        chosen = options.implementation or ("eager fp32", "auto")
        if any(name not in ("eager fp32", "eager", "auto") for name in chosen):
            parser.error("--implementation must be eager fp32, eager or auto with --device cpu")
    elif options.implementation is None and importlib.util.find_spec("torch_tensorrt") is None:
        print("tensorrt is left out: torch_tensorrt is not installed", file=sys.stderr)
    card = suite.measured_card()
    problems = [
        (phase, Problem(depth, batch, dtype, suite.device))
        for phase in options.phase or batches
        for depth, dtype in itertools.product(depths, dtypes)
        for batch in options.batch_size or batches[phase]
    ]
    for (phase, problem), name in suite.progress(list(itertools.product(problems, chosen))):
        measure(suite, card, problem, phase, name)
    return suite.finish()


if __name__ == "__main__":
    sys.exit(main())
