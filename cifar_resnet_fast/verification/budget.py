"""The error budget: how far from float64 a result may be, measured on eager PyTorch (layer 1).

The one definition of it, for the tests, the benches and the self-check: a result errs at most
twice as much as eager PyTorch in the same dtype, both against float64. One rounding of the dtype
is always granted, since eager may be exact by luck.

Source: Dao et al. 2022, "FlashAttention", whose tests hold kernels to twice PyTorch's error.
"""

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from cifar_resnet_fast.errors import first_line

MEASURES = {"norm": lambda t: t.norm().item(), "maximum": lambda t: t.abs().max().item()}


class WrongResult(Exception):
    """A result is not what it should be."""


class Unavailable(Exception):
    """An implementation cannot run something here; the message says why."""


def import_rival(module: str, package: str) -> ModuleType:
    """A module of another project, which is measured beside this one's and is optional.

    Raises:
        Unavailable: it cannot be imported; the message names the package to install
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(
            f"{module} cannot be imported ({first_line(error)}): pip install {package}"
        ) from None


def assert_within_budget(
    name: str,
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    own_exact: Tensor | None = None,
    measures: Iterable[str] = tuple(MEASURES),
) -> None:
    """``ours`` errs at most twice as much as ``eager``, in norm and in maximum.

    Args:
        name: of the quantity, for the message
        ours, eager: of one shape and one dtype, the dtype under test
        exact: float64, what ``eager`` approximates; integers as they are, which must be equal
        own_exact: float64, what ``ours`` approximates, if its ReLU's mask makes that another
        measures: of the error, of ``MEASURES``

    Raises:
        WrongResult: names the quantity, and its error beside the allowed one
    """
    own_exact = exact if own_exact is None else own_exact
    _check_form(name, ours, eager, exact)
    rounding = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
    for measure in measures:
        size = MEASURES[measure]
        error = size(ours.double() - own_exact)
        allowed = 2 * size(eager.double() - exact) + rounding * size(exact.double())
        if not error <= allowed:
            raise WrongResult(
                f"{name}: {measure} of the error must be at most {allowed:.3g}, twice eager's, "
                f"got {error:.3g}"
            )


def _check_form(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Dtype and shape are right, and every number is finite."""
    if ours.dtype != eager.dtype:
        raise WrongResult(f"{name} must be of eager's dtype {eager.dtype}, got {ours.dtype}")
    if ours.shape != exact.shape:
        raise WrongResult(f"{name} must have shape {tuple(exact.shape)}, got {tuple(ours.shape)}")
    if not ours.isfinite().all():
        raise WrongResult(f"{name} must be finite, and is not")


@dataclass(frozen=True)
class Compared:
    """A result and what it is held against; the fields are ``assert_within_budget``'s."""

    name: str
    ours: Tensor
    eager: Tensor
    exact: Tensor
    own_exact: Tensor | None = None
    measures: Iterable[str] = tuple(MEASURES)

    def check(self) -> None:
        """Raises WrongResult if it is not within the budget."""
        tensors = (self.ours, self.eager, self.exact, self.own_exact)
        assert_within_budget(self.name, *tensors, self.measures)

    def check_form(self) -> None:
        """Raises WrongResult if dtype or shape are wrong, or a number is not finite."""
        _check_form(self.name, self.ours, self.eager, self.exact)

    def ratio(self) -> float:
        """The norm of the error over that of the exact values."""
        exact = self.exact if self.own_exact is None else self.own_exact
        return (self.ours.double() - exact).norm().item() / (exact.norm().item() or 1.0)

    @classmethod
    def joined(cls, name: str, parts: Sequence["Compared"]) -> "Compared":
        """Results of one kind as one, each over the largest of its exact values.

        All parts are of a right form and have the dtype and the measures of the first.
        """
        largest = [
            part.exact.abs().max().clamp(min=torch.finfo(torch.double).tiny) for part in parts
        ]

        def join(tensors: Iterable[Tensor]) -> Tensor:
            pairs = zip(tensors, largest, strict=True)
            return torch.cat([(tensor.double() / size).flatten() for tensor, size in pairs])

        first = parts[0]
        own = [part.exact if part.own_exact is None else part.own_exact for part in parts]
        return cls(
            name,
            join(part.ours for part in parts).to(first.ours.dtype),
            join(part.eager for part in parts).to(first.eager.dtype),
            join(part.exact for part in parts),
            join(own),
            first.measures,
        )


def compared(
    ours: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    own: Mapping[str, Tensor] | None = None,
    maximum: bool,
) -> list[Compared]:
    """Every tensor of ``exact``, by name.

    Args:
        ours, eager: results by name, in the dtype that is measured
        exact: the same in float64; integers as they are
        own: ``own_exact``, of those that have one
        maximum: hold the largest error to it, too, not only the norm. Not for gradients: where a
            ReLU's input is within rounding of 0 its mask is chance, and one such pixel is the
            maximum
    """
    measures = tuple(MEASURES) if maximum else ("norm",)
    return [
        Compared(name, ours[name], eager[name], truth, (own or {}).get(name), measures)
        for name, truth in exact.items()
    ]


def check(*results: Mapping[str, Tensor], maximum: bool) -> None:
    """``ours``, ``eager`` and ``exact``, as ``compared`` has them, are within the budget.

    Raises:
        WrongResult: names the tensor and by how much it errs
    """
    for result in compared(*results, maximum=maximum):
        result.check()


def assert_same_bits(name: str, ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """All tensors of two runs are bitwise equal.

    Raises:
        WrongResult: names the first tensor that is not, and how much of it differs
    """
    for key, value in ours.items():
        same = value == others[key]
        if not bool(same.all()):
            raise WrongResult(
                f"{name}: {key} must be bitwise equal, {int((~same).sum())} of {same.numel()} "
                "elements differ"
            )


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Within it PyTorch's convolutions are as exact as their dtype; TF32 would loosen float32's
    budget."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
