"""Error budgets: what a result may differ from float64, measured on eager PyTorch."""

from collections.abc import Iterable

import torch
from torch import Tensor

MEASURES = {"norm": lambda t: t.norm().item(), "maximum": lambda t: t.abs().max().item()}


def assert_within_budget(
    name: str,
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    own_exact: Tensor | None = None,
    measures: Iterable[str] = tuple(MEASURES),
) -> None:
    """``ours`` errs at most twice as much as ``eager``, in norm and in maximum.

    One rounding of the dtype is always granted: eager may be exact by luck.

    Args:
        name: of the quantity, for the message
        ours, eager: in the dtype under test
        exact: float64, what ``eager`` approximates
        own_exact: float64, what ``ours`` approximates, where its ReLU's mask makes that another
        measures: of the error, of ``MEASURES``
    """
    own_exact = exact if own_exact is None else own_exact
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, eager has {eager.dtype}"
    assert ours.shape == eager.shape, f"{name}: {ours.shape}, eager has {eager.shape}"
    assert ours.isfinite().all(), f"{name}: not finite"
    rounding = torch.finfo(ours.dtype).eps
    for measure in measures:
        size = MEASURES[measure]
        error = size(ours.double() - own_exact)
        allowed = 2 * size(eager.double() - exact) + rounding * size(exact)
        assert error <= allowed, f"{name}: {measure} of the error {error:.3g} > {allowed:.3g}"
