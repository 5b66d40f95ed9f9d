"""The records of a run: progress, metrics.jsonl, curves.png, TensorBoard (layer 4).

Each row of metrics.jsonl describes one epoch:

=================  ========================================================
epoch              number of finished epochs, from 1
step               number of finished training steps
lr                 learning rate of the epoch's last step
train_loss         mean over the epoch, of each batch before its step
train_accuracy     the same, 0 .. 1
skipped_steps      steps since the start of the run whose gradients were not finite
test_loss          mean over the evaluated split after the epoch
test_accuracy      the same, 0 .. 1 (of the held-out split with --validation)
test_accuracy_flip with --tta flip: for the mean over each image and its mirror image
images_per_second  training only
seconds            training and evaluation since the start of the run
=================  ========================================================

Rows of epochs without an evaluation (--evaluate-every) have none of the test columns.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_resnet_fast.checkpoint import write_atomically
from cifar_resnet_fast.errors import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = "curves.png"
_CURVES_EVERY_SECONDS = 60.0  # drawing takes about half a second


class Logbook:
    """The live display and the files of one run; a context manager.

    Args:
        folder: the run's folder
        epochs, steps_per_epoch: sizes of the whole training
        start_step: steps that a resumed run has already taken; later rows are dropped
        evaluated: name of the evaluated split in the display, "test" or "validation"
        title: title of the curves
        tensorboard: write events into ``folder``/tensorboard
        label: begins each line, and there is no bar, for runs beside each other
    """

    def __init__(
        self,
        folder: Path,
        *,
        epochs: int,
        steps_per_epoch: int,
        start_step: int,
        evaluated: str,
        title: str,
        tensorboard: bool,
        label: str = "",
    ):
        self.folder = folder
        rows, dropped = read_metrics(folder)
        self.rows = [row for row in rows if row["step"] <= start_step]
        write_atomically(self.metrics_path, "".join(map(_line, self.rows)).encode())
        self._title, self._evaluated, self._epochs = title, evaluated, epochs
        self._curves_drawn = time.monotonic()
        self._events = None
        if tensorboard:
            with extra("train"):
                from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._events = SummaryWriter(folder / "tensorboard", purge_step=len(self.rows) + 1)
        with extra("train"):
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

        self._console = Console()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=bool(label) or not (self._console.is_terminal or self._console.is_jupyter),
            transient=True,
        )
        self._task = self._progress.add_task(
            "", total=epochs * steps_per_epoch, completed=start_step, epoch=1, numbers=""
        )
        self._steps_per_epoch = steps_per_epoch
        self._label = f"{label}: " if label else ""
        if dropped:
            self.say(f"{dropped} lines of {self.metrics_path} are not rows and were dropped")

    def __enter__(self) -> "Logbook":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        if self.rows:
            self._draw_curves()
        if self._events is not None:
            self._events.close()

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def show(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Move the bar to ``step``, with the loss and accuracy of the running epoch so far."""
        self._progress.update(
            self._task,
            completed=step,
            epoch=min(step // self._steps_per_epoch + 1, self._epochs),
            numbers=f"{images_per_second:,.0f} images/s  loss {loss:.3f}  "
            f"accuracy {100 * accuracy:.1f} %",
        )

    def add(self, row: dict) -> None:
        """Record one epoch's row, on the disk before it is shown."""
        self.rows.append(row)
        with open(self.metrics_path, "a") as file:
            file.write(_line(row))
        if self._events is not None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    self._events.add_scalar(name, value, row["epoch"])
        self.say(
            f"epoch {row['epoch']:>{len(str(self._epochs))}}/{self._epochs}  "
            f"lr {row['lr']:.4f}  loss {row['train_loss']:.4f}  "
            f"accuracy {100 * row['train_accuracy']:6.2f} %  "
            f"{self._scores(row)}"
            f"{row['images_per_second']:,.0f} images/s"
        )
        if time.monotonic() - self._curves_drawn > _CURVES_EVERY_SECONDS:
            self._draw_curves()

    def _scores(self, row: dict) -> str:
        names = (("test_accuracy", self._evaluated), ("test_accuracy_flip", "flip"))
        parts = [f"{label} {100 * row[name]:6.2f} %  " for name, label in names if name in row]
        return "".join(parts)

    def say(self, line: str) -> None:
        """Print a line above the bar, without markup."""
        self._console.print(self._label + line, markup=False, highlight=False, soft_wrap=True)

    def _draw_curves(self) -> None:
        draw_curves(self.folder / CURVES, self.rows, self._title, self._evaluated)
        self._curves_drawn = time.monotonic()


def check_packages(*names: str) -> None:
    """Check that some packages are installed that this file imports only on demand.

    Raises:
        MissingPackageError: one of them is not; the message names the extra that brings it
    """
    with extra("train"):
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ImportError(f"No module named {name!r}")


def new_figure(figsize: tuple[float, float]) -> "Figure":
    """An empty image to draw in, of some inches.

    Raises:
        MissingPackageError: matplotlib is not installed
    """
    # MPLBACKEND may name a backend that is not installed, and figures need none
    own = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None) if own else None
    with extra("train"):
        import matplotlib
        from matplotlib.figure import Figure

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # the value that its import would have set
    return Figure(figsize=figsize, layout="constrained")


