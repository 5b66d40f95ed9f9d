"""Fixtures of all tests. Without a GPU, Triton kernels run in Triton's interpreter."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

from cifar_resnet_fast import ops
from cifar_resnet_fast.ops import _dispatch as choice
from cifar_resnet_fast.ops._trunk import cuda as trunk_cuda

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

# What a GPU changes behind the tests' back, undone once. By default cuDNN takes float32 in TF32,
# with 10 bits of mantissa, and may choose kernels whose sums differ from run to run; and cuBLAS
# refuses deterministic sums (see poisoned_memory) without a workspace of fixed size.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.deterministic = True
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA is first used

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell starts background jobs so, and the processes that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def one_thread():
    """So little work is done fastest by one; and the same number each time gives the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels():
    """The CUDA kernels' source, compiled for the CPU."""
    if emulation.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return emulation.load()


@pytest.fixture
def kernels_run(device, monkeypatch):
    """A function that makes the trunk's kernels of an implementation run here, by name.

    Without a GPU the CUDA ones run in the emulation, in two blocks, the Triton ones interpreted.
    """

    def prepare(implementation: str) -> None:
        if implementation == "triton":
            pytest.importorskip("triton")
        elif device.type == "cuda":
            reason = ops.why_not("cuda", device, "trunk")
            if reason is not None:
                pytest.skip(reason)
        else:
            if ops.WHY_NOT_LOADED["_C"] is not None:
                pytest.skip(ops.WHY_NOT_LOADED["_C"])
            if emulation.compiler() is None:
                pytest.skip("needs a C++ compiler")
            emulation.load_operations()
            emulation.load().set_order("last_warp_first")
            monkeypatch.setattr(choice, "why_not", lambda *_: None)
            monkeypatch.setattr(trunk_cuda, "multiprocessors", lambda _: 2)

    return prepare


@pytest.fixture(scope="session")
def unpack_cifar10() -> Path:
    """The script that unpacks the real CIFAR-10, where its sheets are at hand."""
    script = Path(__file__).parents[2] / "shared" / "data" / "unpack_cifar10.py"
    if not script.exists():
        pytest.skip(f"the real CIFAR-10 is not here: no {script}")
    return script


@pytest.fixture(scope="session")
def cifar10(unpack_cifar10, tmp_path_factory) -> Path:
    """A .npz file with the first images of the real CIFAR-10."""
    path = tmp_path_factory.mktemp("cifar10") / "cifar10.npz"
    subprocess.run([sys.executable, unpack_cifar10, path, "--limit", "5000"], check=True)
    return path


@pytest.fixture
def poisoned_memory():
    """Memory that torch hands out, to C++ too, holds NaN in place of what was there by chance."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser):
    parser.addoption(
        "--all-compiled",
        action="store_true",
        help="tests/ptx: the cases that take longer than CI has, too",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test marked own_process by a pytest of its own.

    A capture that fails poisons torch 2.11's CUDA generator for all that draws from it later.
    """
    alone = "PYTEST_OWN_PROCESS"
    if pyfuncitem.get_closest_marker("own_process") is None or alone in os.environ:
        return None
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", pyfuncitem.config.rootpath]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, alone: "1"},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        pytest.fail(f"in a process of its own:\n{ended.stdout}{ended.stderr}", pytrace=False)
    return True


@pytest.fixture
def guarded_memory(monkeypatch):
    """Fresh tensors hold NaN, and so does the memory around them, which must stay so."""
    pad = 4096  # elements on each side
    kept, real_empty = [], torch.empty

    def empty(*shape, dtype=None, device=None, memory_format=torch.contiguous_format):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        strides = real_empty(shape, device="meta", memory_format=memory_format).stride()
        size = torch.Size(shape).numel()
        buffer = real_empty(size + 2 * pad, dtype=dtype, device=device).fill_(float("nan"))
        kept.append((buffer, size))
        return buffer.as_strided(shape, strides, pad)

    def empty_like(t, dtype=None, memory_format=torch.preserve_format):
        if memory_format == torch.preserve_format:
            last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
            memory_format = torch.channels_last if last else torch.contiguous_format
        return empty(t.shape, dtype=dtype or t.dtype, device=t.device, memory_format=memory_format)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield
    for buffer, size in kept:
        assert buffer[:pad].isnan().all(), "written before a tensor"
        assert buffer[pad + size :].isnan().all(), "written behind a tensor"
