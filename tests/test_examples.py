"""Each of examples/ runs at small size and does what it says."""

import importlib.util
import re
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


pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """All cells, with fewer images; they check what they have computed."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    for cell in notebook.cells:
        cell.source = cell.source.replace("limit=4000", "limit=500")
    assert str(notebook).count("limit=500") == 2
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    shown = "".join(output.get("text", "") for output in outputs)
    assert len(re.findall(r"^epoch \d+: [\d.]+ %$", shown, re.MULTILINE)) == 5
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", shown).groups())
    assert after < before
