"""The CUDA kernels on a CPU: csrc/*/*.cu compiled by the C++ compiler against emulator.h.

``load()`` builds them once a change of the sources, and gives the ``Kernels``;
``load_operations()`` gives CPU tensors the operations that torch calls them by.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc"
# -O1: built and run in the least time together. longjmp between stacks is what a fiber does; the
# fortified one refuses it
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
# A compiler may link libstdc++ statically. That copy must stay inside: mixed with the one that
# PyTorch loads, the first number written to a stream crashes.
LINK_FLAGS = ["-shared", "-Wl,--exclude-libs,ALL"]

DTYPES = {torch.float16: 0, torch.bfloat16: 1}  # as enum class Dtype
ORDERS = ("round_robin", "first_warp_first", "last_warp_first")  # as enum class Order
SHORTCUTS = ("none", "identity", "option_a")  # as enum class Shortcut
WEIGHT_LAYOUTS = ("contiguous", "channels_last")  # as enum class WeightLayout
FAILED = -1000


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


class Kernels:
    """The emulated functions, and the params structs they take: ``params`` fills one."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.emulated_failure.restype = ctypes.c_char_p
        library.emulated_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.types, self.writable = _structures(library)

    def params(self, structure: str, **fields) -> ctypes.Structure:
        """Tensors become pointers, dictionaries inner structs; None is a null pointer."""
        filled = self.types[structure]()
        filled.tensors = []  # kept alive, with whether the kernel may write them
        for name, value in fields.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous(), name
                filled.tensors.append((value, self.writable[structure, name]))
                value = value.data_ptr()
            elif isinstance(value, dict):
                value = self.params(dict(filled._fields_)[name].__name__, **value)
                filled.tensors += value.tensors
            assert name in dict(filled._fields_), name
            setattr(filled, name, value)
        return filled

    def call(self, function: str, params: ctypes.Structure, dtype: torch.dtype, *sizes: int):
        """Runs a kernel that may touch the tensors in ``params`` and nothing else."""
        for tensor, writable in params.tensors:
            size = tensor.numel() * tensor.element_size()
            self.library.emulated_allow(tensor.data_ptr(), size, writable)
        run = getattr(self.library, f"emulated_{function}")
        return self._ended(run(ctypes.byref(params), DTYPES[dtype], *sizes))

    def shortcut_a(self, shape: Sequence[int], backward: bool, given: Tensor, made: Tensor):
        """Fills the shortcut ``made`` from x, or backward dx from dout; all channels-last.

        Args:
            shape: N, C, H, W of x, K of the shortcut, stride
            backward: whether ``given`` is dout
        """
        N, C, H, W, K, stride = shape
        size = given.itemsize
        wide = C * size % 16 == 0 and (K - C) // 2 * size % 16 == 0  # as bindings/operations.h
        chunk_bytes = 16 if wide else size
        sizes = (ctypes.c_longlong * 7)(N, H, W, C, K, stride, chunk_bytes // size)
        for tensor, writable in ((given, False), (made, True)):
            self.library.emulated_allow(tensor.data_ptr(), tensor.nbytes, writable)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, made)]
        run = self.library.emulated_shortcut_a
        return self._ended(run(sizes, int(backward), chunk_bytes, *pointers))

    def _ended(self, status: int) -> int:
        self.library.emulated_forbid_all()
        if status == FAILED:
            raise RuntimeError(self.library.emulated_failure().decode())
        return status

    def set_order(self, order: str) -> None:
        """How warps take turns: one of ``ORDERS``."""
        self.library.emulated_order(ORDERS.index(order))


class _Field(ctypes.Structure):
    _fields_ = [
        ("structure", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_char_p),
        ("offset", ctypes.c_int),
    ]


def _structures(library) -> tuple[dict[str, type], dict[tuple[str, str], bool]]:
    """ctypes twins of the C++ structs, and which of their pointers may be written through."""
    count = ctypes.c_int()
    library.emulated_fields.restype = ctypes.POINTER(_Field)
    table = library.emulated_fields(ctypes.byref(count))[: count.value]
    known = {"int": ctypes.c_int, "float": ctypes.c_float}
    known |= {"read": ctypes.c_void_p, "write": ctypes.c_void_p}
    members, writable = {}, {}
    for field in table:
        structure, name, kind = (v.decode() for v in (field.structure, field.name, field.type))
        members.setdefault(structure, []).append((name, kind, field.offset))
        writable[structure, name] = kind == "write"
    types = {}
    for structure, fields in members.items():
        layout = [(name, (known | types)[kind]) for name, kind, _ in fields]
        types[structure] = type(structure, (ctypes.Structure,), {"_fields_": layout})
        for name, _, offset in fields:
            assert getattr(types[structure], name).offset == offset, f"{structure}.{name}"
    return types, writable


@functools.cache
def load() -> Kernels:
    """The kernels, built in a temporary folder that outlives the session."""
    units = [HERE / "emulator.cpp", HERE / "bindings.cpp", *SOURCES.glob("*/*.cu")]
    flags = [f"-I{HERE}", "-x", "c++", "-include", str(HERE / "emulator.h")]
    return Kernels(ctypes.CDLL(str(_build("emulated_kernels.so", units, flags))))


@functools.cache
def load_operations() -> None:
    """Registers csrc/bindings/trunk.h's operations for CPU tensors, on the emulated kernels."""
    kernels = Path(load().library._name)
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [str(kernels), f"-Wl,-rpath,{kernels.parent}", f"-L{torch_libraries}"]
    link += ["-ltorch_cpu", "-ltorch"]
    torch.ops.load_library(_build("operations.so", [HERE / "operations.cpp"], flags, link))


def _build(name: str, units: list[Path], flags: list[str], link: Sequence[str] = ()) -> Path:
    """A shared library, built once a change of the sources, of torch or of the flags."""
    key = hashlib.sha256(" ".join([compiler(), *FLAGS, *LINK_FLAGS, torch.__version__]).encode())
    for source in sorted([*HERE.glob("*.[ch]*"), *SOURCES.glob("*/*")]):
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = (
        Path(tempfile.gettempdir()) / f"cifar_resnet_fast_{os.getuid()}_{key.hexdigest()[:16]}"
    )
    folder.mkdir(exist_ok=True)
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:

            def compile_unit(unit: Path) -> str:
                target = f"{scratch}/{unit.parent.name}_{unit.name}.o"
                call = [compiler(), *FLAGS, f"-I{SOURCES}", *flags, "-c", str(unit)]
                subprocess.run([*call, "-o", target], check=True)
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_unit, units))
            built = Path(scratch) / name
            call = [compiler(), *LINK_FLAGS, *objects, *link, "-o", str(built)]
            subprocess.run(call, check=True)
            built.rename(library)
    return library
