"""Ctrl-C, SIGTERM and SIGHUP as a wish to stop between two steps (layer 4)."""

import signal
import threading


class Wish:
    """Whether a training is to stop between two steps."""

    wished = False


class StopRequest(Wish):
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a wish that the loop sees between two steps.

    Args:
        patient: whether a second one does no more; torchrun passes each on that the terminal has
            already sent to every process
    """

    def __init__(self, patient: bool):
        self._patient = patient

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # signals reach the main thread alone, and only it may handle them
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
            raise KeyboardInterrupt  # asked twice: at once, at the price of the running epoch
        self.wished = True
