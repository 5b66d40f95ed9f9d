#!/usr/bin/env bash
# The compiled kernels under compute-sanitizer, on a machine with a GPU and a CUDA toolkit:
#   tests/sanitize.sh [memcheck] [racecheck] [initcheck] [synccheck]
# Only the tools that are named run, or without a name all of them, one after the other.
# memcheck: accesses out of bounds; racecheck: shared memory without a barrier; initcheck: reads of
# global memory that nothing has written; synccheck: barriers that not all can reach.
# What they watch is tests/sanitized.py. PYTHON names the interpreter (default python3).
#
# A tool is ended after 2 minutes, so all four take at most 8. Predicted, not measured, is 1 minute a
# tool: 10 s to start and to import torch, 30 s to instrument about 100 kernels (0.3 s each, a
# guess), and 10 s for their 200 launches: unwatched, on 3 or 11 images, each is bound by its 10 us
# of latency, 2 ms in all, of which the tools would have to make 5,000 times as much.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SECONDS_A_TOOL=120
all=(memcheck racecheck initcheck synccheck)
tools=("${@:-${all[@]}}")
for tool in "${tools[@]}"; do
  if [[ " ${all[*]} " != *" $tool "* ]]; then
    echo "tools are ${all[*]}, got $tool" >&2
    exit 2
  fi
done
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
status=0
for tool in "${tools[@]}"; do
  echo "== $tool"
  ended=0
  timeout --kill-after 5 "$SECONDS_A_TOOL" \
    "$sanitizer" --tool "$tool" --error-exitcode 1 "$PYTHON" tests/sanitized.py || ended=$?
  if [ "$ended" -eq 124 ]; then
    echo "$tool has not ended after $SECONDS_A_TOOL s" >&2
  fi
  [ "$ended" -eq 0 ] || status=1
done
exit "$status"
