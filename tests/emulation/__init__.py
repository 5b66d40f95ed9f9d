"""The CUDA kernels on a CPU: csrc/kernels compiled by the C++ compiler against emulator.h.

``load()`` builds once a change of the sources and returns the module of bindings.cpp; ``params``
fills one of its structs from tensors.
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc" / "kernels"
# longjmp between stacks is what a fiber does; the fortified one refuses it
FLAGS = ["-O2", "-std=c++20", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def load():
    """The module ``emulated_kernels``, built in a temporary folder that outlives the session."""
    import pybind11

    units = [HERE / "emulator.cpp", HERE / "bindings.cpp", *sorted(KERNELS.glob("*.cu"))]
    sources = [*units, HERE / "emulator.h", *KERNELS.glob("*.cuh"), *KERNELS.glob("*.h")]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    key = hashlib.sha256(" ".join([*FLAGS, compiler(), suffix]).encode())
    for source in sorted(sources):
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = (
        Path(tempfile.gettempdir()) / f"cifar_resnet_fast_{os.getuid()}_{key.hexdigest()[:16]}"
    )
    library = folder / f"emulated_kernels{suffix}"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            includes = [f"-I{KERNELS}", f"-I{HERE}", f"-I{pybind11.get_include()}"]
            includes.append(f"-I{sysconfig.get_path('include')}")

            def compile_unit(unit: Path) -> str:
                target = f"{scratch}/{unit.name}.o"
                language = ["-x", "c++", "-include", str(HERE / "emulator.h")]
                call = [compiler(), *FLAGS, *includes, *language, "-c", str(unit), "-o", target]
                subprocess.run(call, check=True)
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_unit, units))
            built = Path(scratch) / library.name
            subprocess.run([compiler(), "-shared", *objects, "-o", str(built)], check=True)
            built.rename(library)
    spec = importlib.util.spec_from_file_location("emulated_kernels", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def params(struct: type, **fields):
    """A params struct: tensors become pointers with their size, dictionaries inner structs.

    It keeps the tensors alive.
    """
    filled = struct()
    filled.fields = fields
    for name, value in fields.items():
        if isinstance(value, Tensor):
            assert value.is_contiguous(), name
            setattr(filled, name, (value.data_ptr(), value.numel() * value.element_size()))
        elif isinstance(value, dict):
            setattr(filled, name, params(type(getattr(filled, name)), **value))
        elif value is not None:
            setattr(filled, name, value)
    return filled
