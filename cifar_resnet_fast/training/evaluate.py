"""Evaluation on a test set: scores by class, confusion matrix, predictions (layer 4)."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_resnet_fast.checkpoint import write_atomically
from cifar_resnet_fast.data.loader import Loader
from cifar_resnet_fast.data.test_sets import SEVERITIES
from cifar_resnet_fast.training.logbook import new_figure

_CALIBRATION_BINS = 15


@torch.no_grad()
def predict(
    model: nn.Module,
    loader: Loader,
    *,
    device: torch.device,
    dtype: torch.dtype,
    mirrored: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of all images of a loader, in its order.

    Args:
        model: on ``device``
        loader: without augmentation, on ``device``, of one process
        device: the device of the evaluation
        dtype: dtype of the activations
        mirrored: also run each image's mirror image

    Returns:
        logits: [N, K] float32, on the CPU
        labels: [N] int64, on the CPU
        both: [N, K] float32, on the CPU. the mean of the logits of each image and of its mirror
            image; None if not ``mirrored``
    """
    model.eval()
    made, steps = [], torch.zeros((), dtype=torch.int64, device=device)
    for step in range(loader.steps):
        loader.prepare(step)
        images, labels = loader.batch(steps)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(images).float()
            both = (logits + model(images.flip(3)).float()) / 2 if mirrored else logits
        made.append([part.cpu() for part in (logits, labels, both)])
        steps += 1
    logits, labels, both = (torch.cat(parts) for parts in zip(*made, strict=True))
    present = labels >= 0  # black images fill the last batch
    return logits[present], labels[present], both[present] if mirrored else None


@dataclass(frozen=True)
class Scores:
    """Scores of predictions on a test set; shares are 0 .. 1.

    loss: mean cross entropy
    top1, top5: share of the images whose label is the first, or among the first five
    calibration_error: expected calibration error over 15 bins of confidence
    confusion: [K, K] int64. number of images of class i that were classified as j

    Source: Guo et al. 2017, equation 3 (calibration error).
    """

    loss: float
    top1: float
    top5: float
    calibration_error: float
    confusion: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Scores":
        K = logits.shape[1]
        order = logits.topk(min(5, K)).indices
        right = order == labels[:, None]
        confidence, predicted = F.softmax(logits.double(), 1).max(1)
        bins = (confidence * _CALIBRATION_BINS).ceil().long().clamp(1, _CALIBRATION_BINS) - 1
        gap = torch.zeros(_CALIBRATION_BINS, dtype=torch.float64)
        gap.index_add_(0, bins, confidence - (predicted == labels).double())
        confusion = torch.bincount(labels * K + predicted, minlength=K * K).reshape(K, K)
        return cls(
            F.cross_entropy(logits.double(), labels).item(),
            right[:, 0].double().mean().item(),
            right.any(1).double().mean().item(),
            gap.abs().sum().item() / len(labels),
            confusion,
        )

    def by_class(self) -> list[float | None]:
        """The share of each class's images that were classified correctly; None if it has none."""
        pairs = zip(
            self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True
        )
        return [right / count if count else None for right, count in pairs]


class SetScores(NamedTuple):
    """Scores of one test set among others; shares are 0 .. 1.

    mirrored: ``top1`` of the mean over each image and its mirror image; None if that was not run
    by_severity: ``top1`` of each severity; empty if there are none
    """

    name: str
    images: int
    scores: Scores
    mirrored: float | None
    by_severity: list[float]

    @classmethod
    def of(
        cls, name: str, logits: Tensor, labels: Tensor, both: Tensor | None, severities: int
    ) -> "SetScores":
        """Scores of the result of ``predict``, for images ordered by that many severities."""
        right = (logits.argmax(1) == labels).double().reshape(severities, -1)
        return cls(
            name,
            len(labels),
            Scores.of(logits, labels),
            None if both is None else Scores.of(both, labels).top1,
            right.mean(1).tolist() if severities > 1 else [],
        )


def table_of(rows: Iterable[SetScores]) -> Iterator[str]:
    """A line with the column heads, one line for each test set, and one with the means."""
    heads = ["top-1", "top-5", "ECE", "mirror", *map(str, range(1, SEVERITIES + 1))]
    yield f"{'test set':<24}{'images':>8}" + "".join(f"{head:>8}" for head in heads)
    columns: list[list[float]] = [[] for _ in heads]
    count = 0
    for row in rows:
        scores = row.scores
        cells = [scores.top1, scores.top5, scores.calibration_error, row.mirrored]
        cells += row.by_severity or [None] * SEVERITIES
        for column, cell in zip(columns, cells, strict=True):
            column += [] if cell is None else [cell]
        count += 1
        yield f"{row.name:<24}{row.images:>8}" + "".join(map(_shown, cells))
    if count > 1:
        means = [sum(column) / len(column) if column else None for column in columns]
        yield f"{'mean':<24}{'':>8}" + "".join(map(_shown, means))


def _shown(share: float | None) -> str:
    return f"{'-' if share is None else f'{100 * share:.2f}':>8}"


def write_predictions(
    path: Path, logits: Tensor, labels: Tensor, classes: tuple[str, ...]
) -> None:
    """A table with a row for each image: index, label, prediction, and its probability.

    Raises:
        OSError: the file cannot be written
    """
    confidence, predicted = F.softmax(logits.double(), 1).max(1)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["index", "label", "prediction", "probability"])
    columns = (labels.tolist(), predicted.tolist(), confidence.tolist())
    for index, (label, guess, share) in enumerate(zip(*columns, strict=True)):
        table.writerow([index, classes[label], classes[guess], f"{share:.6f}"])
    write_atomically(path, text.getvalue().encode())


def draw_confusion(path: Path, confusion: Tensor, classes: tuple[str, ...], title: str) -> None:
    """A .png of a confusion matrix, each row in shares of its class.

    Raises:
        OSError: the file cannot be written
    """
    K = len(classes)
    shares = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    figure = new_figure(figsize=(2 + 0.6 * min(K, 20),) * 2)
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="label", title=title)
    if K <= 20:
        axes.set_xticks(range(K), classes, rotation=45, ha="right")
        axes.set_yticks(range(K), classes)
        for i in range(K):
            for j in range(K):
                colour = "white" if shares[i, j] > 0.5 else "black"
                count = str(int(confusion[i, j]))
                axes.text(j, i, count, ha="center", va="center", color=colour, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomically(path, data.getvalue())
