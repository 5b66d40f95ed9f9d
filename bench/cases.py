"""The public operations as the network uses them, with their work; for ``bench.kernels``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from torch.optim.sgd import sgd as torch_sgd

from bench import traffic
from bench.traffic import Sizes, Work
from cifar_resnet_fast.verification import operations
from cifar_resnet_fast.verification.operations import BORDERS, SGD_SETTINGS, UNITS, Tensors

Works = Mapping[str, Callable[[Sizes], Work]]


@dataclass(frozen=True)
class Case(operations.Case):
    """An operation at a place of the network, as it is timed.

    works: what the kernels have to move and compute, forward and backward; in one phase, ``call``,
        where nothing has a gradient
    others: plain PyTorch's own for the same, by name
    """

    works: Works = field(default_factory=dict)
    others: Mapping[str, Callable[[Tensors], Tensors]] = field(default_factory=dict)

    @property
    def phases(self) -> tuple[str, ...]:
        """What is timed: forward, backward and both, or call."""
        return (*self.works, "both") if len(self.works) > 1 else tuple(self.works)

    def work(self, phase: str, sizes: Sizes) -> tuple[int, int]:
        """Bytes and operations of a phase."""
        names = self.works if phase == "both" else (phase,)
        works = [self.works[name](sizes) for name in names]
        return sum(w.bytes for w in works), sum(w.flops for w in works)


def _timed(case: operations.Case, works: Works, **others) -> Case:
    given = {item.name: getattr(case, item.name) for item in fields(operations.Case)}
    return Case(**given, works=works, others=others)


def _unit(C: int, K: int, side: int, stride: int, shortcut: bool) -> Case:
    """``conv_bn_relu`` in training; pictures need no gradient."""
    sizes = (C, K, side, stride, shortcut)
    return _timed(
        operations.unit(*sizes),
        {
            "forward": lambda s: traffic.unit_forward(s, *sizes),
            "backward": lambda s: traffic.unit_backward(s, *sizes, dx=C != 3),
        },
    )


def _shortcut_a(*sizes: int) -> Case:
    return _timed(
        operations.shortcut_a(*sizes),
        {
            "forward": lambda s: traffic.shortcut_a_forward(s, *sizes),
            "backward": lambda s: traffic.shortcut_a_backward(s, *sizes),
        },
    )


def _sgd(depth: int) -> Case:
    _, places = operations.parameter_places(depth)
    numbers = sum(place.stop - place.start for place in places)

    def torch_optim(tensors):
        """What torch.optim.SGD(fused=True) calls, parameter by parameter; it has neither a check
        for gradients that are not finite nor a loss scale."""
        flats = (tensors[name] for name in ("parameters", "gradients", "momenta"))
        lists = ([flat[place] for place in places] for flat in flats)
        torch_sgd(*lists, fused=True, lr=0.1, dampening=0, maximize=False, **SGD_SETTINGS)
        return {name: tensors[name] for name in ("parameters", "momenta", "skipped")}

    works = {"call": lambda s: traffic.optimizer(s, numbers)}
    return _timed(operations.sgd(depth), works, **{"torch.optim": torch_optim})


CASES = (
    *(_unit(*sizes) for sizes in UNITS),
    *(_shortcut_a(*border) for border in BORDERS),
    _timed(operations.load_batch(), {"call": traffic.loader}),
    *(_sgd(depth) for depth in (20, 56)),
)
