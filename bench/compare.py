"""Two commits side by side: ``python -m bench.compare COMMIT_A COMMIT_B``.

Each commit is checked out and built in a folder of its own, which is kept for the next call. The
folder of a checkout can stand in place of a commit. With a GPU ``bench.trunk`` and ``bench.step``
of both run in turn, A B A B. Each kernel and each step is printed with the ratio of its times, B
over A, and its spread: the least and the greatest ratio of any run of B to any run of A. Without a
GPU, or with ``--static``, the table is of what can be counted: registers, memory and instructions
by kind in each kernel's machine code, and what an image costs in sectors and in wavefronts of
shared memory, as the commits keep it in bench/kernel_counts.json.

Libraries that are built already are named with ``--library-a`` and ``--library-b``, so that a
machine without a compiler can compare, too.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from bench import ladder, report
from bench.ladder import Rung
from cifar_resnet_fast.resnet import check_depth
from tools import machine_code
from tools.machine_code import Function

ROOT = ladder.ROOT
PACKAGE = "cifar_resnet_fast"
WITHOUT_GPU = (80, 90)  # what setup.py builds for
COUNTS = Path("bench/kernel_counts.json")
COUNTED = ("tensor", "shared", "sectors", "wavefronts")  # of what an image costs
_BUILD_LIMIT, _RUN_LIMIT = 3600.0, 600.0  # seconds


class Unusable(Exception):
    """Something that the comparison needs is not there, or not as it must be; in one line."""


@dataclass(frozen=True)
class Side:
    """One of the two.

    letter: A or B
    name: as it was given
    folder: of the checkout, with its libraries in it
    """

    letter: str
    name: str
    folder: Path

    @property
    def library(self) -> Path:
        return self.folder / PACKAGE / "_cuda.abi3.so"


# --- checkouts and libraries --------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    """What git prints.

    Raises:
        Unusable: there is no git, or it fails
    """
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)
    except OSError as error:
        raise Unusable(f"git cannot be run: {error}") from None
    if done.returncode:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise Unusable(f"git {words[0]} in {folder} fails: {said}")
    return done.stdout.strip()


def commit_of(name: str, root: Path) -> str:
    """The hash of a commit in the repository at ``root``.

    Raises:
        Unusable: there is no such commit
    """
    try:
        return git(root, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except Unusable as error:
        if "cannot be run" in str(error):
            raise
        raise Unusable(f"{name} is neither a commit in {root} nor a folder") from None


def checked_out(commit: str, folder: Path, root: Path) -> None:
    """See to it that ``folder`` is a checkout of ``commit``, as it is in the repository.

    Raises:
        Unusable: it is something else, or its files were changed
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        git(root, "worktree", "add", "--quiet", "--force", "--detach", str(folder), commit)
        return
    try:
        found = git(folder, "rev-parse", "HEAD")
        changed = git(folder, "status", "--porcelain", "--untracked-files=no")
    except Unusable:
        found, changed = None, ""
    if found != commit:
        raise Unusable(f"{folder} is no checkout of {commit[:10]}: delete the folder")
    if changed:
        raise Unusable(f"{folder} has changed files, {changed.split()[1]}: delete the folder")


def prepare(
    letter: str,
    name: str,
    library: Path | None,
    architectures: Iterable[int],
    cache: Path,
    console: Console,
    root: Path,
) -> Side:
    """One side with its libraries.

    Args:
        letter: A or B
        name: a commit, or the folder of a checkout
        library: the folder of libraries that are built; None: build them, or if ``name`` is a
            folder take its own
        architectures: to build for, 86 for 8.6
        cache: the folder for checkouts
        console: says what is under way
        root: of the repository that has the commits

    Raises:
        Unusable: the commit, the folder or a library is not there, or building fails
    """
    given = Path(name)
    if given.is_dir() and not (given / PACKAGE / "ops").is_dir():
        raise Unusable(f"{name} is no checkout of {PACKAGE}")
    if library is not None and not (library / "_cuda.abi3.so").exists():
        raise Unusable(f"--library-{letter.lower()}: there is no _cuda.abi3.so in {library}")
    if given.is_dir():
        side = Side(letter, name, given.resolve())
        if library is not None and library.resolve() != side.library.parent:
            raise Unusable(f"--library-{letter.lower()} is for a commit, {name} is a folder")
        if not side.library.exists():
            raise Unusable(f"{side.library} does not exist: build it, or name a commit")
        return side
    commit = commit_of(name, root)
    built_as = "_".join(map(str, sorted(architectures)))
    if library is not None:
        built_as = hashlib.sha256((library / "_cuda.abi3.so").read_bytes()).hexdigest()[:8]
    folder = cache / f"{commit[:12]}-{built_as}"
    checked_out(commit, folder, root)
    side = Side(letter, name, folder)
    if not side.library.exists():
        if library is None:
            library = build(side, architectures, console)
        # the CUDA library last, as it says that all are there
        for one in ("_build_info.json", "_C.abi3.so", "_cuda.abi3.so"):
            if not (library / one).exists():
                raise Unusable(f"there is no {one} in {library}")
            shutil.copy2(library / one, folder / PACKAGE / f"{one}.part")
            (folder / PACKAGE / f"{one}.part").rename(folder / PACKAGE / one)
    return side


