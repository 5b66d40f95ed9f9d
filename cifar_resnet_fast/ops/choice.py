"""Which implementation of an operation runs: the only place that chooses (layer 1).

``auto`` takes the first of ``IMPLEMENTATIONS`` that can run on the tensor's device. One that was
asked for by name and cannot run is an error that says why; nothing falls back silently.
"""

import torch

IMPLEMENTATIONS = ("reference",)  # fastest first


def why_not(implementation: str, device: torch.device) -> str | None:
    """The reason why ``implementation`` cannot run on ``device``, or None where it can."""
    if implementation == "reference":
        return None
    raise ValueError(
        f"implementation must be one of {', '.join(('auto', *IMPLEMENTATIONS))}, "
        f"got {implementation!r}"
    )


def choose(implementation: str, device: torch.device) -> str:
    """The name of the implementation that runs on ``device``.

    Args:
        implementation: ``auto`` or one of ``IMPLEMENTATIONS``
        device: where the tensors live

    Raises:
        ValueError: the name is unknown
        RuntimeError: the named implementation cannot run on ``device``; says why
    """
    if implementation == "auto":
        return next(name for name in IMPLEMENTATIONS if why_not(name, device) is None)
    reason = why_not(implementation, device)
    if reason is not None:
        raise RuntimeError(f"implementation {implementation!r} cannot run on {device}: {reason}")
    return implementation
