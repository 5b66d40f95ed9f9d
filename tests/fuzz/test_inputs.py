"""Bad inputs of every kind, drawn by Hypothesis: each ends in one line, and nothing is lost.

The rule: the command line ends with status 2 (or 1 while it trains) and exactly one line on
stderr, an operation with a TypeError or ValueError of one line; within 10 seconds and 2 GB; and
what was there before is there after. What is taken must be right: a file whose bytes were changed
at random gives the same numbers as before or none.

A fixed seed and few examples by default; FUZZ_MINUTES=30 draws new ones for that long, and
FUZZ_TABLE names a file to which the counts are added (``make fuzz MINUTES=30``).
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from PIL import Image

from cifar_resnet_fast import FastResNet, ops
from cifar_resnet_fast.data.datasets import load_dataset
from cifar_resnet_fast.train import main
from cifar_resnet_fast.training.config import TrainConfig

MINUTES = float(os.environ.get("FUZZ_MINUTES", 0))
TABLE = os.environ.get("FUZZ_TABLE")
KINDS = ("checkpoint", "npz", "folder", "flags", "run folder", "operation")
SECONDS, BYTES = 10, 2 * 2**30
TINY = "--dataset shapes --limit 32 --depth 8 --batch-size 16 --epochs 1 --device cpu".split()


class Hang(BaseException):
    """Not an Exception, so that no handler of the package takes it."""


def hang(*_):
    raise Hang


def outcome(call) -> tuple[str, str]:
    """How a command line or an operation ended: "taken" or "one line", and what it said.

    Anything else fails: another exception, several lines, more time or memory than allowed.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shown = io.StringIO()
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with (
            contextlib.redirect_stderr(shown),
            contextlib.redirect_stdout(io.StringIO()) as said,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            status = call()
    except SystemExit as ended:
        status = ended.code
    finally:
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < BYTES, f"{grown} KB more"
    if status in (0, None):
        return "taken", said.getvalue()
    line = shown.getvalue()
    assert status in (1, 2), status
    assert line.startswith("error: "), line
    assert line.count("\n") == 1, line
    assert line[:-1].isprintable(), line
    return "one line", line


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


tally = dict.fromkeys(KINDS)


def count(kind: str, ended: str) -> None:
    tally[kind] = tally[kind] or {"tried": 0, "taken": 0, "one line": 0}
    tally[kind]["tried"] += 1
    tally[kind][ended] += 1


@pytest.fixture(scope="module", autouse=True)
def table():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    if TABLE:
        with open(TABLE, "a") as file:
            file.write(json.dumps({kind: counts for kind, counts in tally.items() if counts}))
            file.write("\n")


def fuzz(kind, strategy, examples, check):
    """Give ``check`` what the strategy draws: so many fixed ones, or new ones for a while."""

    def run(value):
        count(kind, check(value))

    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    if not MINUTES:
        settings(max_examples=examples, derandomize=True, **quiet)(given(strategy)(run))()
        return
    end = time.monotonic() + 60 * MINUTES / len(KINDS)
    while time.monotonic() < end:
        number = random.randrange(2**32)
        print(f"{kind}: seed {number}", flush=True)
        seed(number)(settings(max_examples=100, **quiet)(given(strategy)(run)))()


# --- bytes of files ------------------------------------------------------------------------------

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "cut", "insert", "remove", "repeat")),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes) -> bytes:
    for how, place, extra in changes:
        at = int(place * len(data))
        if how == "flip":
            data = data[:at] + bytes([data[at] ^ 1 << extra[0] % 8]) + data[at + 1 :]
        elif how == "set":
            data = data[:at] + extra + data[at + len(extra) :]
        elif how == "cut":
            data = data[:at]
        elif how == "insert":
            data = data[:at] + extra + data[at:]
        elif how == "remove":
            data = data[:at] + data[at + len(extra) :]
        else:
            data = data + data[at:]
        data = data or b"\0"
    return data


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just([[[]]]),
    st.builds(lambda size: torch.ones(size), st.integers(0, 5)),
    st.builds(lambda value: torch.full((16,), value), st.floats(width=32)),
    st.builds(lambda: torch.eye(4).to_sparse()),
    st.builds(lambda: torch.ones(16, device="meta")),
    st.builds(lambda: torch.ones(1).expand(2**40)),
    st.builds(lambda: torch.ones(16, dtype=torch.complex64)),
)


# --- the kinds -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    assert main([*TINY, "--out", str(folder)]) == 0
    return folder


