"""The CUDA toolkit that compiles the kernels: where one is, or the packages that bring one.

setup.py uses what ``find`` returns. ``python tools/toolkit.py``, which tools/install.sh calls,
prints what pip installs for the PyTorch of this environment if a toolkit is missing and would be
used, and otherwise nothing. PyTorch's own packages of CUDA 13 are parts of a release of
``cuda-toolkit``; nvcc and the headers of the same release are in two further parts of it.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_USUAL = Path("/usr/local/cuda")


class ToolkitError(Exception):
    """Why there is no toolkit to use, in one line."""


@dataclass(frozen=True)
class Toolkit:
    """A toolkit that can compile.

    home: has bin/nvcc and include/cuda_runtime.h
    source: how it was found: CUDA_HOME, PATH, its folder, or PyTorch's packages
    release: of CUDA, such as 13.0
    architectures: what nvcc can compile for, such as compute_90
    """

    home: Path
    source: str
    release: str
    architectures: frozenset[str]


def find(major: str) -> Toolkit:
    """The first toolkit of CUDA ``major`` among those that CUDA_HOME names or, if it is not set,
    that belong to the nvcc on the PATH, lie in the usual place, or were installed beside PyTorch.

    Raises:
        ToolkitError: there is none; says of the first that was found why it cannot be used
    """
    reasons = []
    for home, source in toolkits():
        try:
            release = _ask(home, "--version", r"release (\d+\.\d+)")[0]
            if release.split(".")[0] == major:
                known = frozenset(_ask(home, "--list-gpu-arch", r"compute_\d+"))
                return Toolkit(home, source, release, known)
            reasons.append(f"the toolkit in {home} is CUDA {release}, torch has CUDA {major}")
        except ToolkitError as error:
            reasons.append(str(error))
    missing = f"there is no CUDA toolkit (nvcc and headers; torch has CUDA {major}; "
    if package() is not None:
        missing += f'pip install "{package()}" brings one, '
    raise ToolkitError(reasons[0] if reasons else f"{missing}CUDA_HOME names one)")


def toolkits() -> Iterator[tuple[Path, str]]:
    """Folders with nvcc and headers, and what leads there."""
    for home, source in _places():
        # an nvcc on the PATH may be a wrapper that lies beside no headers
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            yield home, source


def _places() -> Iterator[tuple[Path, str]]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name]), name
            return
    on_path = shutil.which("nvcc")
    if on_path is not None:  # Debian's lies in /usr, where its link is, and others behind theirs
        yield Path(on_path).parents[1], "PATH"
        yield Path(on_path).resolve().parents[1], "PATH"
    yield _USUAL, str(_USUAL)
    found = importlib.util.find_spec("nvidia")  # a folder that all of NVIDIA's packages share
    for folder in (found and found.submodule_search_locations) or ():
        for home in sorted(Path(folder).glob("cu[0-9]*"), reverse=True):
            yield home, "packages beside PyTorch"


def _ask(home: Path, flag: str, pattern: str) -> list[str]:
    """All that matches ``pattern`` in nvcc's answer to ``flag``; ToolkitError if nothing does."""
    nvcc = home / "bin/nvcc"
    try:
        done = subprocess.run(
            [str(nvcc), flag], capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolkitError(f"{nvcc} cannot be run: {error}") from None
    said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
    if done.returncode:
        raise ToolkitError(f"{nvcc} {flag} fails with status {done.returncode}: {said[-1][:200]}")
    found = re.findall(pattern, done.stdout)
    if not found:
        raise ToolkitError(f"{nvcc} {flag} answers oddly: {said[0][:200]}")
    return found


def link_folder(home: Path, inside: Path) -> Path | None:
    """A folder for the linker with libcudart.so, which the packages have with its version only.

    Args:
        home: of a toolkit
        inside: the folder, which is made if it is needed

    Returns:
        None if the toolkit has a libcudart.so, or no library of that name at all
    """
    libraries = [path for name in ("lib64", "lib") for path in (home / name).glob("libcudart.so*")]
    if not libraries or any(path.name == "libcudart.so" for path in libraries):
        return None
    inside.mkdir(parents=True, exist_ok=True)
    link = inside / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(sorted(libraries)[-1].resolve())
    return inside.resolve()


def package() -> str | None:
    """What pip installs to get the toolkit of the installed PyTorch's release.

    None if PyTorch asks for no release: it has no CUDA, or one whose packages have no nvcc
    (CUDA 12).
    """
    try:
        requirements = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:  # built by hand
        return None
    for requirement in requirements:
        found = re.match(r"cuda-toolkit(?:\[[^]]*\])?\s*==\s*([\w.]+)", requirement)
        if found is not None:
            return f"cuda-toolkit[nvcc,cccl]=={found[1]}"
    return None


def missing_package() -> str | None:
    """``package()`` if the kernels are to be compiled and there is no toolkit for that."""
    wanted = package()
    mode = os.environ.get("CIFAR_RESNET_FAST_BUILD", "auto")
    compiler = os.environ.get("CXX", "c++").split()[0]
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")  # used, or an error
    if (
        wanted is None
        or mode not in ("auto", "cuda", "wheel")
        or shutil.which(compiler) is None
        or named
    ):
        return None
    try:
        find(wanted.partition("==")[2].split(".")[0])
    except ToolkitError:
        return wanted
    return None


if __name__ == "__main__":
    print(missing_package() or "")
