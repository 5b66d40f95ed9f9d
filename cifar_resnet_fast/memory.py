"""How large a batch fits, found out when one did not (layer 2)."""

from collections.abc import Callable

import torch


class BatchTooLargeError(ValueError):
    """The batch does not fit into memory; the message says what would."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host under PyTorch, has refused memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def largest_batch(
    measure: Callable[[int], int], wanted: int, available: int
) -> tuple[int, int | None]:
    """The largest batch that fits where ``wanted`` did not.

    A step takes so much for the network and so much a picture; two small batches tell both.

    Args:
        measure: the bytes that a step of so many pictures takes at most; torch.OutOfMemoryError
            where it does not fit
        wanted: pictures that do not fit
        available: bytes

    Returns:
        missing: bytes, about, 0 or more
        largest: pictures for which ``measure`` succeeded, or None if there is no such number
    """
    small = max(wanted // 16, 1)
    sizes: list[tuple[int, int]] = []
    while not sizes:
        try:
            sizes = [(n, measure(n)) for n in (small, 2 * small)]
        except torch.OutOfMemoryError:
            if small == 1:
                return 0, None
            small //= 2
    (n, first), (_, second) = sizes
    each = max((second - first) / n, 1.0)
    fixed = first - each * n
    missing = max(int(fixed + each * wanted - available), 0)
    largest = min(max(int((available - fixed) / each), 2 * n), wanted - 1)
    while largest > 2 * n:
        try:
            measure(largest)
            break
        except torch.OutOfMemoryError:
            largest = max(int(0.95 * largest), 2 * n)  # what lies between the tensors counts, too
    return missing, largest
