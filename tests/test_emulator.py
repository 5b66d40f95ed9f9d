"""The emulator of tests/emulation finds the mistakes that emulator.h says it finds."""

import ctypes
import subprocess

import emulation
import pytest

SHARED, BLOCK = "race at shared address", "race with another block"
FOUND = {  # kernels of tests/emulation/faults.cpp
    "none": "",
    "written_in_the_warp": SHARED,
    "read_in_the_warp": SHARED,
    "matrices_in_the_warp": SHARED,
    "written_by_another_warp": SHARED,
    "read_by_another_warp": SHARED,
    "copy_not_waited_for": SHARED,
    "written_by_two_blocks": BLOCK,
    "read_by_another_block": BLOCK,
    "read_before_the_wait": "access before the wait for the kernel before",
    "written_before_the_wait": "access before the wait for the kernel before",
    "never_waits": "no wait for the kernel before",
    "constant_that_is_written": "read outside every tensor",
    "different_instructions": "lanes of a warp meet in different instructions",
    "part_of_a_warp": "part of a warp at a barrier",
}


@pytest.fixture(scope="module")
def run_fault(tmp_path_factory):
    if emulation.compiler() is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    sources = [str(emulation.HERE / name) for name in ("faults.cpp", "emulator.cpp")]
    call = [emulation.compiler(), *emulation.FLAGS, "-shared", *sources, "-o", str(library)]
    subprocess.run(call, check=True)
    run = ctypes.CDLL(str(library)).run_fault
    run.restype = ctypes.c_char_p
    return lambda name: run(name.encode()).decode()


@pytest.mark.parametrize("fault", FOUND)
def test_fault_is_found(run_fault, fault):
    found = run_fault(fault)
    assert found.partition(" (")[0].startswith(FOUND[fault])
    assert bool(found) == bool(FOUND[fault])
