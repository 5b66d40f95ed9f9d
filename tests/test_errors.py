"""What an error says in one line, whatever its message is."""

import ast
from pathlib import Path

import pytest
import torch

import cifar_resnet_fast
from cifar_resnet_fast import ops
from cifar_resnet_fast.errors import first_line, is_out_of_memory

ROOT = Path(cifar_resnet_fast.__file__).parents[1]
SOURCES = [
    path
    for room in ("cifar_resnet_fast", "bench", "tools")
    for path in (ROOT / room).rglob("*.py")
]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("CUDA error: invalid argument\nCompile with ..."),
            "CUDA error: invalid argument",
        ),
        (RuntimeError("\n\n  indented \nand more"), "indented"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError(" \n"), "MemoryError"),
    ],
    ids=["two-lines", "blank-lines-first", "no-message", "white-space"],
)
def test_first_line(error, line):
    assert first_line(error) == line


def test_no_other_way_to_take_it():
    """An index into an error's lines is an IndexError for an error without a message."""
    assert len(SOURCES) > 50
    for path in SOURCES:
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found = ast.unparse(node) if isinstance(node, ast.Subscript) else ""
            assert "str(error).s" not in found, f"{path}: {found}"


OF_THE_EXTENSION = "torch_call_dispatcher(...) API call failed at torch/csrc/stable/ops.h, line 9"


@pytest.mark.parametrize(
    ("error", "refused", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), 0, True),
        (RuntimeError(OF_THE_EXTENSION), 1, True),
        (RuntimeError(OF_THE_EXTENSION), 0, False),
        (RuntimeError(f"CUDA out of memory. (originally from {OF_THE_EXTENSION})"), 0, True),
        (RuntimeError("y must be channels-last"), 1, False),
        (ValueError(OF_THE_EXTENSION), 1, False),
    ],
    ids=["torchs", "torch-2.11", "another", "torch-2.13", "after-one", "no-runtime-error"],
)
def test_memory_that_runs_out_is_known(error, refused, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": refused})
    assert is_out_of_memory(error) is expected


def test_an_error_of_an_allocation_in_the_extension_looks_so():
    """The words are PyTorch's: a result of 4 PiB, on the CPU."""
    if ops.WHY_NOT_LOADED["_C"] is not None:
        pytest.skip(ops.WHY_NOT_LOADED["_C"])
    x = torch.zeros(2**20, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="API call failed at") as raised:
        torch.ops.cifar_resnet_fast.shortcut_a(x, 2**30, 2)
    assert type(raised.value) is RuntimeError
