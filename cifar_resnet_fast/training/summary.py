"""The results of several runs: a table, summary.json and, for a sweep, an image (layer 4)."""

import io
import statistics
from pathlib import Path

from cifar_resnet_fast.checkpoint import write_atomically
from cifar_resnet_fast.training.config import TrainConfig, name_of_setting
from cifar_resnet_fast.training.logbook import new_figure
from cifar_resnet_fast.training.run import write_json


def summarize(folder: Path, config: TrainConfig, accuracies: list[float | None]) -> None:
    """Print and record mean and standard deviation over the seeds, per combination of a sweep.

    Args:
        folder: where summary.json and, for a sweep, summary.png are written
        config: the config of several runs
        accuracies: those of its members, in their order, 0 .. 1; None for a failed run
    """
    settings = config.settings()
    rows = []
    for place, setting in enumerate(settings):
        own = accuracies[place * config.runs : (place + 1) * config.runs]
        rows.append({"setting": name_of_setting(setting), **_over_seeds(config, own)})
    title = f"{len(accuracies)} runs of ResNet-{config.depth}"
    if not config.sweep:
        (row,) = rows
        del row["setting"]
        write_json(folder / "summary.json", row)
        print(f"{title}: accuracy {_score(row)} (mean, standard deviation); in {folder}")
        return
    write_json(folder / "summary.json", {"sweep": list(config.sweep), "settings": rows})
    print(f"{title}: accuracy by setting, mean and standard deviation; in {folder}")
    width = max(len(row["setting"]) for row in rows)
    for row in rows:
        failed = f"  ({len(row['failed_seeds'])} failed)" if row["failed_seeds"] else ""
        print(f"  {row['setting']:{width}}  {_score(row)}{failed}")
    draw_summary(folder / "summary.png", rows, title)


def _over_seeds(config: TrainConfig, accuracies: list[float | None]) -> dict:
    by_seed = dict(zip(range(config.seed, config.seed + config.runs), accuracies, strict=True))
    finished = {seed: accuracy for seed, accuracy in by_seed.items() if accuracy is not None}
    values = list(finished.values())
    return {
        "seeds": list(finished),
        "failed_seeds": [seed for seed in by_seed if seed not in finished],
        "accuracies": values,
        "mean": statistics.mean(values) if values else None,
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def _score(row: dict) -> str:
    if row["mean"] is None:
        return "no run has finished"
    deviation = row["standard_deviation"]
    spread = "" if deviation is None else f" +- {100 * deviation:.2f}"
    return f"{100 * row['mean']:.2f} %{spread}"


def draw_summary(path: Path, rows: list[dict], title: str) -> None:
    """Draw a sweep: every run as a dot, mean and standard deviation of each setting."""
    figure = new_figure(figsize=(8, 1.5 + 0.4 * len(rows)))
    figure.suptitle(title)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = [100 * accuracy for accuracy in row["accuracies"]]
        axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.4)
        if values:
            spread = 100 * (row["standard_deviation"] or 0.0)
            axes.errorbar(100 * row["mean"], place, xerr=spread, fmt="k|", capsize=4)
    axes.set_yticks(range(len(rows)), [row["setting"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="accuracy, %: runs, mean and standard deviation")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())
