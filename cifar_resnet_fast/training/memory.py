"""The largest batch that fits into memory, measured after one did not (layer 3)."""

import contextlib
import traceback
from collections.abc import Callable, Iterator

from cifar_resnet_fast.errors import first_line, is_out_of_memory
from cifar_resnet_fast.processes import Processes
from cifar_resnet_fast.training.engine import Engine

_USABLE = 0.9  # share of the free memory: the gaps between the tensors count too


class BatchTooLargeError(ValueError):
    """The batch does not fit into memory; the message names one that does."""


@contextlib.contextmanager
def batch_must_fit(batch_size: int, processes: Processes, engine: Engine) -> Iterator[None]:
    """Context of a training, in which a lack of memory is an error that names a batch that fits.

    Raises:
        BatchTooLargeError: memory ran out
    """
    try:
        yield
        return
    except RuntimeError as error:
        on_host = "can't allocate memory" in str(
            error
        )  # PyTorch has no class for this error on a CPU
        if not on_host and not is_out_of_memory(error):
            raise
        reason = first_line(error)
        traceback.clear_frames(error.__traceback__)  # the frames hold the failed step's tensors
    if on_host:
        raise BatchTooLargeError(f"batch_size must fit into memory, got {batch_size}: {reason}")
    available = engine.release()
    count = processes.count
    missing, largest = largest_batch(engine.step_bytes, batch_size // count, available)
    advice = "nor does one image" if largest is None else f"at most {largest * count} fit"
    raise BatchTooLargeError(
        f"batch_size must fit into the GPU's memory, got {batch_size}: about "
        f"{missing / 2**30:.1f} GiB are missing; {advice}"
    )


def networks_that_fit(held: int, step: int, available: int) -> int:
    """The number of networks that can train at once in the available memory.

    Args:
        held: bytes of a network, its optimiser and its averages
        step: bytes that a step of a network takes in addition; evaluation, of one network at a
            time, takes at most as much
        available: bytes that are free beside the first network
    """
    usable = int(available * _USABLE) + held
    return max((usable - step) // max(held + step, 1), 0)


def largest_batch(
    measure: Callable[[int], int], wanted: int, available: int
) -> tuple[int, int | None]:
    """The largest batch that fits after ``wanted`` did not.

    A step takes an amount for the network and an amount per image; two small batches give both.

    Args:
        measure: the peak bytes of a step with that many images; raises an error of memory if it
            does not fit
        wanted: number of images that does not fit
        available: bytes

    Returns:
        missing: approximate number of bytes, 0 or more
        largest: number of images for which ``measure`` succeeded, or None if there is none
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
            largest = max(int(0.95 * largest), 2 * n)  # the gaps between the tensors count too
    return missing, largest
