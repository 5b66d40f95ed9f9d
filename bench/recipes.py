"""Recipes against each other, seed after seed: ``python -m bench.recipes FOLDER``.

Each arm is a name and flags of ``cifar_resnet_fast.train``; some are ready under their names, of
which paper is the default of the package and the others are starting points. Every arm trains
seed 0, then every arm seed 1, and so on, so that a comparison that is stopped early is a fair one.
FOLDER keeps every run; the same command goes on where the last one stopped. It gets results.json,
results.md with a row an arm, and results.png. Differences are to the first arm and stand with
their standard error and the p of Welch's test. Few seeds support no claim: the deviation of one is
about 0.2 %.
"""

import argparse
import json
import math
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from bench.suite import header
from cifar_resnet_fast import train
from cifar_resnet_fast.training.logbook import read_metrics
from cifar_resnet_fast.training.recipes import RECIPES
from cifar_resnet_fast.training.run import write_json

_ENOUGH_SEEDS = 20  # for a claim

# all but paper are starting points, which no measurement has confirmed yet
ARMS: dict[str, list[str]] = {
    **{name: ["--recipe", name] for name in RECIPES},
    "fast-muon": ["--recipe", "fast", "--optimizer", "muon", "--epochs", "38"],
    # with crops and flips alone
    "best-crops": ["--recipe", "best", "--cutout", "0", "--mixup", "0"],
}


@dataclass(frozen=True)
class Welch:
    """Welch's test of two means.

    difference: of the means, the second minus the first
    error: its standard error
    p: two-sided; None if neither sample varies
    """

    difference: float
    error: float
    p: float | None


def welch(first: list[float], second: list[float]) -> Welch:
    """Whether two samples, at least two values each, have the same mean. Source: Welch 1947."""
    variances = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    difference = statistics.mean(second) - statistics.mean(first)
    squared = sum(variances)
    if squared == 0:
        return Welch(difference, 0.0, None)
    parts = zip(variances, (first, second), strict=True)
    freedom = squared**2 / sum(v**2 / (len(sample) - 1) for v, sample in parts)
    error = math.sqrt(squared)
    return Welch(difference, error, two_sided(abs(difference) / error, freedom))


def two_sided(t: float, freedom: float) -> float:
    """The chance that Student's t is farther from 0 than ``t``, with at least 1 degree of freedom.

    With t = sqrt(freedom) tan(angle) it is an integral of a power of the cosine.
    """
    start = math.atan2(t, math.sqrt(freedom))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = (math.pi / 2 - start) / 2
    angles = start + half * (nodes + 1)
    area = half * float(weights @ np.cos(angles) ** (freedom - 1))
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    return min(1.0, 2 * math.exp(scale) * area)


# --- running -------------------------------------------------------------------------------------


def run_seed(folder: Path, flags: list[str], seed: int) -> int:
    """Train one seed into ``folder``, or go on with it; the exit status of the training."""
    if (folder / "checkpoint.pt").exists():
        return train.main(["--resume", str(folder)])
    if folder.exists():
        shutil.rmtree(folder)  # stopped before its first checkpoint
    return train.main([*flags, "--seed", str(seed), "--out", str(folder)])


def finished(folder: Path) -> list[dict] | None:
    """The rows of a run that has reached its end, or None."""
    config = folder / "config.json"
    rows, _ = read_metrics(folder)
    if not rows or not config.exists():
        return None
    return rows if rows[-1]["epoch"] == json.loads(config.read_text())["epochs"] else None


