"""Tables and charts from stored results: ``python -m bench.report [FILE ...]``.

Reads JSON-lines files that the suites wrote (by default all in the folder ``--out``) and writes
report.md and PNG charts into that folder. Of several results of one case on one card and date the
last counts. Nothing is measured here, and no number is from anywhere else, but for the prediction
at the end, which is called one.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import mean, stdev

from bench import charts, prediction, roofline
from bench.cards import CARDS
from bench.suite import RESULTS, describe, describe_limits

Row = dict
RESULT_FIELDS = ("us", "no_time", "seconds", "copy_gb_s")  # a row has one of these
# the fields that tell a suite's cases from each other
CASES = {
    "card": ("measured_by",),
    "ladder": ("rung",),
    "kernels": ("operation", "place", "dtype", "batch", "phase", "implementation"),
    "trunk": ("kernel", "place", "dtype", "batch", "implementation"),
    "step": ("phase", "depth", "dtype", "batch", "implementation"),
    "loader": ("dtype", "batch", "implementation"),
    "train": ("dataset", "depth", "dtype", "batch", "epochs", "limit", "implementation", "seed"),
}


def read_results(paths: list[Path]) -> list[Row]:
    """The last result of every case on every card and date, in the order of the files.

    Raises:
        ValueError: a line is no result; names file and line
        OSError: a file cannot be read
    """
    found = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                case = tuple(row.get(field) for field in CASES[row["suite"]])
                key = (row["card"], row["date"], row["suite"], *case)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}, line {number}: is no result of a suite") from None
            if not any(field in row for field in RESULT_FIELDS):
                raise ValueError(
                    f"{path}, line {number}: has neither a time nor a reason for none"
                )
            found.pop(key, None)  # the later one also stands later
            found[key] = row
    return list(found.values())


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def spread(row: Row, unit: float, digits: int) -> str:
    """Median and quantiles, of microseconds over ``unit``."""
    low, middle, high = (row[name] / unit for name in ("us_20", "us", "us_80"))
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def card_lines(rows: list[Row]) -> list[str]:
    """What the card reaches, as each suite measured it before anything else."""
    lines = [
        "What the card reaches. A suite's floors and shares are of what it measured itself.",
        "",
    ]
    lines += [f"* {row['measured_by']}: {describe_limits(row)}" for row in rows]
    if rows[0]["card"].startswith("CPU"):
        lines += ["", "On a CPU the sizes are tiny and stay in its caches, so a floor is none."]
    return lines


def kernel_lines(rows: list[Row]) -> list[str]:
    """One table for each dtype and batch size: a row a case, a column an implementation."""
    lines = [
        "Microseconds, median (20 % - 80 % quantile). The floor is the slower of traffic and",
        "arithmetic at the measured limits; the share is the floor's of the fastest time. In fp32",
        "PyTorch's convolutions may use TF32 on a GPU, its default; the package's do not.",
        "",
    ]
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        cases: dict[tuple, dict[str, Row]] = {}
        for row in rows:
            if (row["dtype"], row["batch"]) == (dtype, batch) and "us" in row:
                case = (row["operation"], row["place"], row["phase"])
                cases.setdefault(case, {})[row["implementation"]] = row
        if not cases:
            continue
        names = list(dict.fromkeys(itertools.chain(*cases.values())))
        body = []
        for (operation, place, phase), times in cases.items():
            best = min(times.values(), key=lambda row: row["us"])
            cells = [spread(times[name], 1, 1) if name in times else "" for name in names]
            floor = [f"{best['floor_us']:.1f}", *cells, f"{best['floor_us'] / best['us']:.0%}"]
            body.append([f"{operation} {place}, {phase}", *floor])
        of = f"{dtype}, " + ("no batch" if batch is None else f"batch {batch}")
        lines += [f"#### {of}", "", *table([of, "floor", *names, "share"], body), ""]
    return lines


def trunk_lines(rows: list[Row]) -> list[str]:
    """One table for each dtype and batch size; beside what was measured like them, prototypes."""
    lines = [
        "The floor is the slower of traffic and arithmetic at the measured limits. What `triton`",
        "and `eager` do in several launches is timed together.",
    ]
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows if "us" in row):
        like_prototype = (dtype, batch) == (prediction.DTYPE, prediction.BATCH)
        like_prototype &= prediction.MEASURED.name in rows[0]["card"]
        head = [
            "kernel",
            "place",
            "implementation",
            "us (20 % - 80 %)",
            "floor us",
            "floor / time",
        ]
        body = []
        for row in rows:
            if (row["dtype"], row["batch"]) != (dtype, batch) or "us" not in row:
                continue
            names = [row[name] for name in head[:3]]
            floor = ["", ""]  # of a row whose card's limits were not measured
            if "floor_us" in row:
                floor = [f"{row['floor_us']:.1f}", f"{row['floor_us'] / row['us']:.0%}"]
            body.append([*names, spread(row, 1, 1), *floor])
            if like_prototype:
                us = prediction.PROTOTYPE_US.get((row["kernel"], row["place"]))
                body[-1].append("" if us is None else f"{us:.1f}")
        if like_prototype:
            head.append(prediction.PROTOTYPE)
        of = f"{dtype}, " + ("no batch" if batch is None else f"batch {batch}")
        lines += ["", f"#### {of}", "", *table(head, body)]
    return [*lines, ""]


def step_lines(rows: list[Row]) -> list[str]:
    """One table for each phase, network, dtype and batch size."""
    lines = [
        "The floor is launch after launch, each at the slower of traffic and arithmetic. The",
        "package's training step (auto, and its implementations by name) also makes its batch;",
        "plain PyTorch's is given one.",
    ]
    problems = dict.fromkeys((r["phase"], r["depth"], r["dtype"], r["batch"]) for r in rows)
    for problem in problems:
        same = [r for r in rows if (r["phase"], r["depth"], r["dtype"], r["batch"]) == problem]
        timed = [row for row in same if "us" in row]
        phase, depth, dtype, batch = problem
        slowest = max((row["us"] for row in timed), default=0.0)
        body = [
            [
                row["implementation"],
                spread(row, 1e3, 3),
                f"{row['images_per_second']:,.0f}",
                f"{slowest / row['us']:.1f}x",
                f"{row['floor_us'] / row['us']:.0%}",
                "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            ]
            for row in sorted(timed, key=lambda row: row["us"])
        ]
        floor = f", floor {timed[0]['floor_us'] / 1e3:.3f} ms" if timed else ""
        lines += ["", f"#### ResNet-{depth}, {phase}, {dtype}, batch {batch}{floor}", ""]
        head = ["", "ms (20 % - 80 %)", "images/s", "against the slowest", "floor / time"]
        lines += table([*head, "peak MiB"], body)
    return [*lines, ""]


def loader_lines(rows: list[Row]) -> list[str]:
    body = [
        [
            f"{row['implementation']}, {row['dtype']}, batch {row['batch']}",
            spread(row, 1, 1),
            f"{row['images_per_second']:,.0f}",
            f"{row['floor_us']:.1f}",
        ]
        for row in rows
        if "us" in row
    ]
    return [*table(["loader", "us a batch (20 % - 80 %)", "images/s", "floor, us"], body), ""]


def train_lines(rows: list[Row]) -> list[str]:
    """One row for all seeds of a setting: mean and standard deviation."""
    settings: dict[tuple, list[Row]] = {}
    for row in rows:
        settings.setdefault(tuple(row[name] for name in CASES["train"][:-1]), []).append(row)
    body = []
    for (dataset, depth, dtype, batch, epochs, limit, name), seeds in settings.items():
        reached = [row["seconds_to_target"] for row in seeds if row["seconds_to_target"]]
        target = f"{100 * seeds[0]['target']:g} %: "
        target += f"{mean_and_deviation(reached, 1)} s" if reached else "not reached"
        if 0 < len(reached) < len(seeds):
            target += f", {len(reached)} of {len(seeds)}"
        what = f"ResNet-{depth}, {dataset}" + (f", {limit} pictures" if limit else "")
        body.append(
            [
                f"{what}, {dtype}, batch {batch}, {epochs} epochs, {name}",
                str(len(seeds)),
                mean_and_deviation([100 * row["accuracy"] for row in seeds], 2),
                mean_and_deviation([row["seconds"] for row in seeds], 1),
                target,
            ]
        )
    return [*table(["training", "seeds", "accuracy, %", "seconds", "to accuracy"], body), ""]


def mean_and_deviation(values: list[float], digits: int) -> str:
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def failure_lines(rows: list[Row]) -> list[str]:
    """The cases without a time, and why; the phases of one case in one line."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if "no_time" in row:
            case = {name: row.get(name) for name in CASES[row["suite"]]}
            same = tuple(value for name, value in case.items() if name != "phase")
            groups.setdefault((same, row["no_time"]), []).append(case)
    if not groups:
        return []
    lines = [f"* {describe(cases)}: {reason}" for (_, reason), cases in groups.items()]
    return ["Without a time:", "", *lines, ""]


