"""tools/install.sh, which make calls, with programs in the place of Python, uv and df."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# writes down its arguments and the first folder in which it would find programs
NOTE = 'echo "$(basename "$0") $* [${PATH%%:*}]" >> "$HOME/calls"'
PYTHON = f"""case "$*" in
  *print*) echo VERSION ;;
  *"version_info <"*) exit OLD ;;
  *ensurepip*) exit WITHOUT_VENV ;;
  *toolkit.py) echo "TOOLKIT" ;;
  "-m venv "*) {NOTE}; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *) {NOTE}; exit PIP_STATUS ;;
esac"""
UV = f"""{NOTE}
if [ "$1" = venv ]; then
  mkdir -p "${{!#}}/bin"
  cp "$(command -v python3)" "${{!#}}/bin/python"
fi"""


@pytest.fixture
def install(tmp_path):
    """A function that runs the script in a new folder.

    Args:
        version, old, without_venv, pip_status: of the Python that is there
        toolkit: what tools/toolkit.py says is missing
        uv: whether it is there
        free: kB that df finds
        environment: besides PATH and HOME
    """
    project, programs = tmp_path / "project", tmp_path / "programs"
    (project / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools/install.sh", project / "tools")
    programs.mkdir()
    # some of the system's programs, and not its folders, in which there may be a uv
    for name in ("awk", "basename", "bash", "cp", "dirname", "env", "mkdir", "realpath"):
        (programs / name).symlink_to(shutil.which(name))

    def program(name, text):
        (programs / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (programs / name).chmod(0o755)

    def run(
        version="3.12",
        old=0,
        without_venv=0,
        toolkit="",
        pip_status=0,
        uv=False,
        free=10**8,
        **environment,
    ):
        python = PYTHON.replace("VERSION", version).replace("OLD", str(old))
        python = python.replace("WITHOUT_VENV", str(without_venv)).replace("TOOLKIT", toolkit)
        program("python3", python.replace("PIP_STATUS", str(pip_status)))
        program("df", f"echo Filesystem; echo disk 0 0 {free} 0% /")
        if uv:
            program("uv", UV)
        environment = {"PATH": str(programs), "HOME": str(tmp_path), **environment}
        return subprocess.run(
            [project / "tools/install.sh", ".venv"],
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


def error_of(done):
    """The one line that a start ends in before it has done anything."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    return done.stderr


def test_the_steps_with_pip(install, tmp_path):
    done = install()
    assert (done.returncode, done.stderr) == (0, "")
    shown = [line for line in done.stdout.splitlines() if line.endswith(" s")]
    assert len(shown) == 5  # four steps and all of it
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("python3 -m venv .venv [")
    own = f"[{tmp_path}/project/.venv/bin]"  # where the build finds ninja
    assert all(line.endswith(own) for line in calls[1:])
    assert [line.split()[1:4] for line in calls[1:]] == 3 * [["-m", "pip", "install"]]
    assert "--quiet" not in calls[2]  # PyTorch, with pip's progress
    assert "--no-build-isolation --editable .[dev]" in calls[3]


def test_a_missing_toolkit_is_a_step_of_its_own(install, tmp_path):
    done = install(toolkit="cuda-toolkit[nvcc,cccl]==13.0.3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "-- CUDA toolkit, cuda-toolkit[nvcc,cccl]==13.0.3: 0 s\n" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "torch" in calls[2]  # which says what toolkit it wants
    assert calls[3].split()[-2] == "cuda-toolkit[nvcc,cccl]==13.0.3"
    assert "--editable" in calls[4]


def test_the_steps_with_uv(install, tmp_path):
    done = install(uv=True, without_venv=1)
    assert (done.returncode, done.stderr) == (0, "")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("uv venv --quiet --seed --allow-existing --python python3 .venv [")
    assert len(calls) == 4
    assert all(line.startswith("uv pip install --python .venv/bin/python ") for line in calls[1:])


def test_a_python_that_is_too_old(install):
    shown = error_of(install(version="3.9", old=1))
    assert "PYTHON must be Python 3.10 or newer, python3 is 3.9: make PYTHON=" in shown


def test_no_python(install):
    assert "found no python3.99" in error_of(install(PYTHON="python3.99"))


def test_no_venv(install):
    assert "python3 has no module venv or ensurepip: apt install python3.12-venv" in error_of(
        install(without_venv=1)
    )


def test_no_room(install, tmp_path):
    assert "PyTorch needs 8 GB, 3 GB are free in" in error_of(install(free=3_500_000))
    assert install(free=3_500_000, NEEDED_GB="0").returncode == 0
    # an environment that is there has PyTorch: it is not asked for so much room
    assert (tmp_path / "project/.venv").is_dir()
    assert install(free=3_500_000).returncode == 0


def test_a_step_that_fails_is_named(install):
    done = install(pip_status=1)
    assert done.returncode == 1
    assert done.stderr.startswith("error: build tools: failed after 0 s")
    assert "PyTorch" not in done.stdout
