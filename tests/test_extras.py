"""What the library needs, what its extras bring, and the one line of each that is missing."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_resnet_fast import FastResNet, export
from cifar_resnet_fast.errors import MissingPackageError, extra

ROOT = Path(__file__).parents[1]
PACKAGES = {"PIL": "pillow"}  # by the module, if that has another name
TRITON = {"triton"}  # PyTorch's own dependency


def names(requirements):
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def imported(path):
    """Third-party packages that a file imports: at its import, and when something is called."""
    tree = ast.parse(path.read_text())
    within = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    # for the checker alone
    within |= {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", None) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    first, later = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        tops = {module.split(".")[0] for module in modules}
        found = {PACKAGES.get(top, top) for top in tops - sys.stdlib_module_names}
        (later if id(node) in within else first).update(found - {"cifar_resnet_fast"})
    return first, later


def test_every_package_is_in_its_list():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, extras = names(project["dependencies"]), project["optional-dependencies"]
    optional = {name for key in ("train", "hub", "export") for name in names(extras[key])}
    seen = set()
    for path in (ROOT / "cifar_resnet_fast").rglob("*.py"):
        first, later = imported(path)
        # Triton's kernels are imported by what has looked for it
        assert first <= core | TRITON, path
        assert later <= core | optional | TRITON, path
        seen |= first | later
    # torch.utils imports TensorBoard, the rest is named in this package's own code
    assert (core | optional) - seen == {"tensorboard"}


# --- one line for each that is missing ---------------------------------------------------------


@pytest.fixture
def without(tmp_path):
    """A function that runs a command in an environment that lacks some modules."""

    def run(modules, *command):
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n\n\nclass Missing:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.split('.')[0] in {set(modules)!r}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n\n\n"
            "sys.meta_path.insert(0, Missing())\n"
        )
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
        )

    return run


EVERYTHING = ("rich", "matplotlib", "tensorboard", "PIL", "huggingface_hub", "onnx", "onnxruntime")
LIBRARY = """
import torch
from cifar_resnet_fast import FastResNet, models
from cifar_resnet_fast.data.datasets import load_dataset
from cifar_resnet_fast.training.config import TrainConfig
import cifar_resnet_fast.info, cifar_resnet_fast.export, cifar_resnet_fast.train

data = load_dataset("shapes", "data", limit=4)
model = FastResNet(8)
model(torch.randn(2, 3, 32, 32)).sum().backward()
model.save_pretrained("mine")
assert FastResNet.from_pretrained("mine").depth == 8
print("done")
"""


def test_the_library_needs_no_extra(without):
    done = without(EVERYTHING, "-c", LIBRARY)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


TINY = "--dataset shapes --limit 16 --depth 8 --batch-size 16 --epochs 1 --warmup-epochs 0"


@pytest.mark.parametrize(
    ("module", "flags"),
    [("rich", ""), ("matplotlib", ""), ("tensorboard", "--tensorboard")],
    ids=["rich", "matplotlib", "tensorboard"],
)
def test_a_training_says_what_it_lacks_before_it_begins(without, tmp_path, module, flags):
    command = ["-m", "cifar_resnet_fast.train", *TINY.split(), *flags.split(), "--out", "run"]
    done = without([module], *command)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: No module named '{module}': pip install \"cifar_resnet_fast[train]\" brings it\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_without_pillow(without, tmp_path):
    for folder in ("train/one", "train/two", "test/one", "test/two"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "1.png").touch()
    command = ["-m", "cifar_resnet_fast.train", *TINY.split()[2:], "--dataset", "images"]
    done = without(["PIL"], *command, "--out", "run")
    assert done.returncode == 2
    assert done.stderr == (
        "error: No module named 'PIL': pip install \"cifar_resnet_fast[train]\" brings it\n"
    )


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "onnxscript"])
def test_an_export_without_its_packages(monkeypatch, tmp_path, capsys, module):
    FastResNet(8).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert export.main([str(tmp_path), "--to", "onnx", "--out", str(tmp_path / "x.onnx")]) == 2
    assert 'pip install "cifar_resnet_fast[export]" brings it\n' in capsys.readouterr().err


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r'pip install "cifar_resnet_fast\[hub\]"'):
        FastResNet.from_pretrained("somebody/resnet20")
    with pytest.raises(MissingPackageError, match=r"cifar_resnet_fast\[hub\]"):
        FastResNet(8).push_to_hub("somebody/resnet20")


def test_a_package_that_is_there_is_let_through():
    with extra("train"):
        import json
    assert json.loads("1") == 1
