"""Every public operation, in every implementation that can run: ``python -m bench.kernels``.

Each operation at each place where the network has it: forward, backward and both, or where nothing
has a gradient the call; dtypes and batch sizes; the package's implementations, plain PyTorch
(``eager``: cuDNN where there is a GPU), the same under torch.compile, by default (``compile``) and
with every choice measured (``compile max-autotune``), and what else PyTorch has for it
(``torch.optim``: the fused SGD, which does not look for infinite gradients). Results are held
against float64 before anything is timed. The trunk is ``bench.trunk``'s.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator

import torch

from bench.cards import Card
from bench.cases import CASES, Case
from bench.suite import Suite, flags
from bench.traffic import Sizes
from cifar_resnet_fast import ops
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.verification.budget import Unavailable
from cifar_resnet_fast.verification.measure import Call
from cifar_resnet_fast.verification.operations import Run, differentiate, draw, verify

EAGER = "eager"
COMPILED = {  # torch.compile's mode
    "compile": "default",
    "compile max-autotune": "max-autotune-no-cudagraphs",  # all calls are in a graph of ours
}


def runner(case: Case, name: str, suite: Suite) -> Run:
    """What runs ``case`` under the name that results have.

    Raises:
        Unavailable: nothing does, on this device
    """
    if name == EAGER:
        return lambda tensors: case.call(tensors, "reference")
    if not suite.on_gpu:
        raise Unavailable("without a GPU only eager is measured")
    if name in COMPILED:
        torch._functorch.config.donated_buffer = False  # or a compiled backward runs only once
        mode = COMPILED[name]
        return compiled(lambda tensors: case.call(tensors, "reference"), mode=mode)
    if name in case.others:
        return case.others[name]
    reason = f"{case.operation} has no implementation of that name"
    if name in ops.IMPLEMENTATIONS:
        reason = ops.why_not(name, suite.device, case.operation)
    if reason is not None:
        raise Unavailable(reason)
    return lambda tensors: case.call(tensors, name)


def compiled(run: Run, **options) -> Run:
    """``run`` under torch.compile, which may neither fall back to eager nor share with others."""
    torch._dynamo.reset()  # a function's code is compiled only so often before it runs eagerly
    return torch.compile(run, fullgraph=True, dynamic=False, **options)


def preparer(
    case: Case, run: Run, phase: str, batch: int | None, dtype: torch.dtype, device: torch.device
) -> Callable[[int], Call]:
    """For ``time_calls``: the call of ``phase`` on inputs of its own."""

    def prepare(copy: int) -> Call:
        tensors, dout = draw(case, batch, dtype, device, seed=copy)
        if phase in ("forward", "call"):
            return lambda: run(tensors)
        if phase == "both":
            return lambda: differentiate(case, run, tensors, dout)
        out, wanted = run(tensors)["out"], [tensors[name] for name in case.differentiated]
        return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)

    return prepare


def measure(
    suite: Suite, card: Card, case: Case, name: str, batch: int | None, dtype: str
) -> None:
    """Verify one implementation of a case, then time its phases."""
    key = {
        "operation": case.operation,
        "place": case.place,
        "dtype": dtype,
        "batch": batch,
        "implementation": name,
    }
    left = [{**key, "phase": phase} for phase in case.phases]
    with suite.attempt(left):
        run = runner(case, name, suite)
        verify(case, run, *draw(case, batch, DTYPES[dtype], suite.device, seed=0))
        while left:
            phase = left[0]["phase"]
            prepare = preparer(case, run, phase, batch, DTYPES[dtype], suite.device)
            moved, flops = case.work(phase, Sizes(batch or 1, dtype))
            suite.time(left[0], title(left[0]), prepare, card, moved, flops)
            del left[0]


def title(row: dict) -> str:
    """A case for people."""
    return (
        f"{row['operation']:12} {row['place']:26} {row['dtype']} {row['batch'] or '':5} "
        f"{row['implementation']:20} {row['phase']:8}"
    )


def problems(
    cases: Iterable[Case], dtypes: Iterable[str], batches: Iterable[int]
) -> Iterator[tuple[Case, str, int | None]]:
    """Each case in each dtype and batch size, or once if they do not matter."""
    for case in cases:
        if case.batched:
            yield from itertools.product((case,), dtypes, batches)
        else:
            yield case, "fp32", None


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None, known: Iterable[str]
) -> argparse.Namespace:
    """The options, with ``--implementation`` of ``known``, ``--dtype`` and ``--batch-size``."""
    parser.add_argument(
        "--implementation",
        nargs="+",
        metavar="NAME",
        help="implementations to measure (default: all that can run)",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="data types of the activations (default: all)"
    )
    parser.add_argument(
        "--batch-size", type=int, nargs="+", metavar="N", help="batch sizes (default: 128 1024)"
    )
    options = parser.parse_args(arguments)
    for name in options.implementation or ():
        if name not in known:
            parser.error(f"--implementation must be of {', '.join(sorted(known))}, got {name}")
    if min(options.batch_size or (1,)) < 1:
        parser.error(f"--batch-size must be at least 1, got {min(options.batch_size)}")
    return options


def sizes(suite: Suite, options: argparse.Namespace) -> tuple[Iterable[str], Iterable[int]]:
    """Dtypes and batch sizes: those that were given, or the defaults of this device."""
    dtypes, batches = tuple(DTYPES), (128, 1024)
    if not suite.on_gpu:
        dtypes, batches = ("fp32",), (4,)
    elif suite.quick:
        dtypes, batches = ("fp16",), (1024,)
    return options.dtype or dtypes, options.batch_size or batches


def main(arguments: list[str] | None = None) -> int:
    parser = flags("kernels", __doc__.partition("\n\n")[2])
    parser.add_argument(
        "--operation",
        nargs="+",
        choices=sorted({c.operation for c in CASES}),
        help="operations to measure (default: all)",
    )
    known = {*ops.IMPLEMENTATIONS, EAGER, *COMPILED} - {"reference"}
    known.update(*(case.others for case in CASES))
    options = parse(parser, arguments, known)
    suite = Suite("kernels", options)
    wanted = options.implementation or (known - {*COMPILED} if suite.quick else known)
    card = suite.measured_card()
    cases = [c for c in CASES if c.operation in (options.operation or [c.operation])]
    found = problems(cases, *sizes(suite, options))
    runs = list(itertools.product(found, sorted(wanted)))
    for (case, dtype, batch), name in suite.progress(runs):
        measure(suite, card, case, name, batch, dtype)
    return suite.finish()


if __name__ == "__main__":
    sys.exit(main())
