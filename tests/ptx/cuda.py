"""The package's CUDA launchers on the interpreter, in the form of ``emulation.Kernels``."""

import ctypes
import functools

import emulation
import torch

from ptx import build

ORDERS = {  # name of the order: seed, whether the data of copies arrive at once
    "forward": (1, False),
    "reversed": (1, True),
    "random": (7, False),
}


class WrongLaunch(Exception):
    """The interpreter found a mistake; the message has all that it found."""


class Machine:
    """The interpreter's machine, which runs each launch in every order of the warps.

    Args:
        architecture: compute capability that the code is compiled for
    """

    def __init__(self, architecture: int):
        self.interpreter = build.interpreter()
        self.machine = self.interpreter.Machine()
        self.machine.architecture = architecture

    def in_every_order(self, name: str, written: list[torch.Tensor], launch):
        """What ``launch()`` returns, which must leave the same bits in ``written`` each time.

        Raises:
            WrongLaunch: it does not, or the machine found something else
        """
        before = [tensor.clone() for tensor in written]
        first = None
        for order in ORDERS:
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)
            self.set_order(order)
            self.machine.synchronise()  # what was launched before has ended
            try:
                returned = launch()
            except self.interpreter.Failure as failure:
                raise WrongLaunch(f"{name}, warps {order}:\n{failure}") from failure
            self.check(f"{name}, warps {order}")
            made = [bits(tensor) for tensor in written]
            first = made if first is None else first
            if not all(map(torch.equal, made, first)):
                raise WrongLaunch(f"{name}: other bits with warps {order}")
        return returned

    def set_order(self, order: str) -> None:
        """Of the launches that follow: one of ``ORDERS``."""
        self.machine.order = getattr(self.interpreter.Order, order)
        self.machine.seed, self.machine.early_copies = ORDERS[order]

    def check(self, name: str) -> None:
        """Raises WrongLaunch if the machine has found anything since it was last asked."""
        findings = self.machine.take_findings()
        if findings:
            raise WrongLaunch("\n".join([f"{name}:", *findings]))


class Kernels(Machine, emulation.Kernels):
    """``emulation.Kernels`` on compiled code: each call runs in every order of the warps, from the
    same memory, and must leave the same bits."""

    def __init__(self, architecture: int):
        Machine.__init__(self, architecture)
        self.folder = build.launchers(architecture)
        emulation.Kernels.__init__(self, ctypes.CDLL(str(self.folder / "kernels.so")))
        self.hooks = ctypes.c_void_p(self.machine.hooks())
        for text in sorted(self.folder.glob("*.ptx")):
            self.machine.load(text.read_text())

    def set_order(self, order: str) -> None:
        """One of ``ORDERS``; of the emulator's, which tests ask for, ``call`` needs none. The
        library launches on this machine then, until another that shares it is set."""
        if order in ORDERS:
            Machine.set_order(self, order)
            self.library.ptx_attach(self.hooks)

    def call(self, function, params, dtype, *sizes):
        written = [tensor for tensor, writable in params.tensors if writable]
        launch = super().call
        return self.in_every_order(
            function, written, lambda: launch(function, params, dtype, *sizes)
        )

    def shortcut_a(self, shape, backward, given, made):
        launch = super().shortcut_a
        return self.in_every_order(
            "shortcut_a", [made], lambda: launch(shape, backward, given, made)
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


@functools.cache
def kernels(architecture: int) -> Kernels:
    """One for each architecture and process."""
    return Kernels(architecture)
