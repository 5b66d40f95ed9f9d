"""What an error says in one line, whatever its message is."""

import ast
from pathlib import Path

import pytest

import cifar_resnet_fast
from cifar_resnet_fast.errors import first_line

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
