"""The interpreter by itself, on kernels of a few instructions."""

import re

import numpy as np
import pytest
import torch

from ptx import build

HEADER = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0)
{
  .reg .pred %p<9>;
  .reg .b32 %r<19>;
  .reg .f32 %f<9>;
  .reg .b16 %h<9>;
  .reg .b64 %rd<9>;
  .shared .align 16 .b8 memory[256];
  ld.param.u64 %rd1, [kernel_param_0];
  cvta.to.global.u64 %rd2, %rd1;
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd2, %rd3;
  mov.u32 %r2, memory;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
"""


@pytest.fixture
def interpreter():
    reason = build.why_not_interpreter()
    if reason is not None:
        pytest.skip(reason)
    return build.interpreter()


def run(interpreter, body, threads=32, order="forward"):
    """What 32-bit words of memory, poisoned before, hold afterwards, one a thread; and the
    machine."""
    machine = interpreter.Machine()
    machine.order = getattr(interpreter.Order, order)
    memory = np.full(threads, 0xFFFFFFFF, dtype=np.uint32)
    machine.load(f"{HEADER}{body}\n  ret;\n}}\n")
    machine.allow(memory, True)
    machine.run("kernel", (1, 1, 1), threads, 0, memory.ctypes.data.to_bytes(8, "little"))
    return memory, machine


def test_lanes_that_part_meet_again(interpreter):
    """Each third lane loops as often as its number; all shuffle together behind the loop."""
    memory, machine = run(
        interpreter,
        """
  mov.u32 %r5, 0;
  rem.u32 %r6, %r1, 3;
  setp.ne.u32 %p1, %r6, 0;
  @%p1 bra $behind;
$loop:
  add.s32 %r5, %r5, 1;
  setp.lt.u32 %p2, %r5, %r1;
  @%p2 bra $loop;
$behind:
  shfl.sync.bfly.b32 %r7|%p3, %r5, 1, 31, -1;
  st.global.u32 [%rd4], %r7;
""",
    )
    looped = [max(i, 1) if i % 3 == 0 else 0 for i in range(32)]
    assert memory.tolist() == [looped[i ^ 1] for i in range(32)]
    assert machine.take_findings() == []


def test_lanes_that_meet_in_different_instructions(interpreter):
    body = """
  setp.lt.u32 %p1, %r1, 16;
  @%p1 bra $other;
  bar.warp.sync -1;
  bra $end;
$other:
  shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;
$end:
"""
    with pytest.raises(interpreter.Failure, match="wait for each other in different"):
        run(interpreter, body)


FOUND = {
    "read-of-what-nothing-wrote": ("ld.shared.u32 %r5, [%r4];", "that nothing has written"),
    "neighbour-without-a-barrier": (
        """
  st.shared.u32 [%r4], %r1;
  xor.b32 %r5, %r3, 4;
  add.s32 %r5, %r2, %r5;
  ld.shared.u32 %r6, [%r5];""",
        "read with no barrier of the warp",
    ),
    "another-warp-without-a-barrier": (
        """
  st.shared.u32 [%r4], %r1;
  bar.warp.sync -1;
  xor.b32 %r5, %r3, 128;
  add.s32 %r5, %r2, %r5;
  ld.shared.u32 %r6, [%r5];""",
        "read with no barrier after|that nothing has written",
    ),
    "written-after-a-read": (
        """
  st.shared.u32 [%r4], %r1;
  bar.sync 0;
  xor.b32 %r5, %r3, 128;
  add.s32 %r5, %r2, %r5;
  ld.shared.u32 %r6, [%r5];
  st.shared.u32 [%r4], %r4;""",
        "written with no barrier after a read",
    ),
    "copy-without-a-wait": (
        """
  cp.async.ca.shared.global [%r4], [%rd4], 4;
  cp.async.commit_group;
  ld.shared.u32 %r6, [%r4];""",
        "read before the wait for the copy",
    ),
    "one-place-written-twice": ("st.global.u32 [%rd2], %r1;", "written twice with no barrier"),
}


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
@pytest.mark.parametrize(("body", "found"), FOUND.values(), ids=FOUND)
def test_findings(interpreter, body, found, order):
    _, machine = run(interpreter, body, threads=64, order=order)
    assert re.search(found, "\n".join(machine.take_findings()))


FAILURES = {
    "unknown-instruction": ("sin.approx.f32 %f1, %f2;", "unknown instruction sin.approx.f32"),
    "unknown-qualifier": ("add.rz.f32 %f1, %f2, %f3;", "unknown instruction add.rz.f32"),
    "unknown-register": ("add.s32 %r5, %r6, %s1;", "unknown special register %s1"),
    "behind-the-tensor": ("st.global.u32 [%rd4+4], %r1;", "outside of every tensor, at 128 of"),
    "before-the-tensor": ("ld.global.u32 %r5, [%rd4+-4];", "outside of every tensor, at -4 of"),
    "misaligned": ("ld.global.u32 %r5, [%rd4+2];", "misaligned"),
    "outside-of-shared-memory": ("st.shared.u32 [%r4+256], %r1;", "out of bounds"),
    "too-few-threads": ("bar.sync 1, 64;", "deadlock"),
    "part-of-a-warp": ("bar.sync 1, 48;", "of a part of a warp"),
}


@pytest.mark.parametrize(("body", "found"), FAILURES.values(), ids=FAILURES)
def test_failures(interpreter, body, found):
    with pytest.raises(interpreter.Failure, match=found):
        run(interpreter, body)


VALUES = [0.0, -0.0, 1.0, 65504, 65519.99, 65520, 1e-8, 2.98e-8, 6.1e-5, -3.14159, 1e30]
VALUES += [3.3895e38, 3.4e38, 1e-40, float("inf"), float("nan")]


@pytest.mark.parametrize(
    ("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)], ids=["fp16", "bf16"]
)
def test_conversions_are_those_of_torch(interpreter, name, dtype):
    """To 16 bits and back."""
    for value in torch.tensor(VALUES):
        word = f"0f{value.view(torch.int32).item() & 0xFFFFFFFF:08X}"
        memory, _ = run(
            interpreter,
            f"""
  cvt.rn.{name}.f32 %h1, {word};
  cvt.f32.{name} %f1, %h1;
  st.global.f32 [%rd4], %f1;""",
        )
        made = torch.from_numpy(memory.view(np.float32))[0]
        assert torch.equal(made.nan_to_num(nan=7), value.to(dtype).float().nan_to_num(nan=7))


@pytest.mark.parametrize(
    ("stride", "count", "least"), [(4, 1, 1), (8, 2, 1), (128, 32, 1), (0, 1, 1)]
)
def test_wavefronts(interpreter, stride, count, least):
    """Of a load of 4 bytes a lane: as many as a bank has words."""
    body = f"""
  rem.u32 %r5, %r1, 2;
  mul.lo.s32 %r6, %r1, {stride};
  add.s32 %r6, %r2, %r6;
  st.shared.u32 [%r6], 0;"""
    body_of_size = HEADER.replace("memory[256]", "memory[8192]")
    machine = interpreter.Machine()
    machine.load(f"{body_of_size}{body}\n  ret;\n}}\n")
    machine.run("kernel", (1, 1, 1), 32, 0, bytes(8))
    counted = machine.instruction_counts()
    (line,) = [i for i, (_, name) in enumerate(machine.instructions("kernel")) if "st.s" in name]
    assert counted[line].tolist() == [1, count, least]


def test_sectors(interpreter):
    """Lanes that are 64 bytes apart use 4 of the 32 bytes of as many sectors."""
    memory = np.zeros(32 * 16, dtype=np.uint32)
    machine = interpreter.Machine()
    body = "mul.wide.u32 %rd5, %r1, 64;\n  add.s64 %rd6, %rd2, %rd5;\n  ld.global.u32 %r5, [%rd6];"
    machine.load(f"{HEADER}{body}\n  ret;\n}}\n")
    machine.allow(memory, False)
    machine.run("kernel", (1, 1, 1), 32, 0, memory.ctypes.data.to_bytes(8, "little"))
    sectors, used = machine.warp_counts()[0, 8:10]
    assert (sectors, used) == (32, 128)
