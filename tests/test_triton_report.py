"""Every kernel of the family compiles ahead of time for GPUs that are not here, and fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
PROGRAM = """
import dataclasses, json, sys
from tools.triton_report import kernel_resources
arch, dtype, stages = json.loads(sys.argv[1])
for r in kernel_resources(arch, dtype, stages):
    print(json.dumps({**dataclasses.asdict(r), "fits": r.fits()}))
"""


# the extremes: fewest and most channels on the least shared memory, and the newest tensor cores
# (`make kernels-report` has every layer on every architecture)
@pytest.mark.parametrize(
    ("arch", "dtype", "stage"),
    [
        (86, "fp16", (16, 16, 32, 1)),
        (86, "fp16", (64, 64, 8, 1)),
        (90, "bf16", (64, 64, 8, 1)),
    ],
    ids=["narrowest-on-8.6", "widest-on-8.6", "widest-on-9.0"],
)
def test_no_spills_and_fits(arch, dtype, stage):
    # the compiler needs a process without the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps((arch, dtype, [stage]))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in kernels}
    assert {"conv3x3_fwd", "bn_merge_fwd", "bn_apply_fwd", "bn_reduce_bwd", "sum_slabs"} <= names
    if stage[0] == 3:
        assert {"load_batch", "linear_cross_entropy", "sgd_check", "sgd"} <= names
    for kernel in kernels:
        assert kernel["spills"] == kernel["stack"] == 0, kernel
        # compute capability 8.6 has the least, and what fits there fits everywhere
        assert kernel["shared"] <= 101_376, kernel
        assert kernel["blocks_per_sm"] >= 1, kernel
        assert kernel["fits"], kernel
    convolutions = [k for k in kernels if k["kernel"].startswith("conv3x3")]
    assert all(kernel["mma"] > 0 for kernel in convolutions), "not on tensor cores"
