#!/usr/bin/env bash
# The compiled kernels under compute-sanitizer, on a machine with a GPU and a CUDA toolkit:
#   tests/sanitize.sh [memcheck | racecheck | initcheck | synccheck] [pytest arguments]
# Without a tool all of them run, one after the other.
# memcheck: accesses out of bounds; racecheck: shared memory without a barrier; initcheck: reads of
# global memory that nothing has written; synccheck: barriers that not all can reach.
# PYTHON names the interpreter (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ ! -x "$sanitizer" ]; then
  echo "there is no compute-sanitizer (PATH, CUDA_HOME or /usr/local/cuda)" >&2
  exit 1
fi
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "there is no CUDA GPU" >&2
  exit 1
}
# PyTorch's cache would hand out parts of one large allocation: let every tensor have its own
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# and no test may fill memory beforehand
export SANITIZED=1
tools=(memcheck racecheck initcheck synccheck)
case ${1-} in
  memcheck | racecheck | initcheck | synccheck)
    tools=("$1")
    shift
    ;;
esac
for tool in "${tools[@]}"; do
  echo "== $tool"
  # the captured graphs and the huge tensors need the cache; timeouts do not fit a hundredfold run
  "$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes all \
    "$PYTHON" -m pytest -q -p no:cacheprovider --timeout 0 \
    -k "cuda and not graph and not beyond_one_grid and not compiles_whole and not registration" \
    tests/test_shortcut_a.py tests/test_stage_border.py tests/test_trunk.py "$@"
done
