"""The compiled Triton kernels, on the cases that their interpreted source is tested with."""

import pytest

from ptx import build, cases

pytest.importorskip("triton")

# what CI runs, by the beginning of the name; the rest needs --all-compiled
STANDARD = (
    "step-resnet8-fp16",
    *(f"unit-into-a-stage-from-even-sizes-{dtype}" for dtype in cases.DTYPES),
    *(f"unit-two-channel-blocks-{dtype}" for dtype in cases.DTYPES),
    "unit-stem-fp16",
    "raw-ragged-tiles-fused-bf16",
    "raw-ragged-tiles-two-launches-fp32",
    "loss-ragged-tile",
    "loss-no-bias",
    "sgd",
    "record",
    "load-batch-cutout-8",
    "shortcut-a-border",
)


@pytest.mark.parametrize("case", cases.TRITON)
def test_case(case, worker, all_cases):
    if not (all_cases or case.startswith(STANDARD)):
        pytest.skip("needs --all-compiled")
    reason = build.why_not_interpreter()
    if reason is not None:
        pytest.skip(reason)
    wrong = worker.run("TRITON", case)
    assert wrong is None, wrong
