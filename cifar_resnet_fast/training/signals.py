"""Ctrl-C, SIGTERM and SIGHUP as requests to stop between two steps (layer 4)."""

import signal
import threading


class Wish:
    """Whether a training should stop between two steps."""

    wished = False


class StopRequest(Wish):
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop between two steps.

    Args:
        patient: whether a second one has no further effect; torchrun forwards each one that the
            terminal has already sent to every process
    """

    def __init__(self, patient: bool):
        self._patient = patient

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return (
                self  # signals reach the main thread alone, and only that thread may handle them
            )
        self._before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.wished and not self._patient:
            raise KeyboardInterrupt  # a second signal stops at once, and the running epoch is lost
        self.wished = True
