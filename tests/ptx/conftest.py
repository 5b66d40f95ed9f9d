"""Fixtures of the tests of compiled code."""

import pytest

from ptx import build
from ptx.worker import Worker


@pytest.fixture(scope="session")
def all_cases(request) -> bool:
    """Whether the cases that take longer than CI has run, too."""
    return request.config.getoption("--all-compiled")


@pytest.fixture(scope="session", params=[80, 86, 90], ids=lambda a: f"sm_{a}")
def architecture(request, all_cases) -> int:
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    if request.param == 86 and not all_cases:
        pytest.skip("needs --all-compiled")
    return request.param


@pytest.fixture(scope="session")
def worker():
    """A process for what must not run in the tests' own."""
    started = Worker(80)
    yield started
    started.close()
