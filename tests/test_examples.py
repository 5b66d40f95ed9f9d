"""Each of examples/ runs at small size and does what it says."""

import importlib.util
from pathlib import Path

import pytest
import torch

from cifar_resnet_fast import FastResNet

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTED = ("fine_tuning", "own_data", "own_loop", "seeds")


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_example_is_tested():
    assert tuple(sorted(path.stem for path in EXAMPLES.glob("*.py"))) == TESTED


def test_own_loop():
    losses = example("own_loop").main(images=200, epochs=3, batch_size=20)
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_own_data(tmp_path):
    assert example("own_data").main(tmp_path, images=300) > 0.9
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_fine_tuning(tmp_path):
    torch.manual_seed(1)
    before = FastResNet(8, num_classes=3)
    before.save_pretrained(tmp_path)
    tuned = example("fine_tuning").main(str(tmp_path), images=40, steps=10)
    assert tuned["losses"][-1] < tuned["losses"][0]
    assert len(tuned["seen"]) == 10
    assert not tuned["model"].layer2._forward_hooks
    ours, theirs = tuned["model"].state_dict(), before.state_dict()
    changed = {key.split(".")[0] for key in ours if not torch.equal(ours[key], theirs[key])} - {""}
    assert changed == {"layer3", "linear"}


def test_seeds(tmp_path):
    accuracies = example("seeds").main(tmp_path, seeds=2, images=40)
    assert len(accuracies) == 2
    weights = [
        torch.load(tmp_path / f"seed-{seed}" / "checkpoint.pt", weights_only=True)["state_dict"]
        for seed in (0, 1)
    ]
    assert not torch.equal(*(state["conv1.weight"] for state in weights))
