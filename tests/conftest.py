"""Fixtures of all tests. Without a GPU, Triton kernels run in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory) -> Path:
    """A .npz file with the first pictures of the real CIFAR-10, where its sheets are at hand."""
    unpack = Path(__file__).parents[2] / "shared" / "data" / "unpack_cifar10.py"
    if not unpack.exists():
        pytest.skip(f"the real CIFAR-10 is not here: no {unpack}")
    path = tmp_path_factory.mktemp("cifar10") / "cifar10.npz"
    subprocess.run([sys.executable, unpack, path, "--limit", "5000"], check=True)
    return path


@pytest.fixture
def poisoned_memory():
    """Memory that torch hands out, to C++ too, holds NaN in place of what was there by chance.

    Not under tests/sanitize.sh, whose initcheck looks for memory that nothing has written.
    """
    if os.environ.get("SANITIZED"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
