"""All that a card should be asked, in order of worth, for a short lease of it: ``bench.ladder``.

``python -m bench.ladder --minutes 9`` runs rung after rung: the self-check, the tests that need a
GPU and then the others, kernels, steps, loaders, the time to an accuracy, the sanitizer. It skips
what has a row in ``bench/results`` for this card, commit and build, starts nothing that does not
fit the time that is left, stops what runs longer, and goes on at the next call. Each rung is a
program of its own: one that fails or hangs leaves the others their time. What a rung printed is
in ``ladder/<rung>.log`` beside the results. Needs neither a network nor an installation: the
checkout with its built libraries is enough. ``--quick`` leaves out the suites at full length.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.suite import RESULTS, Suite, flags

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
DONE, FAILED, HUNG, STOPPED = "done", "failed", "hung", "stopped"
_RESERVE = 5.0  # seconds to end a rung and to write its row
_ON_ITS_FEET = 20.0  # seconds without which no rung is begun

# groups of test files; of each the tests that are marked gpu come before the others, which run on
# the GPU, too, but say something without one
TESTED = {
    "kernels": ("trunk", "conv_bn_relu", "kernels_raw", "shortcut_a", "linear_cross_entropy"),
    "steps": ("engine", "network", "optimizer", "loader", "memory", "record_step", "many"),
    "programs": (
        *("first_run", "bench_trunk", "bench_measure", "bench_failures", "bench_suites"),
        *("tune", "train"),
    ),
}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Rung:
    """One program.

    name: of its own
    command: that runs it, in the root of the checkout
    least: seconds without which it is not begun
    limit: seconds after which it hangs
    """

    name: str
    command: tuple[str, ...]
    least: float = _ON_ITS_FEET
    limit: float = 300.0


def rungs(options: argparse.Namespace, report: Path) -> list[Rung]:
    """All of them, in order of worth.

    Args:
        options: of the command line
        report: the file of the self-check
    """
    device = ("--device", options.device)
    suite = (*device, "--out", options.out)
    found = [
        _module(
            "selfcheck",
            "cifar_resnet_fast.selfcheck",
            *(*device, "--out", report),
            least=60,
            limit=240,
        )
    ]
    pytest = ("pytest", "-q", "-p", "no:cacheprovider")
    for marked, what in (("gpu", "gpu tests"), ("not gpu", "tests")):
        for group, names in TESTED.items():
            files = [f"tests/test_{name}.py" for name in names]
            found.append(
                _module(f"{what}, {group}", *pytest, "-m", marked, *files, least=30, limit=400)
            )
    quick = ("--quick", *suite)
    found += [
        _module("trunk, quick", "bench.trunk", *quick, least=40),
        *(
            _module(f"step {depth}, quick", "bench.step", "--depth", depth, *quick, least=40)
            for depth in (56, 20)
        ),
        _module("kernels, quick", "bench.kernels", *quick, least=40),
        _module("loader, quick", "bench.loader", *quick, least=30),
        _module(
            "time to 93.1 %",
            "bench.train",
            *("--depth", 56, "--runs", 1, "--target", 0.931),
            *("--dataset", options.dataset, "--data-root", options.data_root, *suite),
            least=90,
            limit=480,
        ),
    ]
    if options.device == "cuda":
        found += [
            Rung(f"sanitizer, {tool}", ("bash", "tests/sanitize.sh", tool), 60, 150)
            for tool in SANITIZERS
        ]
    if options.quick:
        return found
    for dtype in ("fp16", "bf16", "fp32"):
        for name in ("trunk", "kernels"):
            found.append(
                _module(f"{name}, {dtype}", f"bench.{name}", "--dtype", dtype, *suite, least=60)
            )
    for depth in (56, 20):
        found.append(
            _module(f"step {depth}", "bench.step", "--depth", depth, *suite, least=90, limit=540)
        )
    return found


def _module(
    name: str, module: str, *arguments: object, least: float = _ON_ITS_FEET, limit: float = 300.0
) -> Rung:
    return Rung(name, (PYTHON, "-m", module, *map(str, arguments)), least, limit)


def rows_of(folders: Iterable[Path]) -> Iterator[dict]:
    """The ladder's rows in the result files of the folders."""
    for path in sorted({file for folder in folders for file in folder.glob("*.jsonl")}):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.get("suite") == "ladder":
                yield row


def ended(header: dict, folders: Iterable[Path]) -> dict[str, str]:
    """What became of the rungs that need not run again on this card, commit and build."""
    same = ("card", "commit", "build")
    return {
        row["rung"]: row["state"]
        for row in rows_of(folders)
        if row["state"] != STOPPED and all(row.get(name) == header[name] for name in same)
    }


def climb(rung: Rung, seconds: float, log: Path, root: Path = ROOT) -> tuple[str, int | None]:
    """Run a rung for at most so many seconds, or its limit if that is less.

    Args:
        rung: what runs
        seconds: at most
        log: the file for what it prints
        root: of the checkout in which it runs

    Returns:
        ``done``, ``failed`` (it ended with another status than 0), ``hung`` (it reached its limit)
        or ``stopped`` (it reached ``seconds``), and its exit status if it ended
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    allowed = min(seconds, rung.limit)
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as file:
        process = subprocess.Popen(
            rung.command,
            cwd=root,
            env={**os.environ, "PYTHONPATH": path, "PYTHON": PYTHON},
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(allowed)
        except subprocess.TimeoutExpired:
            return (HUNG if allowed == rung.limit else STOPPED), None
        finally:  # with all that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return (DONE if status == 0 else FAILED), status


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "nothing was printed"


def main(arguments: list[str] | None = None) -> int:
    parser = flags("ladder", __doc__.partition("\n\n")[2])
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        metavar="N",
        help="minutes for all rungs (default: 9)",
    )
    parser.add_argument(
        "--dataset",
        default="cifar10",
        metavar="NAME",
        help="data set of the training (default: cifar10)",
    )
    parser.add_argument(
        "--data-root",
        default="data",
        metavar="FOLDER",
        help="folder of the data set (default: data)",
    )
    parser.add_argument(
        "--list", action="store_true", help="show the rungs and which of them are done"
    )
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    until = time.monotonic() + 60 * options.minutes
    options.out = options.out.resolve()  # rungs run in the root of the checkout
    suite = Suite("ladder", options)
    known = ended(suite.header, {RESULTS, options.out})
    left, failed = [], False
    report = suite.path.with_name(f"{suite.path.stem}-selfcheck.json")
    for rung in rungs(options, report):
        if rung.name in known:
            if options.list:
                print(f"{known[rung.name]:8} {rung.name}")
            continue
        seconds = until - time.monotonic() - _RESERVE
        if options.list or seconds < rung.least:
            left.append(rung.name)
            continue
        began = time.monotonic()
        log = options.out / "ladder" / (rung.name.replace(", ", "-").replace(" ", "-") + ".log")
        state, status = climb(rung, seconds, log)
        failed |= state in (FAILED, HUNG)
        took = round(time.monotonic() - began, 1)
        row = {"rung": rung.name, "state": state, "seconds": took, "status": status}
        row["said"] = last_line(log)[:300]
        suite.add(row, f"{state:8} {rung.name:28} {took:6.1f} s  {row['said']}")
        if state == STOPPED:
            left.append(rung.name)
    print(f"left: {'; '.join(left) or 'nothing'}\nresults in {suite.path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
