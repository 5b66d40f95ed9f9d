"""What setup.py builds and records, what ptxas says of the kernels, and what the package shows."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from test_toolkit import plant_toolkit

from cifar_resnet_fast import info, ops
from cifar_resnet_fast.ops import _extension as extension
from tools import ptxas_report, try_wheel

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = 101_376  # bytes a block can have on the RTX 30 and 40 series
REGISTERS = 65_536  # a multiprocessor's


# --- the CUDA sources, compiled for every architecture -----------------------------------------


@pytest.mark.timeout(1200)  # conv3x3/backward.cu takes three minutes of one core
@pytest.mark.parametrize(
    "source", ptxas_report.sources(), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_kernels_compile_without_warnings_and_fit_every_card(source):
    nvcc = ptxas_report.find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    kernels = ptxas_report.report(source, nvcc)
    text = source.read_text()
    assert {k.architecture for k in kernels} == set(ptxas_report.ARCHITECTURES)
    # every kernel in the source is in the report, so none goes unchecked
    assert {k.name.split("<")[0] for k in kernels} == set(re.findall(r"(\w+_kernel)\(", text))
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED_MEMORY, kernel
        if kernel.name.startswith("shortcut_a"):
            # bound by memory: four blocks of 256 threads on a multiprocessor keep it busy
            assert kernel.registers * 256 * 4 <= REGISTERS, kernel


@pytest.mark.skipif(ptxas_report.find_nvcc() is None, reason="needs nvcc")
def test_one_architecture_alone(monkeypatch, capsys):
    monkeypatch.setattr(ptxas_report, "sources", lambda: [ROOT / "csrc/shortcut_a/shortcut_a.cu"])
    monkeypatch.setattr(sys, "argv", ["ptxas_report.py", "--arch", "86"])
    ptxas_report.main()
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines
    assert {line.split()[-4] for line in lines} == {"86"}


def test_kernels_know_nothing_of_torch():
    for path in (ROOT / "csrc").glob("*/*"):
        if path.parent.name != "bindings":
            assert not re.search(r'#include [<"](torch|bindings)/', path.read_text()), path


def test_what_was_tried_was_built():
    """A library may lack for want of a tool, never because its source does not compile."""
    for reason in ops.BUILD_INFO.get("missing", {}).values():
        assert "compiling failed" not in reason
    # and what was built here loads here
    assert "cannot be loaded" not in str(ops.WHY_NOT_LOADED)


# --- setup.py on machines that lack something --------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup.py needs, with nothing built in it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "cifar_resnet_fast", "tools"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__"),
        )
    return tmp_path


def hide_other_toolkits(checkout):
    """What setup.py finds in the usual place."""
    path = checkout / "tools/toolkit.py"
    path.write_text(path.read_text().replace('"/usr/local/cuda"', '"/nowhere"'))


def build(checkout, *commands, **environment):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name
        not in ("CIFAR_RESNET_FAST_BUILD", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX")
    }
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *commands],
        cwd=checkout,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


# everything but compiling, which the installation under test has done
DRY = ("build_py", "--build-lib", "built", "build_info", "--build-lib", "built")


def without_torch(checkout):
    (checkout / "elsewhere").mkdir()
    (checkout / "elsewhere" / "torch.py").write_text("raise ImportError('No module named torch')")
    return {"PYTHONPATH": str(checkout / "elsewhere")}


def older_torch(checkout):
    (checkout / "elsewhere").mkdir()
    (checkout / "elsewhere" / "torch.py").write_text("__version__ = '2.9.1+cu128'")
    return {"PYTHONPATH": str(checkout / "elsewhere")}


@pytest.mark.parametrize(
    ("environment", "missing", "reason"),
    [
        (lambda _: {"CIFAR_RESNET_FAST_BUILD": "none"}, ["_C", "_cuda"], "BUILD=none"),
        (
            lambda _: {"CXX": "/nowhere/c++"},
            ["_C", "_cuda"],
            "there is no C++ compiler (/nowhere/",
        ),
        (without_torch, ["_C", "_cuda"], "torch cannot be imported while building"),
        (older_torch, ["_C", "_cuda"], "torch 2.9.1+cu128 is older than 2.11"),
        (lambda _: {"CUDA_HOME": "/nowhere"}, ["_cuda"], "there is no CUDA toolkit"),
        (lambda _: {"CIFAR_RESNET_FAST_BUILD": "cpu"}, ["_cuda"], "BUILD=cpu"),
    ],
    ids=["none", "no-compiler", "build-isolation", "older-torch", "no-nvcc", "cpu"],
)
def test_what_is_missing_is_recorded_in_one_line(checkout, environment, missing, reason):
    if missing == ["_cuda"] and torch.version.cuda is None:
        reason = reason if "cpu" in reason else "is built without CUDA"
    if missing == ["_cuda"] and shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    result = build(checkout, *DRY, **environment(checkout))
    assert result.returncode == 0, result.stderr
    record = json.loads((checkout / "built/cifar_resnet_fast/_build_info.json").read_text())
    assert list(record["missing"]) == missing
    for line in record["missing"].values():
        assert reason in line
        assert "then run" in line  # what it costs
        assert "\n" not in line


GPUS = """
import torch
torch.cuda.device_count = lambda: len({gpus})
torch.cuda.get_device_capability = lambda device: {gpus}[device]
"""


@pytest.mark.parametrize(
    ("gpus", "architectures"),
    [
        ([], "8.0;9.0+PTX"),
        ([(8, 6)], "8.6+PTX"),
        ([(9, 0), (7, 5), (8, 9), (9, 0)], "8.9;9.0+PTX"),
        ([(7, 5)], "8.0;9.0+PTX"),
    ],
    ids=["none", "one", "several", "too-old"],
)
def test_what_is_compiled_for(checkout, gpus, architectures):
    """The machine's own GPUs, or what runs on most."""
    if torch.version.cuda is None or ptxas_report.find_nvcc() is None:
        pytest.skip("there is no CUDA to compile for")
    (checkout / "elsewhere").mkdir()
    (checkout / "elsewhere" / "sitecustomize.py").write_text(GPUS.format(gpus=gpus))
    result = build(checkout, *DRY, PYTHONPATH=str(checkout / "elsewhere"))
    assert result.returncode == 0, result.stderr
    record = json.loads((checkout / "built/cifar_resnet_fast/_build_info.json").read_text())
    assert record["architectures"] == architectures