def test_checkpoints(finished, tmp_path):
    path, data = tmp_path / "c.pt", (finished / "checkpoint.pt").read_bytes()
    content = torch.load(finished / "checkpoint.pt", weights_only=True)
    arguments = ["--eval", str(path), "--dataset", "shapes", "--limit", "32", "--device", "cpu"]
    path.write_bytes(data)
    right = outcome(lambda: main(arguments))
    assert right[0] == "taken"
    names = st.sampled_from(sorted(content["state_dict"]))
    places = st.one_of(
        st.tuples(st.just("state_dict"), names),
        st.tuples(st.sampled_from(sorted(content))),
        st.tuples(st.just("state_dict"), st.text(max_size=6)),
    )

    def check(value):
        if isinstance(value, list):
            path.write_bytes(changed(data, value))
        else:
            place, odd = value
            parts = {**content, "state_dict": dict(content["state_dict"])}
            inner = parts if len(place) == 1 else parts["state_dict"]
            inner[place[-1]] = odd
            torch.save(parts, path)
        before = path.read_bytes()
        ended, said = outcome(lambda: main(arguments))
        assert path.read_bytes() == before
        if ended == "taken" and isinstance(value, list):
            assert said == right[1], "other weights were taken"
        return ended

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz("checkpoint", st.one_of(CHANGES, st.tuples(places, ODD_VALUES)), 60, check)


ARRAYS = {
    "x_train": np.zeros((20, 32, 32, 3), np.uint8),
    "y_train": np.arange(20) % 4,
    "x_test": np.zeros((8, 32, 32, 3), np.uint8),
    "y_test": np.arange(8) % 4,
}
ODD_ARRAYS = st.one_of(
    st.none(),
    st.builds(
        lambda shape, dtype: np.zeros(shape, dtype),
        st.lists(st.integers(0, 33), max_size=4).filter(lambda s: np.prod(s, dtype=float) < 1e5),
        st.sampled_from(("u1", "i8", "f4", "U3", "S2", "c8", "O", "?", "M8[s]")),
    ),
    st.builds(lambda top: np.full(20, top, np.int64), st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda top: np.full(20, top, np.uint64), st.integers(0, 2**64 - 1)),
)


def test_npz(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **ARRAYS)
    data = path.read_bytes()
    arguments = [*TINY, "--limit", "16", "--out", str(tmp_path / "run")]
    arguments[1] = str(path)

    def check(value):
        if isinstance(value, list):
            path.write_bytes(changed(data, value))
        else:
            name, odd = value
            arrays = {**ARRAYS, name: odd}
            np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
        before = contents(tmp_path)
        with contextlib.suppress(ValueError, OSError):
            found = load_dataset(str(path), tmp_path)
            if isinstance(value, list):
                for key, array in ARRAYS.items():
                    assert np.array_equal(getattr(found, key), array), key
            return "taken"
        ended, _ = outcome(lambda: main(arguments))
        assert ended == "one line"
        assert contents(tmp_path) == before
        return ended

    names = st.sampled_from([*ARRAYS, "classes"])
    fuzz("npz", st.one_of(CHANGES, st.tuples(names, ODD_ARRAYS)), 80, check)


