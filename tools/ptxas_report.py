"""What ptxas says of every CUDA kernel, without a GPU: ``python -m tools.ptxas_report``.

Compiles csrc/*/*.cu for every architecture the project supports, or with ``--arch 86`` for
that one, warnings being errors, and prints each kernel's registers, spilled bytes and static
shared memory. Needs nvcc.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tools import toolkit
from tools.machine_code import demangled, short_name

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 86, 89, 90)
FLAGS = (
    f"-I{ROOT / 'csrc'}",
    *("-std=c++20", "-O3", "-Xptxas", "-v"),
    "--threads=0",  # the architectures side by side
    *("-Xcompiler", "-Wall,-Wextra,-Werror", "-Werror", "all-warnings"),
    # as torch's extension builder sets them
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"),
    *("-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture; memory in bytes."""

    name: str
    architecture: int
    registers: int
    spilled: int
    shared: int


def find_nvcc() -> str | None:
    homes = [home for home, _ in toolkit.toolkits()]
    return str(homes[0] / "bin/nvcc") if homes else shutil.which("nvcc")


def report(source: Path, nvcc: str, architectures: Iterable[int] = ARCHITECTURES) -> list[Kernel]:
    """Compile ``source`` and read what ptxas reports.

    Args:
        source: a .cu file
        nvcc: the compiler
        architectures: compute capabilities, 86 for 8.6

    Raises:
        RuntimeError: it does not compile without warnings; has the compiler's words
    """
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *targets, "-c", str(source), "-o", f"{folder}/kernels.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    if result.returncode != 0:
        raise RuntimeError(f"{source} does not compile: {log}")
    kernels = []
    for entry in log.split("Compiling entry function")[1:]:
        shared = re.search(r"(\d+) bytes smem", entry)
        stored, loaded = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill", entry).groups()
        kernels.append(
            Kernel(
                name=short_name(demangled(re.search(r"'(\w+)'", entry)[1])),
                architecture=int(re.search(r"for 'sm_(\d+)", entry)[1]),
                registers=int(re.search(r"Used (\d+) registers", entry)[1]),
                spilled=int(stored) + int(loaded),
                shared=int(shared[1]) if shared else 0,
            )
        )
    return kernels


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*/*.cu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        help="architectures to compile for (default: all)",
    )
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("there is no nvcc (CUDA_HOME, /usr/local/cuda or PATH)")
    print(f"{'kernel':64} {'sm':>3} {'registers':>9} {'spilled':>7} {'shared':>7}")
    for source in sources():
        kernels = report(source, nvcc, options.arch)
        for k in sorted(kernels, key=lambda k: (k.name, k.architecture)):
            print(f"{k.name:64} {k.architecture:3} {k.registers:9} {k.spilled:7} {k.shared:7}")


if __name__ == "__main__":
    main()