@pytest.mark.parametrize(
    ("known", "flags", "architectures"),
    [
        ("80 86 89 90 100 120", {}, "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ("80 86 89 90", {}, "8.0;8.6;8.9;9.0+PTX"),
        ("80 86 89 90", {"TORCH_CUDA_ARCH_LIST": "8.6"}, "8.6"),
    ],
    ids=["all", "older-nvcc", "named"],
)
def test_what_a_wheel_is_compiled_for(checkout, known, flags, architectures):
    """GPUs of all users, whatever this machine has."""
    if torch.version.cuda is None or shutil.which("c++") is None:
        pytest.skip("there is nothing to compile for")
    names = "\\n".join(f"compute_{name}" for name in known.split())
    home = plant_toolkit(checkout / "toolkit", torch.version.cuda, names)
    (checkout / "elsewhere").mkdir()
    (checkout / "elsewhere" / "sitecustomize.py").write_text(GPUS.format(gpus=[(8, 9)]))
    flags = {"PYTHONPATH": str(checkout / "elsewhere"), "CUDA_HOME": str(home), **flags}
    result = build(checkout, *DRY, CIFAR_RESNET_FAST_BUILD="wheel", **flags)
    assert result.returncode == 0, result.stderr
    record = json.loads((checkout / "built/cifar_resnet_fast/_build_info.json").read_text())
    assert record["architectures"] == architectures
    assert record["missing"] == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CIFAR_RESNET_FAST_BUILD": "gpu"}, "must be auto, cuda, wheel, cpu or none, got 'gpu'"),
        ({"CIFAR_RESNET_FAST_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "_cuda cannot be built"),
        ({"CIFAR_RESNET_FAST_BUILD": "wheel", "CUDA_HOME": "/nowhere"}, "_cuda cannot be built"),
        ({"CIFAR_RESNET_FAST_BUILD": "cpu", "CXX": "/nowhere/c++"}, "_C cannot be built"),
    ],
    ids=["unknown", "cuda", "wheel", "cpu"],
)
def test_what_was_asked_for_by_name_must_be_built(checkout, environment, message):
    result = build(checkout, *DRY, **environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_a_compiler_that_fails_is_recorded_too(checkout):
    result = build(checkout, "build", "--build-lib", "built", CXX="false")
    assert result.returncode == 0, result.stderr
    record = json.loads((checkout / "built/cifar_resnet_fast/_build_info.json").read_text())
    assert record["built"] == []
    assert "compiling failed" in record["missing"]["_C"]
    assert "then run" in record["missing"]["_C"]


def test_the_whole_output_of_a_failed_build_is_kept(checkout):
    """And the reason is the linker's last word, not the command that failed."""
    compiler = checkout / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-shared*) echo /usr/bin/ld: cannot find -lcudart >&2;\n'
        "echo collect2: error: ld returned 1 exit status >&2; exit 1;; esac\n"
        'for last; do :; done\nprevious=\nfor word; do [ "$previous" = -o ] && touch $word; '
        "previous=$word; done\nexit 0\n"
    )
    compiler.chmod(0o755)
    result = build(
        checkout,
        *("build", "--build-lib", "built"),
        CXX=str(compiler),
        CC=str(compiler),
        LDCXXSHARED=f"{compiler} -shared",
        LDSHARED=f"{compiler} -shared",
        CIFAR_RESNET_FAST_BUILD="auto",
        CUDA_HOME="/nowhere",
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((checkout / "built/cifar_resnet_fast/_build_info.json").read_text())
    log = checkout / "build/_C.log"
    reason = record["missing"]["_C"]
    assert reason.startswith(
        f"compiling failed (/usr/bin/ld: cannot find -lcudart; all of it: {log})"
    )
    assert "ld returned 1 exit status" in log.read_text()


@pytest.mark.parametrize(
    ("script", "mode", "reason"),
    [
        ("#!/bin/sh\necho broken >&2; exit 3\n", 0o755, "--version fails with status 3: broken"),
        ("#!/bin/sh\necho hello\n", 0o755, "--version answers oddly: hello"),
        ("#!/bin/sh\n", 0o644, "cannot be run: [Errno 13]"),
        ("no program", 0o755, "cannot be run: [Errno 8]"),
    ],
    ids=["fails", "odd", "not-executable", "no-program"],
)
def test_an_nvcc_that_is_none_is_recorded(checkout, script, mode, reason):
    if torch.version.cuda is None or shutil.which("c++") is None:
        pytest.skip("there is nothing to compile for")
    home = checkout / "toolkit"
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(script)
    (home / "bin/nvcc").chmod(mode)
    result = build(checkout, *DRY, CUDA_HOME=str(home))
    assert result.returncode == 0, result.stderr
    record = json.loads((checkout / "built/cifar_resnet_fast/_build_info.json").read_text())
    assert list(record["missing"]) == ["_cuda"]
    assert reason in record["missing"]["_cuda"]
    assert "then run" in record["missing"]["_cuda"]


def test_a_toolkit_of_packages_is_used_and_named(checkout):
    """And the linker finds libcudart.so, which those have by another name."""
    if torch.version.cuda is None or shutil.which("c++") is None:
        pytest.skip("there is nothing to compile for")
    home = checkout / "elsewhere/nvidia" / f"cu{torch.version.cuda.split('.')[0]}"
    plant_toolkit(home, torch.version.cuda)
    (home / "lib").mkdir()
    (home / "lib/libcudart.so.13").touch()
    hide_other_toolkits(checkout)
    folders = (
        "import sys; sys.argv = ['setup.py', '-q', 'build_py', '--build-lib', 'built', "
        "'build_info', '--build-lib', 'built']; import runpy; names = runpy.run_path('setup.py'); "
        "print([e.library_dirs for e in names['extensions']][1][0])"
    )
    result = subprocess.run(
        [sys.executable, "-c", folders],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout / "elsewhere"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((checkout / "built/cifar_resnet_fast/_build_info.json").read_text())
    assert record["toolkit"] == "packages beside PyTorch"
    assert record["cuda"] == torch.version.cuda
    link = Path(result.stdout.strip(), "libcudart.so")
    assert link.is_relative_to(checkout / "build")
    assert link.resolve() == home / "lib/libcudart.so.13"


def test_libraries_of_an_earlier_build_are_not_kept(checkout):
    stale = checkout / "built/cifar_resnet_fast/_cuda.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert build(checkout, *DRY, CIFAR_RESNET_FAST_BUILD="none").returncode == 0
    assert not stale.exists()


def test_trained_networks_are_in_what_is_installed_and_in_the_archive(checkout):
    names = {"resnet8-shapes.safetensors", "resnet8-shapes.json"}
    for name in names:
        (checkout / "cifar_resnet_fast" / "weights" / name).write_text("{}")
    assert build(checkout, "build_py", "--build-lib", "built").returncode == 0
    built = checkout / "built" / "cifar_resnet_fast" / "weights"
    assert names <= {path.name for path in built.iterdir()}
    (checkout / "tests").mkdir()
    (checkout / "tests/test_nothing.py").touch()  # setuptools would take it
    done = build(checkout, "sdist", "--formats", "gztar")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as file:
        paths = [Path(*Path(path).parts[1:]) for path in file.getnames()]
    assert names <= {path.name for path in paths if path.parent.name == "weights"}
    # all that builds it, and no tests, which would need the rest of the repository
    assert set((ROOT / "csrc").glob("*/*")) <= {ROOT / path for path in paths}
    for needed in ("setup.py", "tools/__init__.py", "tools/toolkit.py"):
        assert Path(needed) in paths
    assert not [path for path in paths if path.parts[:1] == ("tests",)]


def test_the_package_works_without_the_libraries(checkout):
    """Nothing built, nothing recorded, no Triton: it runs in plain PyTorch, and says so."""
    (checkout / "triton.py").write_text("raise ImportError('not here')")
    code = (
        "import torch, cifar_resnet_fast as c\n"
        f"assert c.__file__.startswith('{checkout}'), c.__file__\n"
        "c.FastResNet(8)(torch.randn(2, 3, 8, 8)).sum().backward()\n"
        "from cifar_resnet_fast import ops\n"
        "print(ops.why_not('cuda', torch.device('cpu'), 'shortcut_a'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True
    )
    assert result.stdout.strip() == (
        "the package was not installed: pip install --no-build-isolation ."
    ), result.stderr


# --- why a library that was built does not serve here -------------------------------------------

BUILT = {
    "built": ["_C", "_cuda"],
    "missing": {},
    "cuda": "13.0",
    "torch": "2.14.1",
    "architectures": "8.0;8.6;8.9;9.0+PTX",
}


@pytest.mark.parametrize(
    ("library", "torch_version", "torch_cuda", "reason"),
    [
        ("_C", "2.10.0", "13.0", "_C needs torch 2.11 or later, this is 2.10.0"),
        ("_cuda", "2.13.0", None, "_cuda was built for CUDA 13.0, torch 2.13.0 is without CUDA"),
        (
            "_cuda",
            "2.14.1",
            "12.6",
            "_cuda was built for CUDA 13.0, torch 2.14.1 has CUDA 12.6",
        ),
        ("_other", "2.14.1", "13.0", "_other cannot be loaded: No module named"),
    ],
)
def test_the_reason_is_one_line(monkeypatch, library, torch_version, torch_cuda, reason):
    monkeypatch.setattr(extension, "BUILD_INFO", BUILT)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert extension._why_not_load(library).startswith(reason)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0;8.6;8.9;9.0+PTX", (8, 6), True),
        ("8.0;8.6;8.9;9.0+PTX", (8, 7), True),  # machine code of 8.0 and 8.6
        ("8.0;8.6;8.9;9.0+PTX", (7, 5), False),
        ("8.0;8.6;8.9;9.0+PTX", (12, 0), True),  # from the PTX
        ("8.0 8.6", (9, 0), False),
        ("8.9", (8, 6), False),
        ("Ampere", (7, 5), True),  # not judged
    ],
)
def test_architectures(built, capability, runs):
    reason = extension._why_not_architecture(built, capability)
    assert (reason is None) == runs
    if not runs:
        assert f"compute capability {built}, this GPU has" in reason


