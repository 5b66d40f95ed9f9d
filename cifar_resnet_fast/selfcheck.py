"""Whether the package works on this machine: ``python -m cifar_resnet_fast.selfcheck`` (layer 5).

Every kernel of every implementation is compared with float64 under the error budget of the tests,
training steps must repeat bitwise, captured and not captured, and at the end a training step is
timed. Each check prints one line: ok, failed, or not possible with the reason. All results also go
to a JSON file that can be attached to a report. Exit status: 0, or 1 if a check failed.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from cifar_resnet_fast.checkpoint import write_atomically
from cifar_resnet_fast.info import extension_lines, version_lines
from cifar_resnet_fast.verification.checks import (
    BANDWIDTH,
    STEP_TIME,
    TIMED,
    kernel_checks,
    step_checks,
    timings,
)
from cifar_resnet_fast.verification.identity import identity
from cifar_resnet_fast.verification.runner import CATALOGUE, Outcome, run_checks
from cifar_resnet_fast.verification.verdicts import FAILED, NOT_POSSIBLE, OK, Verdicts

_JOBS = 4  # on a GPU: most of a check's time is that of compiling Triton's kernels on the CPU


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_resnet_fast.selfcheck", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device to check; auto is the GPU if there is one (default: auto)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("selfcheck.json"),
        metavar="FILE",
        help="JSON file for the results (default: selfcheck.json)",
    )
    options = parser.parse_args(arguments)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        print(
            "error: --device must be cpu or auto if PyTorch finds no GPU, got cuda",
            file=sys.stderr,
        )
        return 2
    device = torch.device(name)
    began = time.monotonic()
    header = identity(device)
    print("\n".join([*version_lines(), *extension_lines()]))
    print("  ".join(f"{key} {value}" for key, value in header.items() if value), flush=True)
    outcomes = run_all(device)
    report = {
        **header,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(time.monotonic() - began, 1),
        "checks": [outcome.to_dict() for outcome in outcomes],
    }
    for line in table(outcomes):
        print(line)
    try:
        write_atomically(options.out, (json.dumps(report, indent=1) + "\n").encode())
    except OSError as error:
        print(f"error: --out must be a file that can be written: {error}", file=sys.stderr)
        return 2
    by_name = {outcome.name: outcome for outcome in outcomes}
    kernels = [check.kernel for check in kernel_checks(device)]  # the names of these checks, too
    found = {name: by_name[name] for name in kernels if name in by_name}
    Verdicts(device).keep({name: (o.verdict, o.reason) for name, o in found.items()})
    counts = {v: sum(o.verdict == v for o in outcomes) for v in (OK, FAILED, NOT_POSSIBLE)}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{said} in {report['seconds']:.0f} s; {options.out}")
    return 1 if counts[FAILED] else 0


def run_all(device: torch.device, catalogue: str = CATALOGUE) -> list[Outcome]:
    """Every check, each shown as it ends: kernels and steps side by side, then times alone."""

    def show(outcome: Outcome) -> None:
        print(outcome.line(), flush=True)

    jobs = max(1, min(_JOBS, (os.cpu_count() or 1) // 2)) if device.type == "cuda" else 1
    right = [*kernel_checks(device), *step_checks(device)]
    outcomes = run_checks(right, device, jobs=jobs, catalogue=catalogue, report=show)
    bad = {outcome.name for outcome in outcomes if outcome.verdict == FAILED}
    left, timed = [], timings(device)
    for check in timed:
        because = [name for name in check.after if name in bad]
        if because:
            skipped = Outcome(check.name, NOT_POSSIBLE, f"failed before: {because[0]}")
            outcomes.append(skipped)
            show(skipped)
        else:
            left.append(check)
    return outcomes + run_checks(left, device, catalogue=catalogue, report=show)


def table(outcomes: list[Outcome]) -> list[str]:
    """The times of a training step, a line each; none if none was taken."""
    data = {outcome.name: outcome.data for outcome in outcomes if outcome.verdict == OK}
    bandwidth = data.pop(BANDWIDTH, None)
    data = {name: row for name, row in data.items() if name.startswith(STEP_TIME)}
    if not bandwidth or not data:
        return []
    lines = [
        f"a training step of ResNet-{TIMED.depth}, batch {TIMED.batch}, {TIMED.dtype}; "
        f"a copy reaches {bandwidth['gb_s']:,.0f} GB/s"
    ]
    for name, row in data.items():
        rate = row["gb"] / row["ms"] * 1e3
        lines.append(
            f"  {name.removeprefix(STEP_TIME):12} {row['ms']:8.3f} ms  "
            f"{row['images_per_second']:9,.0f} images/s  "
            f"{rate / bandwidth['gb_s']:4.0%} of the copy's bandwidth"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