def build(side: Side, architectures: Iterable[int], console: Console) -> Path:
    """The folder in which the libraries of a side have been built."""
    targets = ";".join(f"{a // 10}.{a % 10}" for a in architectures)
    environment = (f"{PACKAGE.upper()}_BUILD=cuda", f"TORCH_CUDA_ARCH_LIST={targets}")
    command = ("setup.py", "-q", "build", "--build-lib", "build/compared")
    rung = Rung("build", ("env", *environment, ladder.PYTHON, *command), limit=_BUILD_LIMIT)
    log = side.folder / "build" / "compared.log"
    began = time.monotonic()
    with console.status(f"{side.letter}: building {side.name} for {targets}"):
        state, _ = ladder.climb(rung, _BUILD_LIMIT, log, side.folder)
    if state != ladder.DONE:
        raise Unusable(f"{side.name} cannot be built ({ladder.last_line(log)[:200]}): see {log}")
    took = time.monotonic() - began
    console.print(f"{side.letter}: built {side.name} for {targets} in {took:.0f} s")
    return side.folder / "build" / "compared" / PACKAGE


# --- times --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """B over A, of medians; the least and the greatest of any run of B over any run of A."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, a: list[float], b: list[float]) -> "Ratio":
        return cls(median(b) / median(a), min(b) / max(a), max(b) / min(a))

    @property
    def verdict(self) -> str:
        """Of B, if every run of it is faster or slower than every run of A."""
        return "faster" if self.high < 1 else "slower" if self.low > 1 else ""

    def __str__(self) -> str:
        return f"{self.middle:6.3f} ({self.low:.3f} - {self.high:.3f}) {self.verdict}".rstrip()


