"""Train several seeds, and give mean and standard deviation: python examples/seeds.py

``python -m cifar_resnet_fast.train --runs 3`` does the same on the command line. From Python the
settings may differ from run to run, and every result is at hand.
"""

import statistics
import tempfile
from pathlib import Path

from cifar_resnet_fast import TrainConfig, train


def main(folder: Path, seeds: int = 3, images: int = 400) -> list[float]:
    """The accuracy of each seed; the runs are in ``folder``."""
    accuracies = []
    for seed in range(seeds):
        # so small that it takes seconds, and the accuracy is near chance; a real sweep is
        # TrainConfig.of_recipe("fast", depth=20, seed=seed, out=...)
        config = TrainConfig(
            depth=8,
            dataset="shapes",
            limit=images,
            epochs=2,
            batch_size=20,
            lr=0.05,
            warmup_epochs=1.0,
            milestones=(2,),
            seed=seed,
            out=str(folder / f"seed-{seed}"),
        )
        accuracies.append(train(config).accuracy)
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    print(f"{seeds} seeds: accuracy {mean:.1%}, standard deviation {deviation:.1%}")
    return accuracies


if __name__ == "__main__":
    main(Path(tempfile.mkdtemp()))
