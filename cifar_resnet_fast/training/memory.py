"""How large a batch fits, found out when one did not (layer 3)."""

import contextlib
import traceback
from collections.abc import Callable, Iterator

from cifar_resnet_fast.errors import first_line, is_out_of_memory
from cifar_resnet_fast.processes import Processes
from cifar_resnet_fast.training.engine import Engine

_USABLE = 0.9  # of the free memory: what lies between the tensors counts, too


class BatchTooLargeError(ValueError):
    """The batch does not fit into memory; the message says what would."""


@contextlib.contextmanager
def batch_must_fit(batch_size: int, processes: Processes, engine: Engine) -> Iterator[None]:
    """Around a training: memory that runs out is an error that says how large a batch fits.

    Raises:
        BatchTooLargeError: memory ran out
    """
    try:
        yield
        return
    except RuntimeError as error:
        on_host = "can't allocate memory" in str(error)  # PyTorch has no class for it there
        if not on_host and not is_out_of_memory(error):
            raise
        reason = first_line(error)
        traceback.clear_frames(error.__traceback__)  # they hold the failed step's tensors
    if on_host:
        raise BatchTooLargeError(f"batch_size must fit into memory, got {batch_size}: {reason}")
    available = engine.release()
    count = processes.count
    missing, largest = largest_batch(engine.step_bytes, batch_size // count, available)
    advice = "nor does one picture" if largest is None else f"at most {largest * count} fit"
    raise BatchTooLargeError(
        f"batch_size must fit into the GPU's memory, got {batch_size}: about "
        f"{missing / 2**30:.1f} GiB are missing; {advice}"
    )


def networks_that_fit(held: int, step: int, available: int) -> int:
    """How many networks train at once in so much memory.

    Args:
        held: bytes of a network, its optimiser and its averages
        step: bytes that a step of a network takes on top; evaluation, of one network at a time,
            takes at most as much
        available: bytes, one network being there already
    """
    usable = int(available * _USABLE) + held
    return max((usable - step) // max(held + step, 1), 0)


def largest_batch(
    measure: Callable[[int], int], wanted: int, available: int
) -> tuple[int, int | None]:
    """The largest batch that fits where ``wanted`` did not.

    A step takes so much for the network and so much a picture; two small batches tell both.

    Args:
        measure: the bytes that a step of so many pictures takes at most; an error of memory
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
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
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
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            largest = max(int(0.95 * largest), 2 * n)  # what lies between the tensors counts, too
    return missing, largest
