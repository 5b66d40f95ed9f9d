"""The trunk's kernels, one by one: ``python -m bench.trunk``.

Every kernel of ``ops._trunk.schedule`` at each place where the network has it, and the weights'
preparation: ``cuda``, ``triton`` and plain PyTorch, unfused (``eager``). A training step of a
ResNet-20, which has every place that deeper networks have, runs on an implementation's kernels and
each call is kept with its tensors; one is then held against float64 and timed by repeating it. So
a kernel gets what it gets in the network: sums and slabs that its predecessor left, in a form of
their own, which is why these are no cases of ``bench.kernels``.

Beside F2 stands cuDNN's own graph of it, ``cudnn`` (``bench.rivals``), if it is installed.

A step of an implementation is timed, not a launch. ``cuda`` has one for each: it merges the sums
that the kernel before left, and adds up that one's weight gradient, in its first microseconds.
(Only behind the stem's gradient, the last, there is a launch that adds up its own.) ``triton``
launches several: it merges the sums, adds up the weight gradient, and makes option A's shortcut.

The calls stand back to back in a CUDA graph, so the time is that of one in a chain, as in the
network: on Hopper a kernel of ``cuda`` may start before the one before it has ended, and one of
the backward pass adds up the slabs that the call before it wrote, while they are in cache. Before
a convolution there is always another launch than the weights' preparation, which it would not
wait for (csrc/bindings/trunk.h).
"""

import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from bench import rivals, roofline, traffic
from bench.cards import Card
from bench.kernels import EAGER, parse, sizes
from bench.suite import Suite, flags
from bench.traffic import Sizes, Work
from cifar_resnet_fast import ops
from cifar_resnet_fast.ops._trunk import autograd as trunk_autograd
from cifar_resnet_fast.ops._trunk import plain as plain_kernels
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.verification.budget import Unavailable
from cifar_resnet_fast.verification.measure import Call
from cifar_resnet_fast.verification.trunk import convolutions, draw, record, verify

IMPLEMENTATIONS = ("cuda", "triton", EAGER, rivals.CUDNN)
DEPTH = 20
WEIGHTS_DEPTH = 56


@dataclass(frozen=True)
class Place:
    """Where the network has a kernel.

    kernel, place: names, for people
    position: in ``roofline.trunk`` of a ResNet-20; None: the weights of a ResNet-56
    """

    kernel: str
    place: str
    position: int | None

    def work(self, batch: int | None, dtype: str) -> Work:
        if self.position is None:
            numbers = sum(9 * C * K for C, K in convolutions(WEIGHTS_DEPTH))
            return traffic.weights(Sizes(1, dtype), numbers)
        return launches(batch, dtype)[self.position]


def launches(batch: int, dtype: str) -> list[Work]:
    """Those of ``record``'s calls."""
    forward, backward = roofline.trunk(DEPTH, batch, dtype)
    return forward + backward


def places() -> list[Place]:
    """The weights, and then each kernel at each place once, in the order of a training step."""
    first = {}
    for position, work in enumerate(launches(1, "fp16")):
        first.setdefault((work.kernel, work.place), position)
    scheduled = [Place(*names, position) for names, position in first.items()]
    return [Place("weights", f"ResNet-{WEIGHTS_DEPTH}", None), *scheduled]


# --- how long it takes --------------------------------------------------------------------------


def module_of(name: str, suite: Suite, dtype: str) -> ModuleType:
    """Where an implementation has its kernels.

    Raises:
        Unavailable: they do not run on this device, or not in this dtype
    """
    if name == EAGER:
        return plain_kernels
    if not suite.on_gpu:
        raise Unavailable("without a GPU only eager is measured")
    reason = ops.why_not(name, suite.device, "trunk")
    if name == "cuda" and dtype == "fp32":
        reason = "the trunk's kernels of cuda take fp16 and bf16"
    if reason is not None:
        raise Unavailable(reason)
    return trunk_autograd.kernels_of(name)


