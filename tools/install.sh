#!/usr/bin/env bash
# Installs the package, editable, and what its commands and tests need into a virtual environment,
# which is made if it is not there: tools/install.sh VENV. The Makefile calls it. Each step says how
# long it took. PYTHON names the interpreter, uv is used if it is there, and NEEDED_GB is the room
# on the disk without which a new environment is not begun. If PyTorch has CUDA and there is a C++
# compiler, but no CUDA toolkit, its packages are installed beside PyTorch.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 python=${PYTHON:-python3} needed_gb=${NEEDED_GB:-8}

fail() {
  echo "error: $*" >&2
  exit 1
}

step() { # what, command ...
  local what=$1 began=$SECONDS
  shift
  echo "-- $what"
  "$@" || fail "$what: failed after $((SECONDS - began)) s, for the reason above"
  echo "-- $what: $((SECONDS - began)) s"
}

if command -v uv > /dev/null; then
  make_venv() { uv venv --quiet --seed --allow-existing --python "$python" "$venv"; }
  install() { uv pip install --python "$venv/bin/python" "$@"; }
else
  make_venv() { "$python" -m venv "$venv"; }
  install() { "$venv/bin/python" -m pip install --disable-pip-version-check "$@"; }
fi

command -v "$python" > /dev/null ||
  fail "PYTHON must be Python 3.10 or newer, found no $python"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "PYTHON must be Python 3.10 or newer, $python is $version: make PYTHON=python3.12, for example"
command -v uv > /dev/null || "$python" -c 'import ensurepip, venv' 2> /dev/null ||
  fail "$python has no module venv or ensurepip: apt install python$version-venv on Debian and Ubuntu"
if [ ! -e "$venv" ]; then
  free_kb=$(df -Pk . | awk 'END { print $4 }')
  [ "$free_kb" -ge $((needed_gb * 1000000)) ] ||
    fail "PyTorch needs $needed_gb GB, $((free_kb / 1000000)) GB are free in $PWD; NEEDED_GB=0 tries it"
fi

step "virtual environment $venv" make_venv
export PATH="$(realpath "$venv")/bin:$PATH" # where PyTorch finds the ninja that is installed next
step "build tools" install --quiet "setuptools>=77" wheel ninja
step "PyTorch, some gigabytes" install "torch>=2.11,<3" torchvision
toolkit=$("$venv/bin/python" tools/toolkit.py) || fail "tools/toolkit.py failed, as above"
[ -z "$toolkit" ] || step "CUDA toolkit, $toolkit" install --quiet "$toolkit"
step "cifar_resnet_fast and its tools; compiling can take minutes" install --quiet --no-build-isolation --editable ".[dev]"
echo "-- all of it: $SECONDS s"
