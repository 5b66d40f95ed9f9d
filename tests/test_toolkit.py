"""tools/toolkit.py: which CUDA toolkit compiles the kernels, and which package brings one."""

import importlib.metadata
import shutil

import pytest

from tools import toolkit

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  --list-gpu-arch) printf "{architectures}\\n" ;;
esac
"""


def plant_toolkit(home, release, architectures="compute_80\\ncompute_90"):
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    (home / "bin/nvcc").write_text(NVCC.format(release=release, architectures=architectures))
    (home / "bin/nvcc").chmod(0o755)
    return home


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine without a toolkit, but with a C++ compiler, and PyTorch 2.14.1 with CUDA."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CIFAR_RESNET_FAST_BUILD", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "programs").mkdir()
    program(tmp_path / "programs/c++")
    monkeypatch.setenv("PATH", f"{tmp_path}/programs")
    monkeypatch.setattr(toolkit, "_USUAL", tmp_path / "usual")
    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: None)
    requires(monkeypatch, 'cuda-toolkit[cublas,nvtx]==13.0.3; platform_system == "Linux"')


def program(path):
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def requires(monkeypatch, *requirements):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requirements))


def packages_in(monkeypatch, folder):
    class Spec:
        submodule_search_locations = (str(folder),)

    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: Spec)


def test_places_in_their_order(monkeypatch, tmp_path):
    """The first toolkit of PyTorch's CUDA, wherever one of another CUDA lies."""
    packages_in(monkeypatch, tmp_path / "nvidia")
    beside = plant_toolkit(tmp_path / "nvidia/cu13", "13.0")
    found = toolkit.find("13")
    assert found == toolkit.Toolkit(
        beside, "packages beside PyTorch", "13.0", frozenset({"compute_80", "compute_90"})
    )
    usual = plant_toolkit(tmp_path / "usual", "12.4")
    assert toolkit.find("13") == found
    assert toolkit.find("12").home == usual
    shutil.rmtree(usual)
    plant_toolkit(usual, "13.2")
    assert (toolkit.find("13").release, toolkit.find("13").source) == ("13.2", str(usual))
    on_path = plant_toolkit(tmp_path / "other", "13.1")
    monkeypatch.setenv("PATH", f"{on_path}/bin")
    assert (toolkit.find("13").home, toolkit.find("13").source) == (on_path, "PATH")
    named = plant_toolkit(tmp_path / "named", "13.3")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert (toolkit.find("13").home, toolkit.find("13").source) == (named, "CUDA_HOME")


def test_a_link_to_nvcc_leads_to_its_toolkit(monkeypatch, tmp_path):
    home = plant_toolkit(tmp_path / "opt/cuda", "13.0")
    (tmp_path / "programs/nvcc").symlink_to(home / "bin/nvcc")
    assert toolkit.find("13").home == home


def test_a_toolkit_that_is_named_is_the_only_one(monkeypatch, tmp_path):
    plant_toolkit(tmp_path / "usual", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(plant_toolkit(tmp_path / "named", "12.8")))
    with pytest.raises(toolkit.ToolkitError, match="named is CUDA 12.8, torch has CUDA 13$"):
        toolkit.find("13")
    assert toolkit.missing_package() is None


@pytest.mark.parametrize(
    ("release", "requirements"),
    [
        # of torch 2.11.0, 2.12.1 and 2.14.1
        ("13.0.2", ['cuda-toolkit[cublas,cudart]==13.0.2; platform_system == "Linux"']),
        ("13.0.2", ["filelock", 'cuda-toolkit[cudart]==13.0.2; platform_system == "Linux"']),
        ("13.0.3", ['cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"']),
        (None, ["filelock", "numpy"]),  # without CUDA
        (None, ['nvidia-cuda-runtime-cu12==12.8.90; platform_system == "Linux"']),
    ],
    ids=["2.11", "2.12", "2.14", "cpu", "cuda-12"],
)
def test_the_package_is_of_the_release_that_pytorch_has(monkeypatch, release, requirements):
    requires(monkeypatch, *requirements)
    wanted = None if release is None else f"cuda-toolkit[nvcc,cccl]=={release}"
    assert toolkit.package() == wanted
    assert toolkit.missing_package() == wanted
    with pytest.raises(toolkit.ToolkitError) as error:
        toolkit.find("13")
    assert (f'pip install "{wanted}"' in str(error.value)) == (release is not None)


def test_no_package_beside_a_toolkit_that_can_be_used(monkeypatch, tmp_path):
    plant_toolkit(tmp_path / "usual", "12.4")
    assert toolkit.missing_package() == "cuda-toolkit[nvcc,cccl]==13.0.3"
    packages_in(monkeypatch, tmp_path / "nvidia")
    plant_toolkit(tmp_path / "nvidia/cu13", "13.0")
    assert toolkit.missing_package() is None


@pytest.mark.parametrize("mode", ["cpu", "none"])
def test_no_package_if_no_kernels_are_wanted(monkeypatch, mode):
    monkeypatch.setenv("CIFAR_RESNET_FAST_BUILD", mode)
    assert toolkit.missing_package() is None


def test_no_package_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{tmp_path}/programs/c++ -v")
    assert toolkit.missing_package() is not None
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert toolkit.missing_package() is None


def test_the_link_for_the_linker(tmp_path):
    home = tmp_path / "home"
    assert toolkit.link_folder(home, tmp_path / "links") is None
    (home / "lib").mkdir(parents=True)
    (home / "lib/libcudart.so.13").touch()
    for _ in range(2):  # what an earlier build has left is replaced
        folder = toolkit.link_folder(home, tmp_path / "links")
        assert (folder / "libcudart.so").resolve() == home / "lib/libcudart.so.13"
    (home / "lib/libcudart.so").touch()
    assert toolkit.link_folder(home, tmp_path / "other") is None
    assert not (tmp_path / "other").exists()
