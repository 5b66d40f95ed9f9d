"""Train on images of your own: python examples/own_data.py

Images are [N, 32, 32, 3] uint8 and labels are [N] integers. In memory they make a ``Dataset``;
in a .npz file they serve the command line as well.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from cifar_resnet_fast import TrainConfig, train
from cifar_resnet_fast.data.datasets import Dataset, load_dataset

CLASSES = ("red", "green", "blue")


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise that is brighter in one colour: put your own images here."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    images = random.integers(0, 156, (count, 32, 32, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 100
    return images, labels


def main(folder: Path, images: int = 600) -> float:
    """The accuracy on the test images; the run and its data are in ``folder``."""
    train_split, test_split = draw(images, seed=0), draw(images // 2, seed=1)
    dataset = Dataset("colours", *map(torch.from_numpy, (*train_split, *test_split)), CLASSES)
    config = TrainConfig(
        depth=8,
        epochs=2,
        batch_size=20,
        lr=0.05,
        warmup_epochs=1.0,
        milestones=(2,),
        out=str(folder / "run"),
    )
    result = train(config, dataset=dataset)

    # the same data in a file, for: python -m cifar_resnet_fast.train --dataset colours.npz
    np.savez_compressed(
        folder / "colours.npz",
        x_train=train_split[0],
        y_train=train_split[1],
        x_test=test_split[0],
        y_test=test_split[1],
        classes=CLASSES,
    )
    assert load_dataset(str(folder / "colours.npz"), "data").classes == CLASSES
    return result.accuracy


if __name__ == "__main__":
    print(f"test accuracy {main(Path(tempfile.mkdtemp())):.1%}")