def prediction_lines() -> list[str]:
    """The networks on a card that has not been measured."""
    card = CARDS["RTX 3080"]
    lines = [f"## {card.name}: a prediction, not a measurement", ""]
    for depth in (20, 56, 110):
        first, *assumed = roofline.prediction_lines(depth, 1024, "fp16", card)
        lines.append(f"* ResNet-{depth}, batch 1024, fp16. {first}")
    return [*lines, "", *(f"* {line.strip()}" for line in assumed), ""]


def ladder_lines(rows: list[Row]) -> list[str]:
    """What became of each program that the ladder ran."""
    return [
        *(f"* {r['rung']}: {r['state']} in {r['seconds']:.0f} s; `{r['said']}`" for r in rows),
        "",
    ]


SECTIONS = {  # title, and what makes the lines
    "card": ("", card_lines),
    "ladder": ("The ladder", ladder_lines),
    "step": ("Training steps and inference", step_lines),
    "trunk": ("Kernels of the trunk", trunk_lines),
    "kernels": ("Kernels", kernel_lines),
    "loader": ("Loaders", loader_lines),
    "train": ("Trainings", train_lines),
}
CHARTS = {"step": charts.draw_steps, "kernels": charts.draw_kernels}


def report(rows: list[Row], folder: Path) -> str:
    """The report in Markdown; writes its charts into ``folder``."""
    lines = [
        "# Measurements",
        "",
        "Written by `python -m bench.report` from the results beside it.",
    ]
    for card, date in dict.fromkeys((row["card"], row["date"]) for row in rows):
        here = [row for row in rows if (row["card"], row["date"]) == (card, date)]
        lines += ["", f"## {card}, {date}", "", *_header_lines(here), ""]
        for suite, (title, make) in SECTIONS.items():
            of_suite = [row for row in here if row["suite"] == suite]
            if not of_suite:
                continue
            lines += [f"### {title}", ""] if title else []
            drawn = [row for row in of_suite if "us" in row and row["batch"] is not None]
            if suite in CHARTS and drawn:
                name = charts.file_name(suite, card, date)
                CHARTS[suite](drawn, f"{card}, {date}", folder / name)
                lines += [f"![{title}]({name})", ""]
            lines += [*make(of_suite), *failure_lines(of_suite), ""]
    return "\n".join([*lines, *prediction_lines()]).replace("\n\n\n", "\n\n")


def _header_lines(rows: list[Row]) -> list[str]:
    """Versions and commits of the rows; a report may be of several runs."""
    parts = []
    for name in ("driver", "torch", "triton", "python", "commit"):
        values = dict.fromkeys(str(row[name]) for row in rows if row[name] is not None)
        if values:
            parts.append(f"{name} {', '.join(values)}")
    if any(row["quick"] for row in rows):
        parts.append("some with --quick: shorter samples")
    return ["; ".join(parts) + "."]


def main(arguments: list[str] | None = None) -> int:
    description = __doc__.partition("\n\n")[2].replace("``", "")
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=description)
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="result files (default: *.jsonl in --out)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="folder of the report (default: bench/results)",
    )
    options = parser.parse_args(arguments)
    paths = options.files or sorted(options.out.glob("*.jsonl"))
    if not paths:
        parser.error(f"no results in {options.out}: python -m bench.step measures some")
    try:
        rows = read_results(paths)
        options.out.mkdir(parents=True, exist_ok=True)
        text = report(rows, options.out)
        (options.out / "report.md").write_text(text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(rows)} results in {options.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
