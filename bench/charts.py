"""Charts of stored results: bars are measured, the black line at each is its floor."""

import re
from pathlib import Path

from matplotlib.figure import Figure

# an implementation has its place and colour in every chart: the package's warm, PyTorch's cold
_COLOURS = {
    "auto": "#7a2048",
    "cuda": "#c8443c",
    "triton": "#e8973a",
    "compile max-autotune": "#1b6ca8",
    "compile": "#4a97c9",
    "compile max-autotune graph": "#1b6ca8",
    "compile graph": "#4a97c9",
    "eager graph": "#6fb7b0",
    "eager": "#9aa7b1",
    "eager fp32": "#c9cfd4",
}
_OTHERS = "#5c8a3a"  # implementations that came later


def file_name(suite: str, card: str, date: str) -> str:
    """Of a suite's chart for one card and date."""
    return re.sub(r"[^a-z0-9]+", "-", f"{suite} {card} {date}".lower()).strip("-") + ".png"


def draw_kernels(rows: list[dict], title: str, path: Path) -> None:
    """Microseconds of every kernel of the largest batch, forward and backward side by side.

    Args:
        rows: times of the suite ``kernels`` on one card, all with a batch size. of several dtypes
            the first with the largest is drawn. what has no gradient stands under forward
        title: of the chart
        path: of the PNG file
    """
    batch, dtype = max(((r["batch"], r["dtype"]) for r in rows), key=lambda problem: problem[0])
    rows = [row for row in rows if (row["batch"], row["dtype"]) == (batch, dtype)]

    def label(row: dict) -> str:
        return f"{row['operation']}\n{row['place']}"

    labels = list(dict.fromkeys(label(row) for row in rows))
    names = _names(rows)
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(labels)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title_of, phases in (
        (left, "forward", ("forward", "call")),
        (right, "backward", ("backward",)),
    ):
        _bars(axes, [r for r in rows if r["phase"] in phases], labels, names, label, 1.0)
        axes.set_title(title_of, loc="left", fontsize=10)
        axes.set_xlabel("microseconds")
    _finish(figure, left, names, f"Kernels, batch {batch}, {dtype}: {title}", path)


def draw_steps(rows: list[dict], title: str, path: Path) -> None:
    """Milliseconds of a training step and of inference, for every network at its largest batch.

    Args:
        rows: times of the suite ``step`` on one card
        title: of the chart
        path: of the PNG file
    """
    largest = {}
    for row in rows:
        largest[row["phase"]] = max(largest.get(row["phase"], 0), row["batch"])
    rows = [row for row in rows if row["batch"] == largest[row["phase"]]]

    def label(row: dict) -> str:
        return f"ResNet-{row['depth']}\n{row['dtype']}"

    labels = list(dict.fromkeys(label(row) for row in rows))
    names = _names(rows)
    height = 1.2 + 0.25 * len(labels) * max(len(names), 2)
    figure = Figure(figsize=(11, height), layout="constrained")
    panels = figure.subplots(1, len(largest), sharey=True, squeeze=False)[0]
    for axes, (phase, batch) in zip(panels, largest.items(), strict=True):
        _bars(axes, [r for r in rows if r["phase"] == phase], labels, names, label, 1e-3)
        axes.set_title(f"{phase}, batch {batch}", loc="left", fontsize=10)
        axes.set_xlabel("milliseconds")
    _finish(figure, panels[0], names, f"Whole network: {title}", path)


def _names(rows: list[dict]) -> list[str]:
    """The implementations in ``rows``, in the order of their colours, others last."""
    found = list(dict.fromkeys(row["implementation"] for row in rows))
    order = list(_COLOURS)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _bars(axes, rows: list[dict], labels: list[str], names: list[str], label, unit: float) -> None:
    """A group of bars for each label, a bar for each implementation, times in ``unit`` us."""
    thickness = 0.84 / len(names)
    for row in rows:
        place = names.index(row["implementation"])
        y = labels.index(label(row)) + (place - (len(names) - 1) / 2) * thickness
        time, low, high = (row[name] * unit for name in ("us", "us_20", "us_80"))
        colour = _COLOURS.get(row["implementation"], _OTHERS)
        axes.barh(y, time, thickness * 0.9, color=colour, label=row["implementation"])
        axes.plot([low, high], [y, y], color="black", linewidth=0.7)
        number = f"{time:.3g}" if time < 1000 else f"{time:,.0f}"
        axes.text(high, y, f" {number}", va="center", fontsize=6)
        floor = row["floor_us"] * unit
        axes.plot([floor, floor], [y - thickness / 2, y + thickness / 2], color="black", lw=1.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1.06 * axes.get_xlim()[1])  # room for the last number
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)


def _finish(figure: Figure, axes, names: list[str], title: str, path: Path) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles: dict[str, object] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    (floor,) = axes.plot([], [], color="black", lw=1.6)
    figure.legend(
        [*(handles[name] for name in names), floor],
        [*names, "floor"],
        loc="outside lower left",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=120)
