"""Time to train by the recipe, and to reach an accuracy: ``python -m bench.train``.

Runs ``cifar_resnet_fast.train`` seed after seed and reads its metrics. What checks the result is
the accuracy that it reached, which stands beside every time. ``seconds`` are training and
evaluation, without imports, compilation and reading the data; ``start_seconds`` are these.
"""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

from bench.suite import Suite, flags
from cifar_resnet_fast import ops, train
from cifar_resnet_fast.training.config import TrainConfig
from cifar_resnet_fast.training.logbook import read_metrics

# flags of the training that a suite without its own may change
QUICK = {"epochs": 8, "milestones": (5, 7), "warmup_epochs": 1.0}
CPU = {"limit": 128, "epochs": 2, "milestones": (1,), "warmup_epochs": 0.0, "batch_size": 32}


def train_once(settings: dict, folder: Path) -> tuple[list[dict], float]:
    """Train; the metrics, one row an epoch, and the seconds that all of it took.

    Raises:
        SystemExit: the training refused its settings, or failed; it has said why
    """
    arguments = ["--no-selfcheck"]  # the accuracy is what checks the result
    for name, value in {**settings, "out": folder}.items():
        values = value if isinstance(value, tuple) else (value,)
        arguments += ["--" + name.replace("_", "-"), *map(str, values)]
    began = time.monotonic()
    status = train.main(arguments)
    if status:
        raise SystemExit(status)
    return read_metrics(folder)[0], time.monotonic() - began


def result(rows: list[dict], total: float, target: float) -> dict:
    """What a training comes to, from its metrics."""
    reached = next((row for row in rows if row["test_accuracy"] >= target), None)
    last = rows[-1]
    return {
        "accuracy": last["test_accuracy"],
        "seconds": last["seconds"],
        "start_seconds": round(total - last["seconds"], 3),
        "target": target,
        "seconds_to_target": reached and reached["seconds"],
        "epochs_to_target": reached and reached["epoch"],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = flags("train", __doc__.partition("\n\n")[2])
    recipe = TrainConfig()
    parser.add_argument("--depth", type=int, nargs="+")
    parser.add_argument("--runs", type=int, default=3, help="seeds from 0 on (default: 3)")
    parser.add_argument(
        "--target", type=float, default=0.9, help="accuracy, 0 .. 1, to be reached (default: 0.9)"
    )
    parser.add_argument(
        "--implementation", nargs="+", choices=("auto", *ops.IMPLEMENTATIONS), default=("auto",)
    )
    parser.add_argument("--dataset", default="auto", help="as cifar_resnet_fast.train has it")
    parser.add_argument("--data-root", default=recipe.data_root, help="likewise")
    options = parser.parse_args(arguments)
    if options.runs < 1 or not 0 < options.target <= 1:
        parser.error("--runs must be at least 1 and --target more than 0 and at most 1")
    suite = Suite("train", options)
    changed = {**(QUICK if suite.quick else {}), **({} if suite.on_gpu else CPU)}
    depths = options.depth or ((20, 56) if suite.on_gpu else (8,))
    with tempfile.TemporaryDirectory() as folder:
        for depth, name, seed in itertools.product(
            depths, options.implementation, range(options.runs)
        ):
            settings = {
                "depth": depth,
                "implementation": name,
                "seed": seed,
                "dataset": options.dataset,
                "data_root": options.data_root,
                "device": options.device,
                **changed,
            }
            place = Path(folder) / f"{depth}-{name}-{seed}"
            rows, total = train_once(settings, place)
            used = TrainConfig.from_dict(json.loads((place / "config.json").read_text()))
            row = {
                "depth": depth,
                "implementation": name,
                "dataset": Path(used.dataset).stem,
                "dtype": used.dtype,
                "batch": used.batch_size,
                "epochs": used.epochs,
                "limit": used.limit,
                "seed": seed,
                **result(rows, total, options.target),
            }
            to_target = row["seconds_to_target"]
            suite.add(
                row,
                f"ResNet-{depth} {name} seed {seed}: {100 * row['accuracy']:.2f} % in "
                f"{row['seconds']:.1f} s; {100 * options.target:.0f} % "
                + ("not reached" if to_target is None else f"after {to_target:.1f} s"),
            )
    return suite.finish()


if __name__ == "__main__":
    sys.exit(main())
