"""Registers, spills and shared memory of every Triton kernel, compiled for GPUs that need not be
here: ``python -m tools.triton_report [--arch 86] [--dtype fp16]``; exit status 1 if a kernel
spills or does not fit.

Launchers run on tensors of the meta device with ``launch.launch`` replaced by a compiler, so what
is compiled is what would be launched. Must run without TRITON_INTERPRET.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.traffic import CONVOLUTIONS
from cifar_resnet_fast.kernels import bn, launch
from cifar_resnet_fast.kernels.augment import load_batch
from cifar_resnet_fast.kernels.conv3x3_bwd import conv3x3_bwd
from cifar_resnet_fast.kernels.conv3x3_fwd import conv3x3_fwd
from cifar_resnet_fast.kernels.linear_cross_entropy import linear_cross_entropy
from cifar_resnet_fast.kernels.record_step import record_step
from cifar_resnet_fast.kernels.sgd import sgd
from cifar_resnet_fast.kernels.shortcut_a import shortcut_a_bwd, shortcut_a_fwd
from cifar_resnet_fast.training.engine import DTYPES

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTERS |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
BATCH = 1024


@dataclass(frozen=True)
class Arch:
    """What a multiprocessor of one compute capability has (CUDA C++ Programming Guide, table of
    technical specifications per compute capability)."""

    multiprocessors: int  # of the card that is meant
    shared_per_block: int  # bytes, opt-in
    shared_per_sm: int  # bytes
    warps_per_sm: int
    blocks_per_sm: int


ARCHS = {
    80: Arch(108, 166_912, 167_936, 64, 32),  # A100
    86: Arch(68, 101_376, 102_400, 48, 16),  # RTX 3080
    89: Arch(128, 101_376, 102_400, 48, 24),  # RTX 4090
    90: Arch(132, 232_448, 233_472, 64, 32),  # H100
}


@dataclass(frozen=True)
class Resources:
    """One compiled kernel. ``flags`` names the optional tensors that were given."""

    kernel: str
    C: int
    K: int
    dtype: str
    arch: int
    flags: str
    registers: int  # per thread
    spills: int  # local loads and stores in the code
    stack: int  # bytes per thread
    shared: int  # bytes per block
    warps: int
    blocks_per_sm: int
    mma: int  # tensor-core instructions in the code
    async_copies: int  # cp.async instructions in the code

    def fits(self) -> bool:
        return self.spills == 0 and self.stack == 0 and self.blocks_per_sm > 0


def launch_everything(dtype: torch.dtype, convolutions=CONVOLUTIONS) -> None:
    """Call every launcher on meta tensors, in every form that the package uses."""

    def empty(*shape, dtype=torch.float32):
        t = torch.empty(shape, dtype=dtype, device="meta")
        return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

    for C, K, H, stride in convolutions:
        x = empty(BATCH, C, H, H, dtype=dtype)
        weight, dweight = empty(K, C, 3, 3, dtype=dtype), empty(K, C, 3, 3)
        vectors = [empty(K) for _ in range(4)]
        y, partials, _ = conv3x3_fwd(x, weight, stride=stride, sums=True)
        conv3x3_fwd(x, weight, stride=stride, running=(*vectors, 1e-5), shortcut=y, relu=True)
        affine = bn.bn_merge_fwd(partials, *vectors, 0.1, 1e-5)
        bn.bn_apply_fwd(y, affine, y, relu=True)
        dz, partials = bn.bn_reduce_bwd(y, y, affine, y, relu=True, write_dz=True)
        bn.bn_reduce_bwd(y, y, affine, None, relu=True, write_dz=False)
        pixels = y.numel() // K
        coef, _, _ = bn.bn_merge_bwd(partials, affine, pixels, training=True, dtype=torch.float32)
        step = {"stride": stride, "relu": True}
        if C == 3:
            launch_around_the_network(dtype, H)
            conv3x3_bwd(dz, y, coef, x, weight, **step, dx=False, dweight=dweight)
            continue
        below = empty(4, C)
        conv3x3_bwd(dz, y, coef, x, weight, **step, dx=True, dweight=None)
        conv3x3_bwd(dz, y, coef, x, weight, **step, dx=True, dweight=dweight)
        # the raw dataflow: activations normalised on load, sums left by the backward
        conv3x3_fwd(x, weight, stride=stride, sums=True, x_affine=below)
        conv3x3_fwd(x, weight, stride=stride, sums=True, x_affine=below, x_shortcut=x, keep=True)
        raw = {"raw": x, "raw_affine": below}
        step = {"stride": stride, "relu": False, "dx": True, "dweight": dweight}
        conv3x3_bwd(dz, y, coef, x, weight, **step, **raw, x_affine=below)
        conv3x3_bwd(dz, y, coef, x, weight, **step, **raw, residual=x)
        if stride == 2:
            shortcut_a_bwd(shortcut_a_fwd(x, K, stride), C, H, H, stride)


def launch_around_the_network(dtype: torch.dtype, H: int) -> None:
    """The batch and the update, which a step begins and ends with."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    batches = 48
    for sets, mix, mode in ((1, None, "zeros"), (2, empty(6, batches), "reflect")):
        load_batch(
            empty(50_000, H, H, 3, dtype=torch.uint8),
            empty(50_000, dtype=torch.int64),
            empty(256, 3, dtype=dtype),
            empty(6 * sets, batches * BATCH, dtype=torch.int32),
            empty(dtype=torch.int64),
            batch_size=BATCH,
            padding=4,
            padding_mode=mode,
            cutout=8,
            mix=mix,
        )
    labels = empty(BATCH, dtype=torch.int64)
    for classes in (10, 100, 1000):
        layer = empty(BATCH, 64), empty(classes, 64), empty(classes)
        for mixed in ((None, None), (labels, empty())):
            linear_cross_entropy(*layer, labels, *mixed, label_smoothing=0.1, gradients=True)
    flat, scalar, count = [empty(853_056)] * 3, [empty()] * 2, empty(dtype=torch.int32)
    settings = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    sgd(*flat, *scalar, count, decayed=853_056, **settings)
    record_step(
        empty(3, 48),
        *scalar,
        count,
        empty(dtype=torch.int64),
        empty(),
        empty(7680),
    )


