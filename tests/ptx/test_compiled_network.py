"""The trunk of a network on the compiled CUDA kernels, behind the operations that torch calls."""

import pytest

from ptx import cases


@pytest.mark.parametrize("case", cases.CUDA)
def test_case(case, architecture, worker):
    wrong = worker.run("CUDA", case, architecture)
    assert wrong is None, wrong
