"""The real CIFAR-10: a short training is clearly above chance, and networks score what their
cards say."""

import copy
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cifar_resnet_fast import FastResNet, export, models
from cifar_resnet_fast.data.loader import Loader
from cifar_resnet_fast.train import main
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.training.evaluate import predict
from cifar_resnet_fast.verification.budget import assert_within_budget
from cifar_resnet_fast.weights import pretrained

PART = 8  # images that a kernel computes on a CPU


@pytest.fixture(scope="module")
def run(cifar10, tmp_path_factory) -> Path:
    """The folder of a short training."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = (
        f"--dataset {cifar10} --limit 5000 --depth 8 --epochs 5 --batch-size 100 --lr 0.1 "
        f"--warmup-epochs 1 --milestones 4 --out {out}"
    )
    assert main(arguments.split()) == 0
    return out


def test_resnet8_learns(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # chance is 10 %, with a deviation of 0.4 % over the 5000 test images
    assert rows[-1]["test_accuracy"] > 0.4
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


# --- packaged networks ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def test_images(unpack_cifar10) -> tuple[Tensor, Tensor, list[str]]:
    """All 10,000 test images [N, 32, 32, 3] uint8, their labels and the names of the classes."""
    script = runpy.run_path(str(unpack_cifar10))
    labels = np.load(script["SHEETS"] / "labels.npz")
    images = torch.from_numpy(script["unpack"]("test"))
    return images, torch.from_numpy(labels["test"]).long(), labels["classes"].tolist()


def logits_of(model: FastResNet, images: Tensor, dtype: torch.dtype, device: torch.device):
    """What the model makes of bytes, normalised as its card says."""
    mean, std = (torch.tensor(model.card[name]) for name in ("mean", "std"))
    size = min(500, len(images))
    unused = torch.zeros(len(images), dtype=torch.int64)
    loader = Loader(
        images, unused, mean, std, batch_size=size, device=device, dtype=dtype, augmented=False
    )
    return predict(model.to(device), loader, device=device, dtype=dtype)[0]


def exact_logits_of(model: FastResNet, images: Tensor) -> Tensor:
    """The same in float64."""
    mean, std = (torch.tensor(model.card[name]).double() for name in ("mean", "std"))
    x = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        return copy.deepcopy(model).cpu().double()(x)


def lead(logits: Tensor) -> Tensor:
    """By how much the largest of each row exceeds the second."""
    first, second = logits.topk(2).values.T
    return first - second


def check_card(folder: Path, name: str, test_images: tuple, device: torch.device) -> None:
    """A network in a folder of weights scores on a test set what its card says.

    As many images are classified right as the card says, but for those whose two largest logits
    are as close as the rounding of another machine's sums can move them.
    """
    images, labels, classes = test_images
    model = FastResNet.from_pretrained(folder / f"{name}.safetensors", "reference")
    card = model.card
    assert card["evaluated_on"] == "test"
    assert card["class_names"] == classes
    dtype = DTYPES[card["training"]["dtype"]]
    logits = logits_of(model, images, dtype, device)
    exact = exact_logits_of(model, images[:100])
    # twice what this machine errs by, in each of the two logits
    close = lead(logits) <= 4 * (logits[:100] - exact).abs().max()
    assert not close.all()
    right = logits.argmax(1) == labels
    surely, perhaps = int((right & ~close).sum()), int((right | close).sum())
    said = round(card["accuracy"] * len(images))
    assert surely <= said <= perhaps, (
        f"{surely} to {perhaps} images are right, the card says {said}"
    )


def check_kernels(
    folder: Path, name: str, test_images: tuple, device: torch.device, implementation: str
) -> None:
    """On a part of a test set, kernels predict what the reference predicts."""
    images = test_images[0][:PART]
    reference = FastResNet.from_pretrained(folder / f"{name}.safetensors", "reference")
    kernels = FastResNet.from_pretrained(folder / f"{name}.safetensors", implementation)
    exact = exact_logits_of(reference, images)
    eager = logits_of(reference, images, torch.float16, device)
    logits = logits_of(kernels, images, torch.float16, device)
    assert_within_budget("logits", logits, eager, exact)
    sure = lead(exact) > 4 * (eager - exact).abs().max()
    assert sure.any()
    assert torch.equal(logits.argmax(1)[sure], exact.argmax(1)[sure])


@pytest.mark.parametrize("name", models())
def test_a_packaged_network_scores_what_its_card_says(name, test_images, device):
    check_card(pretrained.FOLDER, name, test_images, device)


@pytest.mark.parametrize("implementation", ["triton", "cuda"])
@pytest.mark.parametrize("name", models())
def test_kernels_score_a_packaged_network(name, implementation, test_images, kernels_run, device):
    kernels_run(implementation)
    check_kernels(pretrained.FOLDER, name, test_images, device, implementation)


@pytest.fixture
def weights(run, tmp_path) -> Path:
    """A folder as the package's, with what was trained here."""
    out = tmp_path / "stand-in.safetensors"
    assert export.main([str(run), "--to", "safetensors", "--out", str(out)]) == 0
    return tmp_path


def test_a_stand_in_scores_what_its_card_says(weights, test_images, device):
    images, labels, classes = test_images
    check_card(weights, "stand-in", (images[:5000], labels[:5000], classes), device)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda card: {"accuracy": card["accuracy"] + 0.002}, id="10-images-more"),
        pytest.param(lambda card: {"mean": [0.3] * 3}, id="other-mean"),
        pytest.param(lambda card: {"evaluated_on": "validation"}, id="other-images"),
        pytest.param(lambda card: {"class_names": card["class_names"][::-1]}, id="other-classes"),
    ],
)
def test_a_wrong_card_is_noticed(wrong, weights, test_images, device):
    images, labels, classes = test_images
    path = weights / "stand-in.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, **wrong(card)}))
    with pytest.raises(AssertionError):
        check_card(weights, "stand-in", (images[:5000], labels[:5000], classes), device)


@pytest.mark.parametrize("implementation", ["triton", "cuda"])
def test_kernels_score_a_stand_in(implementation, weights, test_images, kernels_run, device):
    kernels_run(implementation)
    check_kernels(weights, "stand-in", test_images, device, implementation)
