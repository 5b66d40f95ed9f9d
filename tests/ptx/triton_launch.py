"""The package's Triton launches on the interpreter: compiled for a GPU as far as PTX, and run.

For a process of its own, without TRITON_INTERPRET: see worker.py.
"""

import hashlib
import os
import struct
import tempfile
from pathlib import Path

# before Triton is imported; not the user's, for what is compiled here ends at PTX
os.environ["TRITON_CACHE_DIR"] = str(
    Path(tempfile.gettempdir()) / f"cifar_resnet_fast_{os.getuid()}_ptx_triton"
)

import torch
from triton.backends.nvidia.compiler import CUDABackend

from cifar_resnet_fast.kernels import launch
from cifar_resnet_fast.ops import _dispatch
from ptx.cuda import Machine
from tools import triton_report

MULTIPROCESSORS = 2  # several programs, and several tiles a program


class Launches(Machine):
    """Takes the place of ``kernels.launch.launch``; each launch runs in every order of warps, from
    the same memory, and must leave the same bits.

    Args:
        architecture: compute capability that the code is compiled for
    """

    def __init__(self, architecture: int):
        super().__init__(architecture)
        self.compiled = {}
        self.launched = set()  # the names of kernels
        CUDABackend.make_cubin = lambda *_, **__: b""  # no ptxas
        launch.launch = self.launch
        launch.capability = lambda device: divmod(architecture, 10)
        launch.multiprocessors = lambda device: MULTIPROCESSORS
        _dispatch.why_not_triton = lambda device: None

    def compile(self, kernel, arguments: dict) -> tuple[str, int, int]:
        """Name in PTX, threads and bytes of shared memory for a launch with these arguments."""
        key = [kernel.fn.__name__]
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                key.append(value.dtype)
            elif isinstance(value, int) and not parameter.is_constexpr:
                key.append((value == 1, value % 16 == 0))
            else:
                key.append("float" if isinstance(value, float) else value)
        key += [arguments.get(option) for option in ("num_warps", "num_stages", "maxnreg")]
        key = tuple(map(str, key))
        if key not in self.compiled:
            made = triton_report.compile_kernel(kernel, arguments, self.machine.architecture)
            entry = f"{key[0]}_{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"
            self.machine.load(made.asm["ptx"].replace(key[0], entry))
            self.compiled[key] = entry, 32 * made.metadata.num_warps, made.metadata.shared
        return self.compiled[key]

    def launch(self, kernel, grid: tuple[int, ...], **arguments) -> None:
        self.launched.add(kernel.fn.__name__)
        entry, threads, shared = self.compile(kernel, arguments)
        tensors, values = [], []
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                continue
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                assert value.data_ptr() % 16 == 0, f"{parameter.name} is not aligned"
                values.append(struct.pack("<Q", value.data_ptr()))
            else:
                values.append(struct.pack("<i" if isinstance(value, int) else "<f", value))
        places = self.machine.parameters(entry)
        block = bytearray(places[-1][0] + places[-1][1])
        values += [bytes(8)] * (len(places) - len(values))  # Triton's scratch memory: none
        for (offset, size), value in zip(places, values, strict=True):
            assert len(value) == size, f"{entry}: parameters"
            block[offset : offset + size] = value
        memory = [whole_memory(tensor) for tensor in tensors]
        for tensor in memory:
            self.machine.allow(tensor.numpy(), True)
        self.in_every_order(
            entry,
            memory,
            lambda: self.machine.run(entry, (*grid, 1, 1)[:3], threads, shared, bytes(block)),
        )
        self.machine.forbid_all()


def whole_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes that a tensor spans: channels-last, or every pixel's first three of four
    channels, of which a kernel may write the fourth."""
    storage = tensor.untyped_storage()
    start = tensor.storage_offset() * tensor.element_size()
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    size = (last + 1) * tensor.element_size()
    if tensor.dim() == 4 and tensor.stride(3) == 4 and tensor.shape[1] == 3:
        size += tensor.element_size()
    return torch.tensor([], dtype=torch.uint8).set_(storage, start, (size,))
