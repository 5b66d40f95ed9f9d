"""Every kernel of the compiled extension on small shapes: what tests/sanitize.sh has watched.

No result is held against another here, which the other tests do; all must be finite. Each kernel
runs once in each dtype, in both ways that it has: with no more images than blocks, and with images
that do not come out even over the blocks. Inputs are drawn on the CPU, so that few kernels but
those that are watched run under the tool.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar_resnet_fast import ops
from cifar_resnet_fast.ops._trunk import cuda as trunk_cuda
from cifar_resnet_fast.verification import operations, trunk

DEPTH = 14  # two blocks a stage: the smallest network in which every kernel has its place
BLOCKS = 4
BATCHES = (3, 11)  # blocks have 1 or 0 images, and 3 or 2
SHORTCUT = operations.shortcut_a(16, 32, 7)


def runs(device: torch.device) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Each run's name, and what makes its results."""
    for dtype in (torch.float16, torch.bfloat16):
        for batch in BATCHES:
            for training in (True, False):
                name = f"trunk, {'training' if training else 'evaluation'}, {batch}, {dtype}"
                yield name, lambda d=dtype, b=batch, t=training: trunk_run(device, d, b, t)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        yield f"shortcut_a, {dtype}", lambda d=dtype: shortcut_run(device, d)


def trunk_run(
    device: torch.device, dtype: torch.dtype, batch: int, training: bool
) -> list[Tensor]:
    problem = trunk.draw(DEPTH, batch, dtype, torch.device("cpu"))
    units = [ops.Unit(*(t.to(device) for t in unit[:5]), *unit[5:]) for unit in problem.units]
    learnt = [t.requires_grad_(training) for unit in units for t in unit[:3]]
    images = problem.pictures.to(device)
    pooled = ops.trunk(images, units, training=training, implementation="cuda")
    if not training:
        return [pooled]
    return [pooled, *torch.autograd.grad(pooled, learnt, problem.dpooled.to(device))]


def shortcut_run(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    drawn = SHORTCUT.inputs(3, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    x = drawn["x"].to(device).requires_grad_()
    out = SHORTCUT.call({"x": x}, "cuda")["out"]
    return [out, *torch.autograd.grad(out, x, torch.ones_like(out))]


def main(device: torch.device) -> int:
    trunk_cuda.multiprocessors = lambda _: BLOCKS
    for name, run in runs(device):
        wrong = [tuple(t.shape) for t in run() if not t.cpu().isfinite().all()]
        if wrong:
            print(f"{name}: results must be finite, those of shapes {wrong} are not")
            return 1
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(torch.device("cuda")))
