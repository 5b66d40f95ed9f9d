"""The message of an error in one line, and whether memory has run out (layer 0)."""

import torch


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