def run_arms(
    folder: Path, arms: dict[str, list[str]], seeds: int, minutes: float | None
) -> int | None:
    """Train what is missing, as far as the time goes.

    A run begins only if as long a run as the arm's longest so far would still end in time; an
    arm's first run begins as long as there is time at all.

    Returns:
        the exit status of a training that failed or was stopped, or None
    """
    began, longest = time.monotonic(), dict.fromkeys(arms, 0.0)
    for seed in range(seeds):
        for arm, flags in arms.items():
            place = folder / arm / f"seed-{seed}"
            if finished(place) is not None:
                continue
            start = time.monotonic()
            passed = start - began
            if minutes is not None and passed + longest[arm] >= 60 * minutes:
                print(
                    f"stopped before {arm}, seed {seed}: {passed / 60:.1f} of {minutes:g} minutes "
                    f"have passed and a run takes {longest[arm] / 60:.1f}"
                )
                return None
            status = run_seed(place, flags, seed)
            if status:
                return status
            longest[arm] = max(longest[arm], time.monotonic() - start)
    return None


# --- results -------------------------------------------------------------------------------------


def results(folder: Path, arms: dict[str, list[str]], target: float) -> list[dict]:
    """A row an arm that has finished runs, from their files."""
    found, first = [], None
    for arm, flags in arms.items():
        places = sorted((folder / arm).glob("seed-*"), key=lambda p: int(p.name[5:]))
        runs = {int(p.name[5:]): rows for p in places if (rows := finished(p)) is not None}
        if not runs:
            continue
        accuracies = [rows[-1]["test_accuracy"] for rows in runs.values()]
        flips = [rows[-1].get("test_accuracy_flip") for rows in runs.values()]
        reached = [
            next((row for row in rows if row.get("test_accuracy", 0.0) >= target), None)
            for rows in runs.values()
        ]
        row = {
            "arm": arm,
            "flags": shlex.join(flags),
            "seeds": list(runs),
            "accuracies": accuracies,
            "mean": statistics.mean(accuracies),
            "standard_error": _error(accuracies),
            "mean_flip": None if None in flips else statistics.mean(flips),
            "epochs": max(rows[-1]["epoch"] for rows in runs.values()),
            "seconds": statistics.mean(rows[-1]["seconds"] for rows in runs.values()),
            "target": target,
            "reached": sum(hit is not None for hit in reached),
            "epochs_to_target": _mean_or_none(reached, "epoch"),
            "seconds_to_target": _mean_or_none(reached, "seconds"),
            "welch": None,
        }
        if first is None:
            first = accuracies
        elif min(len(first), len(accuracies)) > 1:
            row["welch"] = vars(welch(first, accuracies))
        found.append(row)
    return found


def _error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _mean_or_none(reached: list[dict | None], name: str) -> float | None:
    """The mean over the runs, of which none may have failed to reach the target."""
    return None if None in reached else statistics.mean(hit[name] for hit in reached)


