"""Builds what this machine can of the compiled extension; pyproject.toml has everything else.

``_C`` (csrc/bindings/cpu.cpp: schemas and CPU code) needs torch and a C++20 compiler; ``_cuda``
(csrc/bindings/cuda.cpp and all csrc/*/*.cu: the CUDA kernels) also a torch with CUDA and a CUDA
toolkit of its major version. No GPU has to be there. What cannot be built is left out, and the
reason is recorded where ``python -m cifar_resnet_fast.info`` shows it: pip hides what is printed
here.

torch is not in pyproject.toml's build requirements: pip would build against a torch of its own,
not against the one that is installed. Hence ``pip install --no-build-isolation .``; an isolated
build gives a pure Python package.

Both libraries use torch's stable ABI as of 2.11 and Python's as of 3.10: one wheel serves them and
all later ones.

CIFAR_RESNET_FAST_BUILD  auto (what can be built; the default), cuda (both libraries, or fail),
                         wheel (as cuda, but for the GPUs of all users; tools/wheel.sh), cpu (_C,
                         or fail) or none
TORCH_CUDA_ARCH_LIST     as in torch.utils.cpp_extension; default: those of the visible GPUs, or
                         8.0;9.0+PTX if there is none; for a wheel, all that nvcc knows of
                         8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX
CUDA_HOME                the toolkit to use; default: of the nvcc on the PATH, /usr/local/cuda, or
                         packages installed beside PyTorch (tools/toolkit.py)
CXX, MAX_JOBS            as in torch.utils.cpp_extension
"""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

sys.path.insert(0, str(Path(__file__).parent))  # where pip's builds do not look
from tools import toolkit

PACKAGE = "cifar_resnet_fast"
OLDEST_TORCH = (2, 11)
# where no GPU says which: code for 8.0 also runs on 8.6 and 8.9, and each more costs a minute
ARCHITECTURES = ("8.0", "9.0")
# PTX of 9.0 serves what lies between and is not here, PTX of the last one all that follows
WHEEL_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0+PTX", "10.0", "12.0")
WITHOUT_C = "every operation then runs in plain PyTorch or Triton"
WITHOUT_CUDA = "GPUs then run plain PyTorch or Triton"
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
NVCC_FLAGS = ["-O3", "-lineinfo", "-std=c++20", "-Xcompiler", "-Wall,-Wextra"]

mode = os.environ.get(f"{PACKAGE.upper()}_BUILD", "auto")
if mode not in ("auto", "cuda", "wheel", "cpu", "none"):
    sys.exit(f"{PACKAGE.upper()}_BUILD must be auto, cuda, wheel, cpu or none, got {mode!r}")
# what the package will show: the libraries that were built, with what, and why others were not
record = {
    "mode": mode,
    "built": [],
    "missing": {},
    "torch": None,
    "cuda": None,
    "toolkit": None,
    "architectures": None,
}


def leave_out(library: str, reason: str) -> None:
    if mode in ("cuda", "wheel") or (mode == "cpu" and library == "_C"):
        sys.exit(f"{PACKAGE.upper()}_BUILD={mode}, but {library} cannot be built: {reason}")
    record["missing"][library] = reason
    print(f"{PACKAGE}: {library} is left out: {reason}", file=sys.stderr)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def why_not_compile() -> str | None:
    """What is missing for any compiled library."""
    try:
        import torch
    except ImportError as error:
        return (
            f"torch cannot be imported while building ({first_line(error)}; pip isolates builds: "
            f"pip install --no-build-isolation); {WITHOUT_C}"
        )
    record["torch"] = torch.__version__
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than 2.11; {WITHOUT_C}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}); {WITHOUT_C}"
    return None


def find_toolkit() -> toolkit.Toolkit | str:
    """What compiles the CUDA library if the CPU one can be built, or why nothing does."""
    import torch

    if mode == "cpu":
        return f"{PACKAGE.upper()}_BUILD=cpu; {WITHOUT_CUDA}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; {WITHOUT_CUDA}"
    try:
        found = toolkit.find(torch.version.cuda.split(".")[0])
    except toolkit.ToolkitError as error:
        return f"{error}; {WITHOUT_CUDA}"
    record["cuda"], record["toolkit"] = found.release, found.source
    return found


def compute_name(architecture: str) -> str:
    """As nvcc has it: 8.6 and 8.6+PTX are compute_86."""
    return f"compute_{architecture.removesuffix('+PTX').replace('.', '')}"


def visible_architectures() -> list[str]:
    """Compute capabilities, from 8.0 on, of the GPUs that this machine shows."""
    import torch

    devices = range(torch.cuda.device_count())
    capabilities = {torch.cuda.get_device_capability(device) for device in devices}
    return [f"{major}.{minor}" for major, minor in sorted(capabilities) if major >= 8]


