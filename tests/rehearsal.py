"""A stand-in for CUDA graphs on the CPU, as strict as they are.

Capturing records every operation below autograd with its tensors; replaying repeats the operations
on the same memory, without the Python that led to them. So a step that relies on Python at replay,
on a fresh tensor, or on an answer from the device, goes wrong here as it would on a GPU.

Functions that run side by side are recorded one after the other and repeated with their operations
interleaved, so that one which reads or writes what another one writes goes wrong, too.
"""

from itertools import chain, zip_longest

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from cifar_resnet_fast.kernels import launch

# they wait for the device, have shapes that depend on values, or copy from pageable host memory
REFUSED = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_dim",
    "aten.equal",
    "aten.is_nonzero",
    "aten.lift_fresh",
    "aten.repeat_interleave",
    "aten.bincount",
}


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func).rsplit(".", 1)[0]
        masks = name in ("aten.index", "aten.index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if masks or name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs)
        given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [
            t if isinstance(t, Tensor) and storage(t) not in given else None
            for t in tree_leaves(result)
        ]
        self.operations.append((func, args, kwargs, made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            again = tree_leaves(func(*args, **kwargs))
            for tensor, value in zip(made, again, strict=True):
                if tensor is not None:
                    tensor.copy_(value)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Rehearsal:
    """Has the form of ``CudaGraphs``. Unlike there, capturing runs the function once."""

    def __init__(self):
        self.replays = 0
        self.operations = 0
        self.branches = []  # of each capture that had several: how many
        self._tape = None

    def __call__(self, function, warm_up, times=3):
        for _ in range(times):
            warm_up()
        tape = _Tape()
        start = launch.launch

        def recorded(kernel, grid, **arguments):
            with _disable_current_modes():  # an interpreted kernel is one operation, as on a GPU
                start(kernel, grid, **arguments)
            tape.operations.append((start, (kernel, grid), arguments, [None]))

        launch.launch = recorded
        self._tape = tape
        try:
            with tape:
                function()
        finally:
            launch.launch = start
            self._tape = None
        self.operations += len(tape.operations)

        def replay():
            self.replays += 1
            tape.replay()

        return replay

    def side_by_side(self, functions):
        def run():
            if self._tape is None:
                for function in functions:
                    function()
                return
            operations, branches = self._tape.operations, []
            for function in functions:
                first = len(operations)
                function()
                branches.append(operations[first:])
                del operations[first:]
            # the last one is ahead
            turns = zip_longest(*reversed(branches))
            operations += [operation for operation in chain(*turns) if operation is not None]
            self.branches.append(len(branches))

        return run