def programs(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """What runs on each side, module and arguments."""
    sizes = ("--dtype", *options.dtype, "--batch-size", *map(str, options.batch_size))
    shared = ("--implementation", "cuda", *sizes, *(("--quick",) if options.quick else ()))
    depths = ("--phase", "training", "--depth", *map(str, options.depth))
    return [("bench.trunk", *shared), ("bench.step", *depths, *shared)]


def measure(
    sides: list[Side], options: argparse.Namespace, until: float, console: Console
) -> dict[str, list[dict]]:
    """The rows of each side, in turn, until all rounds are done or the time is over.

    Raises:
        Unusable: a program leaves no rows, or there was time for none
    """
    rows: dict[str, list[dict]] = {side.letter: [] for side in sides}
    runs = list(itertools.product(range(options.rounds), programs(options), sides))
    for number, (_, program, side) in enumerate(runs):
        seconds = until - time.monotonic()
        if seconds < 0:
            console.print(f"the time is over: {len(runs) - number} of {len(runs)} runs are left")
            break
        log = options.out / f"{number:02}-{side.letter}-{program[0]}.log"
        results = log.with_suffix("")
        rung = Rung(
            program[0], (ladder.PYTHON, "-m", *program, "--out", str(results)), limit=_RUN_LIMIT
        )
        with console.status(f"{side.letter}: {program[0]}, run {number + 1} of {len(runs)}"):
            state, _ = ladder.climb(rung, seconds, log, side.folder)
        files = sorted(results.glob("*.jsonl"))
        if not files and state == ladder.STOPPED:
            continue
        if not files:
            raise Unusable(
                f"{program[0]} of {side.name} {state}: {ladder.last_line(log)[:200]}; see {log}"
            )
        suite = program[0].removeprefix("bench.")
        rows[side.letter] += [r for r in report.read_results(files) if r["suite"] == suite]
    if not any(rows.values()):
        raise Unusable(f"nothing was measured in --minutes {options.minutes:g}")
    return rows


def time_lines(rows: dict[str, list[dict]]) -> list[str]:
    """A line for each kernel and each step, in the order of the first run."""
    times: dict[tuple, dict[str, list[float]]] = {}
    reasons: dict[tuple, dict[str, str]] = {}
    for letter, of_side in rows.items():
        for row in of_side:
            case = (row["suite"], *(row[name] for name in report.CASES[row["suite"]]))
            times.setdefault(case, {})
            if "us" in row:
                times[case].setdefault(letter, []).append(row["us"])
            else:
                reasons.setdefault(case, {})[letter] = row["no_time"]
    lines = [f"{'':52} {'A, us':>10} {'B, us':>10}  B / A (least - greatest of any two runs)"]
    for case, found in times.items():
        title = " ".join(str(part) for part in case if part is not None)
        if found.keys() == {"A", "B"}:
            a, b = found["A"], found["B"]
            lines.append(f"{title:52} {median(a):10.2f} {median(b):10.2f}  {Ratio.of(a, b)}")
        else:
            lacking = ", ".join(
                f"{letter}: {reasons.get(case, {}).get(letter, 'not measured')}"
                for letter in "AB"
                if letter not in found
            )
            lines.append(f"{title:52} no time of {lacking}")
    return lines


# --- what can be counted ------------------------------------------------------------------------


def code_lines(a: list[Function], b: list[Function]) -> list[str]:
    """A line for each kernel whose machine code differs, and below it the kinds that do."""
    sides = [{(f.name, f.architecture): f for f in functions} for functions in (a, b)]
    lines, same = [], 0
    for key in dict.fromkeys(itertools.chain(*sides)):
        name = f"{key[0]}, sm_{key[1]}"
        before, now = (side.get(key) for side in sides)
        if before is None or now is None:
            found, letter = (before, "A") if now is None else (now, "B")
            counts = f"{found.registers} registers, {found.length} instructions"
            lines.append(f"{name}: only in {letter}, {counts}")
            continue
        if before == now:
            same += 1
            continue
        what = [
            change(word, getattr(before, word), getattr(now, word))
            for word in ("registers", "stack", "shared", "length")
        ]
        if before.kinds["local"] or now.kinds["local"]:
            what.append(change("spilled", before.kinds["local"], now.kinds["local"]))
        kinds = [
            change(kind, before.kinds[kind], now.kinds[kind])
            for kind in machine_code.KINDS
            if before.kinds[kind] != now.kinds[kind]
        ]
        lines.append(f"{name}: {', '.join(what)}")
        lines.append(f"    {', '.join(kinds) or 'as many of each kind, in another order'}")
    return [*lines, f"{same} kernels have the same machine code"]


def change(word: str, before: float, now: float) -> str:
    """``registers 128 -> 120 (0.94)``, and one number if it is the same."""
    if before == now:
        return f"{word} {before:g}"
    ratio = f" ({now / before:.2f})" if before else ""
    return f"{word} {before:g} -> {now:g}{ratio}"


def count_lines(a: dict, b: dict) -> list[str]:
    """A line for each kernel of the kept counts in which an image costs something else."""
    lines = []
    for name in dict.fromkeys((*a, *b)):
        if name not in a or name not in b:
            lines.append(f"{name}: only in {'B' if name in b else 'A'}")
            continue
        before, now = (
            {
                field: sum(role["image"][field] for role in counts[name]["roles"].values())
                for field in COUNTED
            }
            for counts in (a, b)
        )
        if before != now:
            lines.append(f"{name}: {', '.join(change(f, before[f], now[f]) for f in COUNTED)}")
    return [*lines, f"{len({*a} & {*b}) - len(lines)} kernels cost an image the same"]


def kept_counts(side: Side) -> dict | None:
    """What the checkout keeps of its kernels' costs (tests/ptx/counts.py); None: nothing."""
    path = side.folder / COUNTS
    return json.loads(path.read_text())["kernels"] if path.exists() else None


def static_lines(sides: list[Side], architectures: Iterable[int] | None) -> list[str]:
    """What can be counted, for people.

    Args:
        architectures: those that count; None: those that both have

    Raises:
        Unusable: a library cannot be read, or lacks an architecture
    """
    found = []
    for side in sides:
        try:
            found.append(machine_code.read(side.library))
        except RuntimeError as error:
            raise Unusable(str(error)) from None
    there = [{f.architecture for f in functions} for functions in found]
    wanted = set(architectures) if architectures else there[0] & there[1]
    for side, has in zip(sides, there, strict=True):
        if not wanted or not wanted <= has:
            names = ", ".join(f"sm_{a}" for a in sorted(has))
            other = ", ".join(f"sm_{a}" for a in sorted(wanted)) or "what the other one has"
            raise Unusable(f"{side.library} has machine code for {names}, not for {other}")
    lines = ["Machine code:"]
    lines += code_lines(*([f for f in one if f.architecture in wanted] for one in found))
    counts = [kept_counts(side) for side in sides]
    lines += ["", f"An image's cost, as {COUNTS} has it:"]
    missing = [side.name for side, kept in zip(sides, counts, strict=True) if kept is None]
    return lines + ([f"not kept at {', '.join(missing)}"] if missing else count_lines(*counts))


# --- the command --------------------------------------------------------------------------------


def device_architectures() -> list[int]:
    """Of the GPUs here, 86 for 8.6."""
    devices = range(torch.cuda.device_count())
    capabilities = {torch.cuda.get_device_capability(device) for device in devices}
    return [10 * major + minor for major, minor in sorted(capabilities)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__.partition("\n\n")[2].replace("``", ""),
    )
    parser.add_argument("a", metavar="COMMIT_A", help="a commit, or the folder of a checkout")
    parser.add_argument("b", metavar="COMMIT_B", help="the same, compared with the first")
    for letter in "ab":
        help = f"folder of the built libraries of COMMIT_{letter.upper()}"
        parser.add_argument(f"--library-{letter}", type=Path, metavar="FOLDER", help=help)
    parser.add_argument(
        "--arch", type=int, nargs="+", help="as in 86; default: the GPU's, or 80 and 90"
    )
    parser.add_argument("--static", action="store_true", help="count, even if there is a GPU")
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56], help="(default: 20 56)")
    parser.add_argument("--dtype", nargs="+", choices=("fp16", "bf16"), default=["fp16"])
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[128, 1024], help="(default: 128 1024)"
    )
    parser.add_argument("--quick", action="store_true", help="shorter samples")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (default: 2)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for runs (default: 9)")
    parser.add_argument(
        "--cache", type=Path, help="folder for checkouts (default: one in the temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="folder for rows and logs (default: a new one)")
    options = parser.parse_args(arguments)
    try:
        for depth in options.depth:
            check_depth(depth)
    except ValueError as error:
        parser.error(f"--{error}")
    for flag in ("batch_size", "rounds"):
        values = getattr(options, flag)
        least = min(values) if isinstance(values, list) else values
        if least < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {least}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    cache = (
        options.cache or Path(tempfile.gettempdir()) / f"cifar_resnet_fast_{os.getuid()}_compare"
    )
    here = device_architectures()
    sides = []
    try:
        for letter, name, library in (
            ("A", options.a, options.library_a),
            ("B", options.b, options.library_b),
        ):
            wanted = options.arch or here or WITHOUT_GPU
            sides.append(prepare(letter, name, library, wanted, cache.resolve(), console, ROOT))
        for side in sides:
            print(f"{side.letter}: {side.name}, in {side.folder}")
        if options.static or not here:
            print("\n".join(static_lines(sides, options.arch)))
            return 0
        options.out = (options.out or Path(tempfile.mkdtemp(prefix="compare-"))).resolve()
        options.out.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + 60 * options.minutes
        print("\n".join(time_lines(measure(sides, options, until, console))))
        print(f"rows and logs in {options.out}")
    except Unusable as error:
        print(f"python -m bench.compare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
