"""Builds what the tests of compiled code run: the interpreter, and the package's CUDA launchers
with the PTX of their kernels. Each is built once a change of its sources, in a temporary folder
that outlives the session."""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import emulation
import torch
from torch.utils import cpp_extension

from tools import ptxas_report

HERE = Path(__file__).parent
INTERPRETER = HERE / "interpreter"
CSRC = ptxas_report.ROOT / "csrc"
CXX_FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off")
LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL")


def why_not() -> str | None:
    """What is missing here for the CUDA kernels; None: nothing."""
    if ptxas_report.find_nvcc() is None:
        return "needs nvcc (CUDA_HOME, /usr/local/cuda or PATH)"
    return why_not_interpreter()


def why_not_interpreter() -> str | None:
    """What is missing here for the interpreter itself; None: nothing."""
    return "needs a C++ compiler" if emulation.compiler() is None else None


def run_all(commands: Iterable[Sequence]) -> None:
    """Runs all of them, as many at a time as there are cores."""

    def run(command: Sequence) -> None:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


def built(name: str, sources: Iterable[Path], words: Iterable, build) -> Path:
    """The folder in which ``build(folder)`` has been run with these sources and words."""
    key = hashlib.sha256("\0".join(map(str, words)).encode())
    for source in sorted(sources):
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    key = key.hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"cifar_resnet_fast_{os.getuid()}_{name}_{key}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            build(made)
            try:
                made.rename(folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return folder


@functools.cache
def interpreter() -> ModuleType:
    """The module of interpreter/binding.cpp."""
    units = [unit for unit in INTERPRETER.glob("*.cpp") if unit.name != "runtime.cpp"]
    # pybind11's headers come with torch
    includes = [sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include"]
    flags = [*CXX_FLAGS, "-O2", "-march=native", "-fvisibility=hidden"]
    flags += [f"-isystem{path}" for path in includes]

    def build(folder: Path) -> None:
        compiler = emulation.compiler()
        objects = {unit: folder / f"{unit.stem}.o" for unit in units}
        # the longest first
        order = sorted(units, key=lambda unit: unit.stem not in ("instructions", "binding"))
        run_all([compiler, *flags, "-c", unit, "-o", objects[unit]] for unit in order)
        run_all([[compiler, *LINK_FLAGS, *objects.values(), "-o", folder / "ptx_interpreter.so"]])

    sources = [*units, *INTERPRETER.glob("*.h")]
    folder = built("ptx_interpreter", sources, [emulation.compiler(), *flags], build)
    spec = importlib.util.spec_from_file_location("ptx_interpreter", folder / "ptx_interpreter.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def launchers(architecture: int) -> Path:
    """A folder with kernels.so, the host code of csrc on runtime.cpp, and each unit's .ptx.

    Args:
        architecture: compute capability to compile for, 86 for 8.6
    """
    nvcc = Path(ptxas_report.find_nvcc())
    target = f"arch=compute_{architecture},code=compute_{architecture}"  # no machine code
    flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-cudart", "none", "-gencode", target]
    cuda = nvcc.parents[1] / "include"
    if not cuda.exists():
        cuda = Path("/usr/local/cuda/include")
    units = sorted(ptxas_report.sources(), key=lambda unit: -unit.stat().st_size)
    ours = [INTERPRETER / "runtime.cpp", emulation.HERE / "bindings.cpp"]

    def build(folder: Path) -> None:
        commands, objects = [], []
        for unit in units:
            name = f"{unit.parent.name}_{unit.stem}"
            kept = folder / name
            kept.mkdir()
            objects.append(kept / "unit.o")
            keep = ["--keep", "--keep-dir", kept, "-c", unit, "-o", objects[-1]]
            commands.append([nvcc, *flags, f"-I{CSRC}", *keep])
        flags_here = [*CXX_FLAGS, "-O1", f"-I{CSRC}", f"-I{emulation.HERE}", f"-isystem{cuda}"]
        for unit in ours:
            objects.append(folder / f"{unit.stem}.o")
            commands.append([emulation.compiler(), *flags_here, "-c", unit, "-o", objects[-1]])
        run_all(commands)
        run_all([[emulation.compiler(), *LINK_FLAGS, *objects, "-o", folder / "kernels.so"]])
        for unit in units:
            kept = folder / f"{unit.parent.name}_{unit.stem}"
            next(kept.glob("*.ptx")).rename(folder / f"{kept.name}.ptx")
            shutil.rmtree(kept)

    sources = [*ours, INTERPRETER / "hooks.h", emulation.HERE / "engine.h"]
    sources += [path for path in CSRC.rglob("*") if path.is_file()]
    words = [emulation.compiler(), nvcc, *flags]
    return built(f"ptx_kernels_{architecture}", sources, words, build)


def load_operations(kernels: Path) -> None:
    """Registers the trunk's operations for CPU tensors, on the launchers of ``kernels``.

    They take the place of those of emulation.load_operations: for a process of its own.
    """
    torch_libraries = Path(torch.__file__).parent / "lib"
    flags = [*CXX_FLAGS, "-O1", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-I{CSRC}", f"-I{emulation.HERE}"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    link = [kernels / "kernels.so", f"-Wl,-rpath,{kernels}", f"-L{torch_libraries}"]
    unit = emulation.HERE / "operations.cpp"

    def build(folder: Path) -> None:
        call = [emulation.compiler(), *flags, "-shared", unit, *link, "-ltorch_cpu", "-ltorch"]
        run_all([[*call, "-o", folder / "operations.so"]])

    sources = [unit, emulation.HERE / "engine.h", *CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]
    words = [emulation.compiler(), torch.__version__, *flags, *link]
    folder = built("ptx_operations", sources, words, build)
    torch.ops.load_library(folder / "operations.so")
