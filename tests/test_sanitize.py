"""tests/sanitize.sh: what it watches, and its tools one by one, without a GPU."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import sanitized
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]


class Seen(TorchDispatchMode):
    """Operations of the package, each with the dtypes of the tensors that it takes and gives."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "cifar_resnet_fast":
            tensors = [
                t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)
            ]
            name = func.name().partition("::")[2].partition(".")[0]
            self.calls.append((name, {t.dtype for t in tensors}))
        return result


def test_every_operation_of_the_extension_is_watched(kernels_run, monkeypatch, capsys):
    """Each in both dtypes; so a new one has to be added to the runs."""
    kernels_run("cuda")
    bound = set()
    for source in sorted((ROOT / "csrc" / "bindings").iterdir()):
        bound |= set(re.findall(r'm\.def\(\s*"(\w+)\(', source.read_text()))
    assert len(bound) >= 15
    monkeypatch.setattr("cifar_resnet_fast.ops._trunk.cuda.multiprocessors", lambda _: 4)
    monkeypatch.setattr(sanitized, "BATCHES", sanitized.BATCHES[:1])  # the emulation is slow
    with Seen() as seen:
        assert sanitized.main(torch.device("cpu")) == 0
    for name in bound:
        found = set().union(*(dtypes for operation, dtypes in seen.calls if operation == name))
        # slabs are float32, whatever the activations are
        expected = {torch.float32} if name == "sum_slabs" else {torch.float16, torch.bfloat16}
        assert expected <= found, name
    assert len(capsys.readouterr().out.splitlines()) == 2 * 2 + 4


def test_batches_have_both_ways_through_a_kernel():
    assert any(batch <= sanitized.BLOCKS for batch in sanitized.BATCHES)
    assert any(
        batch > 2 * sanitized.BLOCKS and batch % sanitized.BLOCKS for batch in sanitized.BATCHES
    )


def test_what_is_not_finite_fails(monkeypatch, capsys):
    made = [("right", lambda: [torch.ones(2)]), ("wrong", lambda: [torch.tensor([float("nan")])])]
    monkeypatch.setattr(sanitized, "runs", lambda device: iter(made))
    monkeypatch.setattr("cifar_resnet_fast.ops._trunk.cuda.multiprocessors", None)
    assert sanitized.main(torch.device("cpu")) == 1
    out = capsys.readouterr().out
    assert out == "right\nwrong: results must be finite, those of shapes [(1,)] are not\n"


@pytest.fixture
def sanitize(tmp_path):
    """A function that runs the script with a sanitizer and a Python that stand in."""

    def run(*tools, sanitizer='echo "$@"', limit=None):
        for name, body in (("compute-sanitizer", sanitizer), ("python", "exit 0")):
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        script = ROOT / "tests" / "sanitize.sh"
        if limit:  # a copy, beside a link to what it changes to
            (tmp_path / "tests").mkdir()
            text = script.read_text().replace("SECONDS_A_TOOL=120", f"SECONDS_A_TOOL={limit}")
            script = tmp_path / "tests" / "sanitize.sh"
            script.write_text(text)
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python"),
        }
        return subprocess.run(
            ["bash", script, *tools], env=environment, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize("named", [[], ["racecheck"], ["synccheck", "memcheck"]])
def test_the_tools_that_are_named_run(named, sanitize):
    done = sanitize(*named)
    assert (done.returncode, done.stderr) == (0, "")
    found = re.findall(r"--tool (\w+) --error-exitcode 1 \S+ tests/sanitized.py", done.stdout)
    assert found == (named or TOOLS)


def test_another_tool_is_one_line(sanitize):
    done = sanitize("memcheck", "racechek")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tools are {' '.join(TOOLS)}, got racechek\n"


def test_a_tool_that_finds_something_does_not_stop_the_others(sanitize):
    done = sanitize(sanitizer='echo "$@"; [ "$2" != racecheck ]')
    assert done.returncode == 1
    assert re.findall(r"--tool (\w+)", done.stdout) == TOOLS


def test_a_tool_has_a_limit(sanitize):
    done = sanitize("initcheck", "memcheck", sanitizer="exec sleep 60", limit=1)
    assert done.returncode == 1
    assert done.stderr == "initcheck has not ended after 1 s\nmemcheck has not ended after 1 s\n"


def test_all_tools_take_at_most_eight_minutes():
    text = (ROOT / "tests" / "sanitize.sh").read_text()
    (limit,) = re.findall(r"^SECONDS_A_TOOL=(\d+)$", text, re.MULTILINE)
    assert len(TOOLS) * int(limit) <= 8 * 60
