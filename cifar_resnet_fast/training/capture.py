"""Device work that is recorded once and then repeated with one launch (layer 2)."""

from collections.abc import Callable, Sequence

import torch


class CudaGraphs:
    """Captures functions as CUDA graphs, which share their memory: replay one at a time.

    A captured function must read its inputs from tensors that stay where they are, write its
    results into such tensors, and read nothing from the device: no ``item``, no shape that depends
    on values.
    """

    def __init__(self):
        self._pool = None

    def __call__(
        self, function: Callable[[], None], warm_up: Callable[[], None], times: int = 3
    ) -> Callable[[], None]:
        """Run ``warm_up``, then capture ``function`` without running it.

        Args:
            function: device work
            warm_up: the same work, so that libraries and compilers are set up outside of the
                capture; it changes the same tensors as ``function``
            times: number of times that ``warm_up`` runs

        Returns:
            a function that repeats ``function``

        Raises:
            torch.OutOfMemoryError: the work does not fit into the device's memory
            RuntimeError: ``function`` does what a CUDA graph cannot hold
        """
        # CUDA graphs need another stream than the default one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # a failed capture leaves its stream the current one, which the outer context undoes.
        # thread_local: other threads, such as NCCL's, may go on calling CUDA
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            function()
        self._pool = graph.pool()
        return graph.replay

    def side_by_side(self, functions: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """A function to capture that runs functions at the same time, each on its own stream.

        The streams fork from the current one and join it again. No function reuses memory that
        another one allocates, since each stream has its own memory.

        Args:
            functions: device work; none may write tensors that another one reads or writes
        """
        streams = [torch.cuda.Stream() for _ in functions]

        def run() -> None:
            current = torch.cuda.current_stream()
            forked = current.record_event()
            for stream, function in zip(streams, functions, strict=True):
                stream.wait_event(forked)
                with torch.cuda.stream(stream):
                    function()
            for stream in streams:
                current.wait_stream(stream)

        return run


def capture_for(device: torch.device) -> CudaGraphs | None:
    """The class that captures work on ``device``; None if capturing is impossible there."""
    return CudaGraphs() if device.type == "cuda" else None


class Readback:
    """The values of a device tensor on the host, copied without waiting for the device.

    Args:
        source: a tensor that steps write to
        wait: a function that waits for an event
    """

    def __init__(
        self,
        source: torch.Tensor,
        wait: Callable[[torch.cuda.Event], None] = torch.cuda.Event.synchronize,
    ):
        self._source, self._wait = source, wait
        self._values = torch.empty_like(source, device="cpu")
        self._event = None
        if source.device.type == "cuda":
            self._values = self._values.pin_memory()
            self._event = torch.cuda.Event()

    def ask(self) -> None:
        """Launch a copy of the values, after all device work launched so far."""
        self._values.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def arrived(self) -> bool:
        """Whether the last copy has arrived."""
        return self._event is None or self._event.query()

    def values(self) -> torch.Tensor:
        """The last copy, after waiting for it; the next ``ask`` overwrites it."""
        if self._event is not None:
            self._wait(self._event)
        return self._values