def read_metrics(folder: Path) -> tuple[list[dict], int]:
    """The rows of a run's metrics.jsonl, and the number of its lines that are no rows.

    A last line that was cut off is neither returned nor counted: a process was killed while it
    wrote the line.

    Raises:
        OSError: the file cannot be read
    """
    path = folder / "metrics.jsonl"
    if not os.path.lexists(path):
        return [], 0
    rows: list[dict] = []
    dropped = 0
    for line in path.read_bytes().decode(errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _is_row(row) and (not rows or row["step"] > rows[-1]["step"]):
            rows.append(row)
        elif line.endswith("\n"):
            dropped += 1
    return rows, dropped


def _is_row(row: Any) -> bool:
    """Whether a row has the values that are drawn and compared, each of its type."""
    if not isinstance(row, dict):
        return False
    names = ["epoch", "step", "lr", "train_loss", "train_accuracy", "images_per_second", "seconds"]
    names += [name for name in ("test_loss", "test_accuracy", "skipped_steps") if name in row]
    values = [row.get(name) for name in names]
    return all(type(value) is int for value in values[:2]) and all(
        type(value) is float or (type(value) is int and 0 <= value < 2**63) for value in values
    )


def draw_curves(path: Path, rows: list[dict], title: str, evaluated: str) -> None:
    """An image of loss, accuracy and learning rate by epoch, from the rows of metrics.jsonl."""
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 20 else None
    figure = new_figure(figsize=(10, 4))
    figure.suptitle(title, parse_math=False)  # a data set can have any name
    loss, accuracy = figure.subplots(1, 2)
    scored = [row for row in rows if "test_accuracy" in row]
    for split, label, shown in (("train", "training", rows), ("test", evaluated, scored)):
        at = [r["epoch"] for r in shown]
        loss.plot(at, [r[f"{split}_loss"] for r in shown], label=label, marker=marker)
        percent = [100 * r[f"{split}_accuracy"] for r in shown]
        accuracy.plot(at, percent, label=label, marker=marker)
    loss.set(xlabel="epoch", ylabel="cross entropy", yscale="log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}")
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    rate = loss.twinx()
    rate.plot(epochs, [r["lr"] for r in rows], color="grey", linestyle=":", label="learning rate")
    rate.set(ylabel="learning rate (dotted)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    loss.legend(loc="lower left")
    if scored:
        last = scored[-1]
        accuracy.set_title(f"{100 * last['test_accuracy']:.2f} % after epoch {last['epoch']}")
    accuracy.legend(loc="lower right")
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about characters that the font lacks
        figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


class SilentLogbook:
    """The logbook of all processes but the first: keeps the rows, shows and writes nothing."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __enter__(self) -> "SilentLogbook":
        return self

    def __exit__(self, *_) -> None:
        pass

    def show(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        pass

    def add(self, row: dict) -> None:
        self.rows.append(row)

    def say(self, line: str) -> None:
        pass
