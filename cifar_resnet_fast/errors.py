"""The message of an error in one line; memory that has run out, missing packages (layer 0)."""

import contextlib
from collections.abc import Iterator

import torch


class MissingPackageError(ImportError):
    """A package that only a part of this one needs cannot be imported; names the extra with it."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of what only an extra of this package brings.

    Raises:
        MissingPackageError: an import fails; says how to install the extra
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f'{first_line(error)}: pip install "cifar_resnet_fast[{name}]" brings it'
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip() if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the GPU has run out.

    In an operation of the compiled extension, too: from there an error comes as a RuntimeError,
    before torch 2.13 without its message. The allocator then knows whether it has refused one.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error)
    if not isinstance(error, RuntimeError) or "API call failed at" not in message:
        return False
    refused = torch.cuda.memory_stats().get("num_ooms", 0) if torch.cuda.is_available() else 0
    return "CUDA out of memory" in message or refused > 0
