"""How each Triton kernel is launched, as data (layer 0).

``TABLE`` holds what ``tools/tune.py`` measured on a card; everything else runs ``DEFAULTS``, one
conservative configuration an operation, which neither spills nor passes 99 KB of shared memory
on compute capability 8.0, 8.6, 8.9 or 9.0 (``make kernels-report``).

A tile is a run of BLOCK_P pixels by a block of channels. Programs are persistent: program i of S
takes tiles i, i + S, ..., so sums leave a kernel as S rows, whatever the batch.
"""

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """One kernel's launch configuration.

    block_p: pixels a tile; elements a program where a program has one block of elements, no tiles
    block_c, block_k: most input and output channels a block; the block taken is the largest power
        of two that divides the channels
    programs_per_sm: persistent programs, all channel blocks together; 0 where there are no tiles
    num_warps, num_stages: as Triton has them
    max_registers: of a thread. Where it is set, ptxas does not spill a few to fit more programs
        on an SM, as it otherwise likes to
    """

    block_p: int
    block_c: int
    block_k: int
    programs_per_sm: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """What Triton's compiler is told."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


# (operation, bytes an element): the one default of each. Blocks of float32 are smaller: without
# tensor cores a tile's operands lie in registers.
DEFAULTS = {
    ("conv3x3_fwd", 2): Config(64, 32, 64, 3, 4, 3, 168),
    ("conv3x3_bwd", 2): Config(16, 16, 16, 8, 1, 1, 255),
    ("conv3x3_dgrad", 2): Config(64, 64, 32, 4, 4, 3),
    ("conv3x3_wgrad", 2): Config(64, 32, 64, 2, 4, 2),
    ("bn_apply", 2): Config(64, 32, 32, 8, 4, 1),
    ("bn_reduce", 2): Config(64, 32, 32, 4, 4, 1),
    ("shortcut_a", 2): Config(1024, 0, 0, 0, 4, 1),
    ("conv3x3_fwd", 4): Config(64, 16, 32, 4, 4, 1, 128),
    # block_k 0, so two launches: without tensor cores nine accumulators leave no registers
    ("conv3x3_bwd", 4): Config(32, 16, 0, 2, 4, 1),
    ("conv3x3_dgrad", 4): Config(64, 32, 32, 4, 4, 1, 128),
    ("conv3x3_wgrad", 4): Config(32, 16, 32, 2, 4, 1),
    ("bn_apply", 4): Config(64, 32, 32, 8, 4, 1),
    ("bn_reduce", 4): Config(64, 32, 32, 4, 4, 1),
    ("shortcut_a", 4): Config(1024, 0, 0, 0, 4, 1),
    # rows of partial sums by channels
    ("bn_merge", 4): Config(32, 0, 16, 1, 4, 1),
    # 64 elements: 36 programs for the smallest layer, rows of 256 bytes
    ("sum_slabs", 4): Config(64, 0, 0, 0, 4, 1),
}

# in the interpreter a program instance costs tens of ms whatever its size: few and large
INTERPRETER_TILES = Config(256, 64, 64, 2, 4, 1)
INTERPRETER_ELEMENTS = Config(16384, 0, 0, 0, 4, 1)

# (operation, C, K, dtype, compute capability): measured by tools/tune.py, card and date beside it
TABLE: dict[tuple[str, int, int, torch.dtype, tuple[int, int]], Config] = {}


def config(operation: str, C: int, K: int, like: Tensor) -> Config:
    """The configuration of ``operation`` for C input and K output channels of ``like``'s dtype."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        elementwise = DEFAULTS[operation, 4].programs_per_sm == 0
        return INTERPRETER_ELEMENTS if elementwise else INTERPRETER_TILES
    default = DEFAULTS[operation, 2 if like.element_size() == 2 else 4]
    return TABLE.get((operation, C, K, like.dtype, capability(like.device)), default)


def fused_config(C: int, K: int, like: Tensor) -> Config | None:
    """The configuration of the fused dgrad and wgrad, or None where two launches serve better.

    The fused kernel takes all K output channels as one block and keeps nine accumulators of K by
    BLOCK_C in registers, so K must fit ``block_k`` and be a power of two; a table row with
    ``block_k`` 0 says that two launches were measured to be faster.
    """
    chosen = config("conv3x3_bwd", C, K, like)
    return chosen if channel_block(K, chosen.block_k) == K else None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of ``device``, such as (8, 6)."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors (SMs) of ``device``; 1 for the interpreter's CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def channel_block(channels: int, limit: int) -> int:
    """The largest power of two up to ``limit`` that divides ``channels``; 16 for the stem's 3."""
    return min(channels & -channels, limit) if channels % 16 == 0 else 16


def pixel_programs(chosen: Config, pixels: int, others: int, device: torch.device) -> int:
    """Programs along the pixels, where each has ``others`` neighbours along the channels."""
    tiles = -(-pixels // chosen.block_p)
    return min(tiles, -(-multiprocessors(device) * chosen.programs_per_sm // others))


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Start ``kernel`` on its tensors' device, on the current stream there.

    Every launch of the package goes through here. Triton itself takes the current device, on which
    the tensors need not be.
    """
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments)
    else:
        kernel[grid](**arguments)
