"""The package's CUDA launchers on the interpreter, in the form of ``emulation.Kernels``."""

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


class Kernels(emulation.Kernels):
    """``emulation.Kernels`` on compiled code: each call runs in every order of the warps, from the
    same memory, and must leave the same bits.

    Args:
        architecture: compute capability that the code is compiled for
    """

    def __init__(self, architecture: int):
        self.interpreter = build.interpreter()
        self.machine = self.interpreter.Machine()
        self.machine.architecture = architecture
        self.folder = build.launchers(architecture)
        self.orders = tuple(ORDERS)
        super().__init__(build.attach(self.folder, self.machine))

    def set_order(self, order: str) -> None:
        """Nothing: a call runs in every order."""

    def call(self, function, params, dtype, *sizes):
        written = [tensor for tensor, writable in params.tensors if writable]
        return self.in_every_order(
            function, written, lambda: super(Kernels, self).call(function, params, dtype, *sizes)
        )

    def in_every_order(self, name: str, written: list[torch.Tensor], launch) -> int:
        """What ``launch()`` returns, which must leave the same bits in ``written`` in each.

        Raises:
            WrongLaunch: it does not, or the interpreter found something else
        """
        before = [tensor.clone() for tensor in written]
        first = None
        for order in self.orders:
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)
            self.set_machine(order)
            self.machine.synchronise()  # what was launched before has ended
            status = launch()
            self.check(f"{name}, warps {order}")
            if first is None:
                first = [bits(tensor) for tensor in written]
            elif any(
                not torch.equal(bits(tensor), value)
                for tensor, value in zip(written, first, strict=True)
            ):
                raise WrongLaunch(f"{name}: other bits with warps {order}")
        return status

    def set_machine(self, order: str) -> None:
        self.machine.order = getattr(self.interpreter.Order, order)
        self.machine.seed, self.machine.early_copies = ORDERS[order]

    def check(self, name: str) -> None:
        """Raises WrongLaunch if the machine has found anything since it was last asked."""
        findings = self.machine.take_findings()
        if findings:
            raise WrongLaunch("\n".join([f"{name}:", *findings]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


@functools.cache
def kernels(architecture: int) -> Kernels:
    """One for each architecture and process."""
    return Kernels(architecture)
