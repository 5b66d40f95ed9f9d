"""The processes of one run, as torchrun starts them: who is who, and what they exchange (layer 1).

Without torchrun there is one process, and exchanging does nothing.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_resnet_fast.errors import first_line

# in every message of gloo's: a path of its sources, or these words after a time-out before
_OF_GLOO = ("/gloo/", "Application timeout caused pair closure")
_POLL_SECONDS = 2e-4


class ProcessLostError(Exception):
    """Another process of the run has died, or does not answer."""


class Processes:
    """This process among those of its run.

    On GPUs tensors travel by NCCL, on the CPU by gloo; what the host decides by gloo always, so
    that a process that has died is noticed by a host that waits for no GPU.

    Args:
        device: ``cpu`` or ``cuda``, where the run trains
        timeout: seconds to wait for a process that does not answer

    Attributes:
        rank: 0 .. count - 1; the first one writes the run's files
        count: of the processes
        device: of this process; a GPU each

    Raises:
        ValueError: there are fewer GPUs than processes
        ProcessLostError: not all of them came
    """

    def __init__(self, device: str = "cpu", timeout: float = 300.0):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        self._timeout = timeout
        self._marks: deque[torch.cuda.Event] = deque()
        self._host_group: dist.ProcessGroup | None = None
        if self.count == 1:
            return
        self._local_rank = int(os.environ["LOCAL_RANK"])
        if device == "cuda":
            if self._local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"device must be one GPU a process, got {torch.cuda.device_count()} GPUs for "
                    f"{os.environ['LOCAL_WORLD_SIZE']} processes"
                )
            self.device = torch.device("cuda", self._local_rank)
            torch.cuda.set_device(self.device)
        with _lost_is_named():
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup)  # all processes are members
        self._host_group = group

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over the processes, in place; a CUDA graph can capture it."""
        if self.count > 1:
            all_reduce(tensor)

    def spread(self, tensor: Tensor) -> None:
        """Give all processes the values that the first one has."""
        if self.count > 1:
            with _lost_is_named():
                dist.broadcast(tensor, src=0)

    def tell(self, value: Any) -> Any:
        """What the first process gives, anything that pickles; the others' values are dropped."""
        if self.count == 1:
            return value
        told = [value]
        with _lost_is_named():
            dist.broadcast_object_list(told, src=0, group=self._host_group)
        return told[0]

    def any(self, wish: bool) -> bool:
        """Whether one of the processes says so; waits for all of them."""
        if self.count == 1:
            return wish
        flag = torch.tensor(int(wish), dtype=torch.int32)
        with _lost_is_named():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._host_group)
        return bool(flag)

    @contextlib.contextmanager
    def first_here_first(self) -> Iterator[None]:
        """The first process of each machine does the work first, such as a download."""
        if self.count == 1:
            yield
            return
        if self._local_rank > 0:
            self.any(False)
        yield
        if self._local_rank == 0:
            self.any(False)

    def mark(self) -> None:
        """Have ``wait`` take the end of the device work launched so far for progress."""
        if self._waits_with_limit():
            while self._marks and self._marks[0].query():
                self._marks.popleft()
            self._marks.append(self._event())

    def wait(self, event: torch.cuda.Event | None = None) -> None:
        """Wait for an event; without one, for all device work launched so far.

        Nothing but the device sees a sum in a replayed CUDA graph, and it waits for ever for a
        process that is gone. So with several processes the host polls, and the timeout holds for
        the work between two marks, however much of it was launched ahead.

        Raises:
            ProcessLostError: the device has not come from one mark to the next within the timeout
        """
        if not self._waits_with_limit():
            if event is not None:
                event.synchronize()
            return
        event = event or self._event()
        until = time.monotonic() + self._timeout
        while not event.query():
            if self._marks and self._marks[0].query():
                self._marks.popleft()
                until = time.monotonic() + self._timeout
            elif time.monotonic() > until:
                raise _lost(f"the GPU has waited for it for {self._timeout:g} s")
            else:
                time.sleep(_POLL_SECONDS)

    def _waits_with_limit(self) -> bool:
        return self.count > 1 and self.device.type == "cuda"

    def _event(self) -> torch.cuda.Event:
        """An event at the end of what was launched so far."""
        event = torch.cuda.Event()
        event.record()
        return event

    def leave(self, failed: bool = False) -> None:
        """End the exchange. No captured graph that holds one may be left: NCCL waits for them.

        Args:
            failed: whether the others may not know that this process ends. Then its connections
                are cut, by which they notice, and nothing is waited for

        Raises:
            ProcessLostError: the device waits for a process that is gone, unless ``failed``
        """
        if self.count == 1:
            return
        self._host_group = None
        if failed:
            # to destroy a group properly all of its processes have to take part
            with contextlib.suppress(RuntimeError, ValueError):
                dist.distributed_c10d._abort_process_group()
            return
        self.wait()
        dist.destroy_process_group()


def all_reduce(tensor: Tensor) -> None:
    """Sum a tensor over all processes, in place; ProcessLostError if one does not answer.

    An error during the capture of a CUDA graph is raised as it is: nothing is sent then.
    """
    with _lost_is_named():
        dist.all_reduce(tensor)


@contextlib.contextmanager
def _lost_is_named() -> Iterator[None]:
    """Rename what the back ends raise, each its own, when a process is gone or silent.

    Any other error is this process's own, such as memory that runs out.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_communication(error) or _is_capturing():
            raise
        raise _lost(first_line(error)) from None


def _lost(reason: str) -> ProcessLostError:
    return ProcessLostError(
        f"another process of the run has stopped or does not answer ({reason})"
    )


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether NCCL, the store or gloo raised it; gloo has no class of its own for its errors."""
    return isinstance(error, dist.DistError) or any(part in str(error) for part in _OF_GLOO)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