def test_folders(tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "data"
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (whole / split / name).mkdir(parents=True)
            for n in range(8):
                Image.new("RGB", (32, 32), (label, n, 7)).save(whole / split / name / f"{n}.png")
    right = load_dataset(str(whole), tmp_path)
    arguments = [*TINY, "--limit", "16", "--out", str(tmp_path / "run")]
    arguments[1] = str(path)

    def entry(what, where, name, mode):
        target = path / where / name
        if what == "folder":
            target.mkdir(exist_ok=True)
        elif what == "fifo" and not target.exists():
            os.mkfifo(target)
        elif what == "loop" and not target.exists():
            target.symlink_to(path)
        elif what == "dangling" and not target.exists():
            target.symlink_to(path / "none")
        elif what == "empty":
            target.write_bytes(b"")
        elif what == "image":
            Image.new(mode, (32, 32)).save(target, format="TIFF")

    def check(value):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        if isinstance(value, list):
            file = path / "train/cat/3.png"
            file.write_bytes(changed(file.read_bytes(), value))
        else:
            with contextlib.suppress(OSError):
                entry(*value)
        ended = "taken"
        try:
            found = load_dataset(str(path), tmp_path)
        except (ValueError, OSError):
            ended, _ = outcome(lambda: main(arguments))
            assert ended == "one line"
        else:
            others = found.y_test.numel() == right.y_test.numel()
            assert not others or torch.equal(found.x_test, right.x_test)
        assert not (tmp_path / "run").exists()
        return ended

    entries = st.tuples(
        st.sampled_from(("folder", "fifo", "loop", "dangling", "empty", "image")),
        st.sampled_from(("train/cat", "test/dog", "train", "test", ".")),
        st.sampled_from(("9.png", ".9.png", "._1.png", ".DS_Store", "emu", "a\nb.png", "x.tiff")),
        st.sampled_from(("RGB", "L", "I;16", "F", "I", "RGBA", "P", "1", "CMYK", "LAB")),
    )
    fuzz("folder", st.one_of(CHANGES, entries), 60, check)


FLAGS = [*(item.name.replace("_", "-") for item in dataclasses.fields(TrainConfig)), "speed"]
WORDS = st.one_of(
    st.sampled_from(
        (
            "",
            "--",
            "-",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "-0",
            "1_0",
            "٣",
            "\x1b[2J",
            "/dev/null",
            "/",
        )
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=6),
)


def begun(run, on_epoch=None):
    """What is right is not trained, nor are the seeds that would follow."""
    raise SystemExit(0)


def test_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cifar_resnet_fast.data.sources._by_speed", lambda file, whys: [])
    monkeypatch.setattr("cifar_resnet_fast.training.run.Run.train", begun)
    # with --limit 60000 all shapes are drawn, which takes its time
    monkeypatch.setattr("cifar_resnet_fast.data.shapes.SIZES", {"train": 500, "test": 250})
    # FastResNet-12002 is right, and is not built here
    monkeypatch.setattr(
        "cifar_resnet_fast.training.run.FastResNet",
        lambda depth, *rest, **settings: FastResNet(8, *rest, **settings),
    )

    def check(value):
        arguments = [*TINY, "--out", str(tmp_path / "run")]
        for flag, word, joined in value:
            arguments += [f"--{flag}={word}"] if joined else [f"--{flag}", word]
        ended, _ = outcome(lambda: main(arguments))
        if ended == "one line":
            assert contents(tmp_path) == {}
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        return ended

    word = st.tuples(st.sampled_from(FLAGS), WORDS, st.booleans())
    fuzz("flags", st.lists(word, min_size=1, max_size=3), 80, check)


def test_run_folders(finished, tmp_path):
    folder = tmp_path / "run"
    content = torch.load(finished / "checkpoint.pt", weights_only=True)
    names = ("config.json", "metrics.jsonl", "checkpoint.pt")
    settings_ = sorted(json.loads((finished / "config.json").read_text()))
    odd_json = st.recursive(
        st.one_of(st.none(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    )
    values = st.one_of(
        st.tuples(st.just("bytes"), st.sampled_from(names), CHANGES),
        st.tuples(st.just("gone"), st.sampled_from(names), st.none()),
        st.tuples(st.just("setting"), st.sampled_from(settings_), odd_json),
        st.tuples(st.just("line"), st.none(), odd_json),
        st.tuples(st.just("state"), st.sampled_from(sorted(content)), ODD_VALUES),
        st.tuples(st.just("engine"), st.sampled_from(sorted(content["engine"])), ODD_VALUES),
        st.tuples(st.just("left"), st.sampled_from((".x.tmp", ".lock", "x")), st.none()),
    )

    def check(value):
        what, name, odd = value
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        path = folder / str(name)
        if what == "bytes":
            path.write_bytes(changed(path.read_bytes(), odd))
        elif what == "gone":
            path.unlink()
        elif what == "setting":
            config = json.loads((folder / "config.json").read_text())
            # what is right would be trained
            config[name] = odd if name not in ("epochs", "runs", "depth", "limit") else [odd]
            (folder / "config.json").write_text(json.dumps(config))
        elif what == "line":
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(odd) + "\n")
        elif what == "left":
            path.write_bytes(b"x")
        else:
            parts = {**content, "engine": dict(content["engine"])}
            (parts if what == "state" else parts["engine"])[name] = odd
            torch.save(parts, folder / "checkpoint.pt")
        before = contents(folder)
        ended, _ = outcome(lambda: main(["--resume", str(folder), "--device", "cpu"]))
        if ended == "one line":
            after = contents(folder)
            for key in names:
                assert after.get(key) == before.get(key), key
        return ended

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz("run folder", values, 50, check)


TENSORS = st.builds(
    lambda shape, dtype, how: odd_tensor(shape, dtype, how),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from(
        (torch.float32, torch.float16, torch.float64, torch.bfloat16)
        + (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
    ),
    st.sampled_from(("dense", "dense", "sparse", "transposed", "meta", "expanded", "nested")),
)


def odd_tensor(shape, dtype, how):
    tensor = torch.zeros(shape, dtype=dtype, device="meta" if how == "meta" else "cpu")
    if how == "sparse":
        return tensor.to_sparse()
    if how == "nested":
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    if how == "expanded":
        return tensor[None].expand(3, *shape)
    return tensor.mT if how == "transposed" and len(shape) > 1 else tensor


def calls():
    from tests.test_ops import valid_calls

    return valid_calls()


def test_operations():
    names = [(operation, name) for operation, given_ in calls().items() for name in given_]
    others = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**40), 2**40),
        st.floats(),
        st.text(max_size=4),
        st.just([]),
        st.just({}),
        TENSORS,
    )

    def check(value):
        (operation, name), odd = value
        arguments = {**calls()[operation], name: odd}
        error = None

        def call():
            nonlocal error
            try:
                getattr(ops, operation)(**arguments)
            except (TypeError, ValueError) as caught:
                error = str(caught)
            return 0

        outcome(call)
        if error is None:
            return "taken"
        assert error
        assert "\n" not in error
        return "one line"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz("operation", st.tuples(st.sampled_from(names), others), 300, check)
