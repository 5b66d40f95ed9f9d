"""The CUDA kernels compiled ahead of time for four architectures, no GPU: nothing spills.

That a block asks for at most 99 KB of shared memory is a static_assert beside each geometry, so it
holds where these sources compile.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import emulation
import pytest

UNITS = sorted(emulation.SOURCES.glob("*.cu"))
ARCHITECTURES = ["80", "86", "89", "90"]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
FLAGS = ["-std=c++20", "-O3", "-Xptxas=-v", "-cubin"]

KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[Path, str], str]:
    """What ptxas says of each source for each architecture; kept until a source changes."""
    if NVCC is None:
        pytest.skip("needs nvcc")
    folder = emulation.cache_folder(NVCC, *FLAGS)

    def compile_one(job: tuple[Path, str]) -> str:
        unit, architecture = job
        kept = folder / f"{unit.stem}_{architecture}.txt"
        if not kept.exists():
            cubin = folder / f"{unit.stem}_{architecture}.cubin"
            call = [NVCC, *FLAGS, f"-arch=sm_{architecture}", str(unit), "-o", str(cubin)]
            done = subprocess.run(call, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            cubin.unlink()
            kept.write_text(done.stderr)
        return kept.read_text()

    jobs = list(product(UNITS, ARCHITECTURES))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))


@pytest.mark.timeout(1800)  # the first compiles everything: five minutes of one core
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_nothing_spills(reports, unit, architecture):
    """No kernel spills a register or keeps an array in local memory."""
    kernels = KERNEL.findall(reports[unit, architecture])
    assert kernels, "no kernel in the report"
    for name, stack, stores, loads, registers in kernels:
        print(f"sm_{architecture} {registers:>4} registers  {name}")
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} spills on sm_{architecture}"
