"""The real CIFAR-10: a short training is clearly above chance."""

import json

from cifar_resnet_fast.train import main


def test_resnet8_learns(cifar10, tmp_path):
    out = tmp_path / "run"
    arguments = (
        f"--dataset {cifar10} --limit 5000 --depth 8 --epochs 5 --batch-size 100 --lr 0.1 "
        f"--warmup-epochs 1 --milestones 4 --out {out}"
    )
    assert main(arguments.split()) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # chance is 10 %, with a deviation of 0.4 % over the 5000 test pictures
    assert rows[-1]["test_accuracy"] > 0.4
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