def table(rows: list[dict]) -> str:
    """The rows of ``results`` in Markdown; accuracies in %."""
    target = f"{100 * rows[0]['target']:g} %"
    heads = ["arm", "seeds", "accuracy, %", "with mirror images", "epochs", "seconds"]
    heads += [f"seeds that reach {target}", "after epochs", "after seconds"]
    heads += ["difference", "p (Welch)"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        test = row["welch"] or {"difference": None, "error": None, "p": None}
        cells = [row["arm"], str(len(row["seeds"]))]
        cells += [_percent(row["mean"], row["standard_error"]), _percent(row["mean_flip"])]
        cells += [str(row["epochs"]), f"{row['seconds']:.1f}", str(row["reached"])]
        cells += [
            _number(row["epochs_to_target"], ".1f"),
            _number(row["seconds_to_target"], ".1f"),
        ]
        cells += [_percent(test["difference"], test["error"], "+"), _number(test["p"], ".3g")]
        lines.append(cells)
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text += (
        "\nAccuracy after the last epoch; mean +- standard error; differences to the first arm.\n"
    )
    if min(len(row["seeds"]) for row in rows) < _ENOUGH_SEEDS:
        text += f"Fewer than {_ENOUGH_SEEDS} seeds: too few for a claim about small differences.\n"
    return text


def _percent(value: float | None, error: float | None = None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{100 * value:{sign}.2f}" + ("" if error is None else f" +- {100 * error:.2f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def draw(path: Path, folder: Path, rows: list[dict]) -> None:
    """Mean accuracy by epoch, and every seed's last accuracy with mean and standard error."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, dots = figure.subplots(1, 2)
    for place, row in enumerate(rows):
        runs = [read_metrics(folder / row["arm"] / f"seed-{seed}")[0] for seed in row["seeds"]]
        at = [r["epoch"] for r in runs[0] if "test_accuracy" in r]
        scores = [[100 * r["test_accuracy"] for r in run if "test_accuracy" in r] for run in runs]
        curves.plot(at, np.mean(scores, 0), label=row["arm"], marker="o" if len(at) < 20 else None)
        percent = [100 * value for value in row["accuracies"]]
        dots.plot([place] * len(percent), percent, "o", alpha=0.4)
        error = 100 * (row["standard_error"] or 0.0)
        dots.errorbar([place], [100 * row["mean"]], [error], fmt="_k", capsize=6)
    curves.set(xlabel="epoch", ylabel="accuracy, %, mean over the seeds")
    curves.legend(loc="lower right")
    dots.set(ylabel="accuracy after the last epoch, %", xlim=(-0.5, len(rows) - 0.5))
    dots.set_xticks(range(len(rows)), [row["arm"] for row in rows])
    for axes in (curves, dots):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _arm(text: str) -> tuple[str, list[str]]:
    name, colon, flags = text.partition(":")
    if text in ARMS:
        return text, ARMS[text]
    if not colon or not name.replace("-", "").isalnum():
        raise argparse.ArgumentTypeError(
            "must be NAME: FLAGS, the name of letters, digits and hyphens, or one of "
            f"{', '.join(ARMS)}, got {text!r}"
        )
    return name, shlex.split(flags)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.recipes", description=__doc__.partition("\n\n")[2].replace("``", "")
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="folder of the runs and the results, new or the last one",
    )
    parser.add_argument(
        "--arm",
        type=_arm,
        action="append",
        metavar="NAME[:FLAGS]",
        help='such as "short: --recipe fast --epochs 24", or the name of one that is ready; the '
        f"first is what the others are compared with (default: {', '.join(ARMS)})",
    )
    parser.add_argument(
        "--flags", default="", metavar="FLAGS", help='flags of all arms, such as "--depth 56"'
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=_ENOUGH_SEEDS,
        metavar="N",
        help="number of seeds, from 0 (default: 20)",
    )
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="start no run that would end later"
    )
    parser.add_argument(
        "--target",
        type=float,
        default=0.931,
        metavar="SHARE",
        help="accuracy to reach, 0 .. 1 (default: 0.931)",
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1 or not 0 < options.target <= 1:
        parser.error("--seeds must be at least 1 and --target more than 0 and at most 1")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes}")
    named = options.arm or list(ARMS.items())
    common = shlex.split(options.flags)
    arms = {name: [*flags, *common] for name, flags in named}
    if len(arms) < len(named):
        parser.error("--arm must have a name of its own each time")
    options.folder.mkdir(parents=True, exist_ok=True)
    known = options.folder / "arms.json"
    begun = json.loads(known.read_text()) if known.exists() else {}
    for name, flags in arms.items():
        if begun.get(name, flags) != flags:
            parser.error(
                f"--arm {name} must have the flags that it has in {known}, "
                f"{shlex.join(begun[name])}, got {shlex.join(flags)}"
            )
    write_json(known, {**begun, **arms})
    status = run_arms(options.folder, arms, options.seeds, options.minutes)
    rows = results(options.folder, arms, options.target)
    if rows:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_json(options.folder / "results.json", {**header(device), "arms": rows})
        text = table(rows)
        (options.folder / "results.md").write_text(text)
        draw(options.folder / "results.png", options.folder, rows)
        print(text)
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