def libraries() -> list:
    """The extension modules to build, and their reasons in ``record`` for those that cannot be."""
    if mode == "none":
        for library in ("_C", "_cuda"):
            leave_out(library, f"{PACKAGE.upper()}_BUILD=none; {WITHOUT_C}")
        return []
    reason = why_not_compile()
    if reason is not None:
        for library in ("_C", "_cuda"):
            leave_out(library, reason)
        return []

    from torch.utils import cpp_extension

    # as system headers, torch's own do not take part in our warnings
    system = [f"-isystem{path}" for path in cpp_extension.include_paths()]

    def library(kind, name, sources):
        extension = kind(
            f"{PACKAGE}.{name}",
            sources,
            include_dirs=[str(Path("csrc").absolute())],
            extra_compile_args={"cxx": CXX_FLAGS + system, "nvcc": list(NVCC_FLAGS)},
            py_limited_api=True,
        )
        extension.optional = mode == "auto"  # setuptools then copies it only if it is there
        return extension

    extensions = [library(cpp_extension.CppExtension, "_C", ["csrc/bindings/cpu.cpp"])]
    found = find_toolkit()
    if isinstance(found, str):
        leave_out("_cuda", found)
        return extensions
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # torch would ask the GPU, which may be absent
        wanted = WHEEL_ARCHITECTURES if mode == "wheel" else visible_architectures()
        chosen = [
            architecture
            for architecture in wanted or ARCHITECTURES
            if compute_name(architecture) in found.architectures
        ]
        os.environ["TORCH_CUDA_ARCH_LIST"] = (
            ";".join(chosen or ARCHITECTURES).removesuffix("+PTX") + "+PTX"
        )
    record["architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(found.home)
    kernels = sorted(str(path) for path in Path("csrc").glob("*/*.cu"))
    sources = ["csrc/bindings/cuda.cpp", *kernels]
    extensions.append(library(cpp_extension.CUDAExtension, "_cuda", sources))
    links = toolkit.link_folder(found.home, Path("build/cudart"))
    if links is not None:
        extensions[-1].library_dirs.insert(0, str(links))
    return extensions


def name_of(extension) -> str:
    return extension.name.rpartition(".")[2]


@contextlib.contextmanager
def everything_said(log: Path):
    """What this process and its children print goes into a file, and is then printed."""
    log.parent.mkdir(exist_ok=True)
    kept = [(stream, os.dup(stream.fileno())) for stream in (sys.__stdout__, sys.__stderr__)]
    with open(log, "wb") as file:
        for stream, _ in kept:
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        try:
            yield
        finally:
            for stream, before in kept:
                stream.flush()
                os.dup2(before, stream.fileno())
                os.close(before)
    print(log.read_text(errors="replace"), end="", file=sys.stderr)


def last_error(log: Path) -> str | None:
    """The last line of a compiler's or linker's output that is about an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [
        line
        for line in lines
        if re.search(r"error|cannot find|undefined reference", line, re.IGNORECASE)
        # what only says that there was one
        and not re.match(
            r"(ninja|collect2|error: command|\d+ errors?\b|subprocess\.|Runtime|Traceb)", line
        )
    ]
    return told[-1][:300] if told else None


def build_libraries_command() -> type:
    """torch's build command, which in mode auto records a failure in place of failing.

    What the compilers say is kept whole in build/LIBRARY.log if one of them fails.
    """
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = "build/objects"  # kept, also by an editable install, to build less

        def build_extensions(self):
            try:
                super().build_extensions()  # looks at the compilers first
            except Exception as error:
                for extension in self.extensions:
                    self.failed(extension, error)

        def build_extension(self, extension):
            log = Path("build", f"{name_of(extension)}.log").absolute()
            try:
                with everything_said(log):
                    super().build_extension(extension)
            except Exception as error:
                self.failed(extension, error, log)
            else:
                record["built"].append(name_of(extension))
                log.unlink()

        def failed(self, extension, error, log=None):
            if mode != "auto":
                raise error
            name = name_of(extension)
            if name not in record["built"]:
                what = first_line(error)
                if log is not None:
                    what = f"{last_error(log) or what}; all of it: {log}"
                cost = WITHOUT_C if name == "_C" else WITHOUT_CUDA
                leave_out(name, f"compiling failed ({what}); {cost}")

    return BuildLibraries


class BuildInfo(Command):
    """Writes the record of the build beside the package's modules, after everything else."""

    user_options = [("build-lib=", "b", "folder of the built package")]
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def _folder(self) -> Path:
        return Path(PACKAGE) if self.editable_mode else Path(self.build_lib, PACKAGE)

    def run(self):
        for path in self._folder().glob("*.so"):
            if path.name.split(".")[0] not in record["built"]:
                path.unlink()  # of an earlier build
        (self._folder() / "_build_info.json").write_text(json.dumps(record, indent=1) + "\n")

    def get_outputs(self):
        return [str(Path(self.build_lib, PACKAGE, "_build_info.json"))]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class Build(build):
    sub_commands = [*build.sub_commands, ("build_info", None)]


os.chdir(Path(__file__).parent)
extensions = libraries()
commands = {"build": Build, "build_info": BuildInfo}
options = {}
if extensions:
    commands["build_ext"] = build_libraries_command()
    options["bdist_wheel"] = {"py_limited_api": "cp310"}
setup(ext_modules=extensions, cmdclass=commands, options=options)