# --- info ---------------------------------------------------------------------------------------


def test_what_tries_a_wheel_passes_here():
    if ops.BUILD_INFO.get("built") != ["_C", "_cuda"]:
        pytest.skip("not all of it is built here")
    try_wheel.main()


@pytest.mark.parametrize(
    ("built", "reason"),
    [(["_C"], None), (["_C", "_cuda"], "_C cannot be loaded: undefined symbol")],
    ids=["not-built", "not-loaded"],
)
def test_what_tries_a_wheel_can_fail(monkeypatch, built, reason):
    monkeypatch.setattr(ops, "BUILD_INFO", {**BUILT, "built": built})
    monkeypatch.setattr(ops, "WHY_NOT_LOADED", {"_C": reason, "_cuda": reason})
    with pytest.raises(AssertionError):
        try_wheel.main()


def test_info_says_where_the_toolkit_came_from(monkeypatch):
    monkeypatch.setattr(ops, "BUILD_INFO", {**BUILT, "toolkit": "packages beside PyTorch"})
    assert "and CUDA 13.0 (packages beside PyTorch) for compute" in info.extension_lines()[0]


def test_info_prints_what_is_there():
    result = subprocess.run(
        [sys.executable, "-m", "cifar_resnet_fast.info"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    text = result.stdout
    assert f"torch {torch.__version__}" in text
    assert "triton" in text
    assert "no GPU is visible" in text
    assert "device cpu" in text
    for operation in ops.OPERATIONS:
        assert f"  {operation}: auto takes reference" in text
    for implementation in ops.IMPLEMENTATIONS:
        assert text.count(f"    {implementation}: ") == len(ops.OPERATIONS)
    assert text.count("    reference: can run") == len(ops.OPERATIONS)
    for library, reason in ops.WHY_NOT_LOADED.items():
        assert f"  {library}: {reason or 'loaded'}\n" in text