@contextmanager
def compiling_for(arch: int, report) -> Iterator[None]:
    """Launches compile for ``arch`` and go to ``report`` instead of a GPU."""
    replaced = {
        "launch": lambda kernel, grid, **arguments: report(kernel, arguments),
        "capability": lambda device: divmod(arch, 10),
        "multiprocessors": lambda device: ARCHS[arch].multiprocessors,
    }
    kept = {name: getattr(launch, name) for name in replaced}
    for name, value in replaced.items():
        setattr(launch, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(launch, name, value)


def compile_kernel(kernel, arguments: dict, arch: int):
    """Compile as a launch with these arguments would: None and 1 become constants, pointers and
    multiples of 16 are known to be such."""
    signature, constants, attributes = {}, {}, {}
    settings = ("num_warps", "num_stages", "maxnreg")
    options = {key: arguments[key] for key in settings if arguments.get(key) is not None}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def read_resources(compiled, arch: int) -> dict[str, int]:
    """Resource usage of a compiled kernel, from its machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers = int(re.search(r"REG:(\d+)", code)[1])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    limits = ARCHS[arch]
    blocks = 0
    if shared <= limits.shared_per_block:
        # 65,536 registers an SM, allotted to a warp in units of 256; the driver keeps 1 KB a block
        registers_per_warp = -(-registers * 32 // 256) * 256
        blocks = min(
            65_536 // registers_per_warp // warps,
            limits.warps_per_sm // warps,
            limits.blocks_per_sm,
            limits.shared_per_sm // (shared + 1024),
        )

    def count(*instructions):
        return sum(len(re.findall(rf"\s{name}[.\s]", code)) for name in instructions)

    return {
        "registers": registers,
        "spills": count("LDL", "STL"),
        "stack": int(re.search(r"STACK:(\d+)", code)[1]),
        "shared": shared,
        "warps": warps,
        "blocks_per_sm": blocks,
        "mma": count("HMMA", "HGMMA"),
        "async_copies": count("LDGSTS"),
    }


def kernel_resources(arch: int, dtype: str, convolutions=CONVOLUTIONS) -> Iterator[Resources]:
    """Resources of every kernel that the family's network launches in ``dtype`` on ``arch``."""
    launches = {}

    def record(kernel, arguments):
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        flags = " ".join(
            key.removesuffix("_ptr")
            for key, value in arguments.items()
            if key in OPTIONAL and value is not None
        )
        # a kernel without C has as many input channels as output channels; 0 where there are none
        K = arguments.get("K", 0)
        sizes = (arguments.get("C", K), K)
        launches.setdefault((name, *sizes, flags), (kernel, arguments))

    with compiling_for(arch, record):
        launch_everything(DTYPES[dtype], convolutions)
    for (name, C, K, flags), (kernel, arguments) in launches.items():
        compiled = compile_kernel(kernel, arguments, arch)
        yield Resources(name, C, K, dtype, arch, flags, **read_resources(compiled, arch))


OPTIONAL = {
    "x_affine_ptr",
    "x_shortcut_ptr",
    "partials_ptr",
    "running_mean_ptr",
    "shortcut_ptr",
    "coef_ptr",
    "residual_ptr",
    "raw_ptr",
    "a_ptr",
    "dz_ptr",
    "dy_ptr",
    "copy_ptr",
    "labels_b_ptr",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.triton_report", description=__doc__.split(":")[0]
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=ARCHS,
        default=list(ARCHS),
        help="architectures to compile for (default: all)",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="data types (default: all)",
    )
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("triton_report compiles: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    misfits = 0
    print(f"triton {triton.__version__}")
    print(
        f"{'arch':5} {'dtype':5} {'kernel':16} {'C':>3} {'K':>3} {'regs':>4} {'spill':>5} "
        f"{'stack':>5} {'shared':>6} {'warps':>5} {'blk/SM':>6} {'mma':>4} {'async':>5} given"
    )
    for arch in options.arch:
        for dtype in options.dtype:
            for r in kernel_resources(arch, dtype):
                misfits += not r.fits()
                print(
                    f"sm_{r.arch} {r.dtype:5} {r.kernel:16} {r.C:3} {r.K:3} {r.registers:4} "
                    f"{r.spills:5} {r.stack:5} {r.shared:6} {r.warps:5} {r.blocks_per_sm:6} "
                    f"{r.mma:4} {r.async_copies:5} {r.flags}{'' if r.fits() else '  <- MISFIT'}",
                    flush=True,
                )
    print(f"{misfits} kernels spill or do not fit")
    return 1 if misfits else 0


if __name__ == "__main__":
    sys.exit(main())
