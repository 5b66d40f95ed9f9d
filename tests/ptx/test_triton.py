"""The compiled Triton kernels, on the cases that their interpreted source is tested with."""

import pytest

from ptx import build, cases
from ptx.worker import Worker

pytest.importorskip("triton")

# the rest needs --all-compiled
STANDARD = ("step-resnet8-fp16", "unit", "loss", "sgd", "record", "load-batch", "shortcut-a")


@pytest.fixture(scope="module")
def worker():
    reason = build.why_not_interpreter()
    if reason is not None:
        pytest.skip(reason)
    started = Worker(80)
    yield started
    started.close()


@pytest.mark.parametrize("case", cases.TRITON)
def test_case(case, worker, all_cases):
    wrong = worker.run("TRITON", case)
    assert wrong is None, wrong
