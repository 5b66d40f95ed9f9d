"""The trunk's operations, called straight through torch.ops, refuse what they would misread."""

import functools

import emulation
import pytest
import torch
from test_trunk import Problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_resnet_fast import ops

OPERATIONS = (
    "prepare_weights",
    "fold_weights",
    "stem_forward",
    "stem_evaluate",
    "conv3x3_f1",
    "conv3x3_f2",
    "conv3x3_evaluate",
    "head_forward",
    "head_backward",
    "conv3x3_b2",
    "conv3x3_b1",
    "stem_backward",
    "sum_slabs",
)


class Calls(TorchDispatchMode):
    """Keeps one call of each of the package's operations."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cifar_resnet_fast":
            # the last one: of a backward kernel that has slabs to add up
            self.kept[func._opname] = (func, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(kernels_run, device):
    kernels_run("cuda")
    return recorded(device)


@functools.cache
def recorded(device):
    """Name to operation and arguments."""
    problem = Problem(8, 2, torch.float16, device)
    recorder = Calls()
    with recorder:
        problem.kernels("cuda")
        ops.trunk(problem.pictures, problem.units, training=False, implementation="cuda")
    return recorder.kept


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def shorter(tensor: Tensor) -> Tensor:
    """Where a first axis may have any length, the second may not."""
    axis = min(tensor.dim() - 1, 1)
    return tensor.narrow(axis, 0, tensor.shape[axis] - 1)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, shape and strides, one element further on."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


WRONG = {
    "dtype": lambda t: t.double(),
    "shape": shorter,
    "strides": strided,
    "device": lambda t: t.to("meta"),
    "axes": lambda t: t[None],
    "alignment": misaligned,
}


def test_every_operation_is_called(calls):
    assert set(calls) == set(OPERATIONS)


def test_who_waits_for_new_fragments(calls, device):
    """A kernel reads its fragments before it waits for the kernel before it.

    So the first kernel of a pass, behind what makes or copies fragments, is not overlapped.
    """
    if device.type == "cuda":
        pytest.skip("the emulation says how a kernel was launched")
    waits = set()
    for name, (func, args) in calls.items():
        func(*args)
        if not emulation.load().library.emulated_last_overlapped():
            waits.add(name)
    makes = {"prepare_weights", "fold_weights"}
    assert waits == makes | {"stem_forward", "stem_evaluate", "head_backward"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_tensors_are_refused(operation, calls):
    func, args = calls[operation]
    tried = 0
    for place, argument in enumerate(args):
        listed = isinstance(argument, (list, tuple))
        tensor = argument[-1] if listed and len(argument) else argument
        if not isinstance(tensor, Tensor):
            continue
        name = func._schema.arguments[place].name
        # of `like` the dtype and the device count
        wrongs = WRONG if name != "like" else {what: WRONG[what] for what in ("dtype", "device")}
        for what, change in wrongs.items():
            one_at_a_time = tensor.dim() == 1 and name != "fragments"
            master = name in ("weights", "dweight", "left_dweight")
            if what == "alignment" and (one_at_a_time or master or tensor.dtype == torch.uint8):
                continue  # these are read an element at a time
            wrong = change(tensor)
            wrong = [*argument[:-1], wrong] if listed else wrong
            with pytest.raises(RuntimeError) as error:
                func(*args[:place], wrong, *args[place + 1 :])
            assert "outside every tensor" not in str(error.value), f"{name} {what}: reached"
            assert "misaligned" not in str(error.value), f"{name} {what}: reached"
            tried += 1
    assert tried >= 7


def test_slabs_and_their_gradient_come_together(calls):
    func, args = calls["conv3x3_b2"]
    with pytest.raises(RuntimeError, match="left_slabs and left_dweight must be given together"):
        func(*args[:-3], args[-3], None, args[-1])


@pytest.mark.parametrize("blocks", [0, -1, 65536])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if "weights" not in name])
def test_blocks_have_bounds(operation, blocks, calls):
    func, args = calls[operation]
    with pytest.raises(RuntimeError, match=f"blocks must be in 1 .. 65535, got {blocks}"):
        func(*args[:-1], blocks)


def test_batch_has_a_bound(calls):
    """Offsets in bytes would not fit in 31 bits. One image stands for all, which saves memory."""
    for operation, name in (("stem_forward", "images"), ("conv3x3_f2", "y")):
        func, (images, *rest) = calls[operation]
        images = images[:1].expand(65536, -1, -1, -1)
        with pytest.raises(
            RuntimeError, match=f"{name} must have at most 65535 images, got 65536"
        ):
            func(images, *rest)


@pytest.mark.parametrize(
    ("C", "stride", "shortcut_channels", "message"),
    [
        (48, 1, None, "channels must be 16, 32 or 64, got 48"),
        (64, 2, None, "channels must be 16, 32 or 64, got 128"),
        (16, 1, 8, "channels must be 16, 32 or 64, got 8"),  # option A of no stage before
        (32, 1, 64, "shortcut must have shape"),
    ],
)
def test_shapes_without_a_kernel_are_refused(C, stride, shortcut_channels, message, calls):
    func, (y, _, *_) = calls["conv3x3_f1"]
    one = torch.ones(C, dtype=torch.float32, device=y.device)

    def activation(channels):
        side = 512 // channels
        shape = (2, channels, side, side)
        return y.new_zeros(shape).contiguous(memory_format=torch.channels_last)

    shortcut = None if shortcut_channels is None else activation(shortcut_channels)
    fragments = y.new_zeros(9 * C * C * stride)
    sums = one.new_zeros(3, 2, C)
    norm = (one, one, one.clone(), one.clone(), 0.1, 1e-5)
    with pytest.raises(RuntimeError, match=message):
        func(activation(C), sums, *norm, shortcut, fragments, stride, 2)


def test_layers_of_several_launches(kernels_run, device):
    """128 layers travel as one launch's arguments; all are as if each were prepared alone."""
    kernels_run("cuda")
    prepare = torch.ops.cifar_resnet_fast.prepare_weights
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(130, 16, 16, 3, 3, generator=generator).to(device).unbind()
    like = torch.empty(1, dtype=torch.float16, device=device)
    alone = torch.cat([prepare([weights[i]], like) for i in (0, 127, 128, 129)])
    together = prepare(list(weights), like).view(130, -1)
    assert torch.equal(together[[0, 127, 128, 129]].flatten(), alone)