def measure(
    suite: Suite, card: Card, place: Place, name: str, batch: int | None, dtype: str
) -> None:
    """Verify an implementation's kernel at a place, then time it."""
    case = {
        "kernel": place.kernel,
        "place": place.place,
        "dtype": dtype,
        "batch": batch,
        "implementation": name,
    }
    with suite.attempt([case]):
        if name == rivals.CUDNN:
            prepare = cudnn_preparer(suite, place, batch, dtype)
        else:
            module = module_of(name, suite, dtype)
            prepare = preparer(module, place, batch, DTYPES[dtype], suite.device)
        work = place.work(batch, dtype)
        suite.time(case, title(case), prepare, card, work.bytes, work.flops)


def cudnn_preparer(
    suite: Suite, place: Place, batch: int | None, dtype: str
) -> Callable[[int], Call]:
    """As ``preparer``, of cuDNN's graph (``rivals``).

    Raises:
        Unavailable: it is not there, or it is of another kernel or dtype
    """
    if place.kernel != "F2" or dtype == "fp32":
        raise Unavailable("cudnn is the second forward kernel, F2, in fp16 and bf16")
    rivals.import_cudnn()
    if not suite.on_gpu:
        raise Unavailable("without a GPU only eager is measured")
    side, _, C = map(int, place.place.split("x"))
    return rivals.preparer(batch, C, side, DTYPES[dtype], suite.device)


def preparer(
    module: ModuleType,
    place: Place,
    batch: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[int], Call]:
    """For ``time_calls``: the kernel at ``place``, each call with tensors of its own.

    All are on the same kernels, so that each adds up the slabs that the call before it left.

    Raises:
        WrongResult: it does not compute what it should. The weights are right where both
            convolutions that read the last of them are, forward and backward
    """
    if place.position is None:
        problem = draw(WEIGHTS_DEPTH, 4, dtype, device)
        steps, last = record(module, problem), len(problem.units) - 1
        for position in (last, last + 3):  # its F2 and its B2; between them is the head
            verify(steps, position)

        def prepare(seed: int) -> Call:
            problem = draw(WEIGHTS_DEPTH, 1, dtype, device, seed=seed)
            pictures = module.pictures_for_kernels(problem.pictures, dtype)
            return lambda: module.Kernels(problem.units, pictures).weights

    else:
        steps = record(module, draw(DEPTH, batch, dtype, device))
        verify(steps, place.position)
        first = steps[place.position]
        chain = copy.copy(first.kernels)
        before = [chain]

        def prepare(seed: int) -> Call:
            step = first
            if seed > 0:
                step = record(module, draw(DEPTH, batch, dtype, device, seed=seed))[place.position]

            def call():
                made = step.on(chain)
                if device.type == "cpu" or not torch.cuda.is_current_stream_capturing():
                    before[:] = [copy.copy(chain)]  # a graph's first call goes on from this
                return made

            return call

    return prepare


def title(row: dict) -> str:
    """A case for people."""
    return (
        f"{row['kernel']:22} {row['place']:10} {row['dtype']} {row['batch'] or '':5} "
        f"{row['implementation']:7}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = flags("trunk", __doc__.partition("\n\n")[2])
    options = parse(parser, arguments, IMPLEMENTATIONS)
    suite = Suite("trunk", options)
    card = suite.measured_card()
    dtypes, batches = sizes(suite, options)
    problems = []
    for place in places():
        of_place = (None,) if place.position is None else batches
        problems += itertools.product((place,), dtypes, of_place)
    wanted = options.implementation or IMPLEMENTATIONS
    if options.implementation is None and suite.on_gpu:
        try:
            rivals.import_cudnn()
        except Unavailable as error:
            print(error, file=sys.stderr)
    for (place, dtype, batch), name in suite.progress(list(itertools.product(problems, wanted))):
        measure(suite, card, place, name, batch, dtype)
    return suite.finish()


if __name__ == "__main__":
    sys.exit(main())
