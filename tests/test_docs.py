"""What the documentation says about files and commands is so."""

import json
import re
from pathlib import Path

import pytest

from cifar_resnet_fast import FastResNet, TrainConfig

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| `(\S+)` \| `(\S+)` \| `bench\.(\w+)` \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "kernels.md").read_text())
FILES = [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "cifar_resnet_fast" / "kernels").glob("*.py")]


def kernels(text):
    """Names of the kernels that a source file defines."""
    cuda = re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)
    return cuda + re.findall(r"@triton\.jit\S*\ndef (\w+_kernel)\(", text)


def test_every_kernel_has_a_row():
    defined = {
        (name, str(path.relative_to(ROOT))) for path in FILES for name in kernels(path.read_text())
    }
    assert len(defined) >= 25
    assert {(name, file) for name, _, file, _, _ in ROWS} == defined


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_files_of_a_row_exist(row):
    _, _, file, test, bench = row
    for path in (file, test, f"bench/{bench}.py"):
        assert (ROOT / path).is_file(), path


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in nav, page.name


# network, shortcut, parameters, epochs, batch, seeds, accuracy, in the package, folder of the run
CARD = [
    [cell.strip(" `") for cell in line.split("|")[1:-1]]
    for line in (ROOT / "docs" / "model-card.md").read_text().splitlines()
    if line.startswith("| ResNet-")
]


def ids(rows):
    return ["-".join([*row[:2], row[3]]) for row in rows]


@pytest.mark.parametrize("row", CARD, ids=ids(CARD))
def test_parameters_in_the_model_card(row):
    name, shortcut, parameters, *figures, _, folder = row
    model = FastResNet(int(name.removeprefix("ResNet-")), shortcut=shortcut)
    assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(",", ""))
    assert folder or figures == ["", "", "0", ""]  # no figure without its run


TRAINED = [row for row in CARD if row[-1]]


@pytest.mark.parametrize("row", TRAINED, ids=ids(TRAINED))
def test_figures_in_the_model_card(row):
    """They are what the run's files say."""
    name, shortcut, _, epochs, batch, seeds, accuracy, _, folder = row
    config = TrainConfig.from_dict(json.loads((ROOT / folder / "config.json").read_text()))
    rows = [json.loads(t) for t in (ROOT / folder / "metrics.jsonl").read_text().splitlines()]
    assert (f"ResNet-{config.depth}", config.shortcut) == (name, shortcut)
    assert [config.batch_size, config.runs] == [int(batch), int(seeds)]
    assert config.epochs == rows[-1]["epoch"] == len(rows) == int(epochs)
    assert f"{100 * rows[-1]['test_accuracy']:.2f}" == accuracy


def test_the_model_card_has_all_runs_on_cifar10():
    assert len(CARD) == 8
    known = {row[-1] for row in CARD}
    for path in (ROOT / "bench" / "results").glob("*/config.json"):
        if "cifar10" in json.loads(path.read_text())["dataset"]:
            assert str(path.parent.relative_to(ROOT)) in known, path
