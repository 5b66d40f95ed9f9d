"""Imports point one way: never in a circle, and from a group only to those before it."""

import ast
import graphlib
import pkgutil
from pathlib import Path

import pytest

import cifar_resnet_fast
from cifar_resnet_fast import ops

PACKAGE = Path(cifar_resnet_fast.__file__).parent

# a file imports only from its own group and from those before it
GROUPS = (
    ("errors", "kernels"),
    ("reference",),
    ("processes", "ops"),
    ("checkpoint", "weights"),
    ("modules", "resnet", "data"),
    ("training", "verification"),
    ("info", "selfcheck", "train", "export"),
    ("",),  # the package itself
)
GROUP_OF = {room: number for number, rooms in enumerate(GROUPS) for room in rooms}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {name_of(path) for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> list[str]:
    """Names of the package's own modules that the file imports, at any depth of its code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import room` names the room, `from room import thing` the one before
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if room_of(name) in NAMES else node.module for name in named]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [room_of(name) for name in names if name.split(".")[0] == "cifar_resnet_fast"]
    return found


def group_of(name: str) -> int:
    """Place in ``GROUPS`` of a module; a new folder or file of the root needs one."""
    return GROUP_OF[name.partition(".")[0]]


def room_of(name: str) -> str:
    return name.removeprefix("cifar_resnet_fast").removeprefix(".")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_imports_point_down(path):
    name = name_of(path)
    for imported in imports_of(path):
        assert group_of(imported) <= group_of(name), f"{name} may not import {imported}"


def test_no_import_leads_in_a_circle():
    graph = {name_of(path): imports_of(path) for path in PACKAGE.rglob("*.py")}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_root_of_the_package_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 11


def test_ops_shows_its_public_names_alone():
    """Nothing that an import left there, and no name that hides a submodule."""
    assert sorted(name for name in dir(ops) if not name.startswith("_")) == sorted(ops.__all__)
    assert not {module.name for module in pkgutil.iter_modules(ops.__path__)} & set(ops.__all__)


def test_only_ops_chooses():
    below = {"kernels", "_C", "_cuda", "reference"}
    for path in PACKAGE.rglob("*.py"):
        name = name_of(path)
        if name.split(".")[0] in {"ops", "kernels"}:
            continue
        # what is verified is held against the reference, in float64 too, which ops refuses
        allowed = {"reference"} if name == "verification.operations" else set()
        for imported in imports_of(path):
            # data and tests may use the reference's augmentation through ops
            assert imported.split(".")[0] not in below - allowed, (
                f"{name} may not import {imported}"
            )


def test_torchvision_is_not_needed():
    """Installing it could replace a torch that is there by one of another build."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert "torchvision" not in {name.split(".")[0] for name in names}, path
