"""A few steps of a run as a trace for chrome://tracing or Perfetto (layer 4)."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEPS_BEFORE, STEPS = 5, 5  # the first steps still fill caches and raise the clocks


class StepTrace:
    """Records ``STEPS`` steps of a run, after ``STEPS_BEFORE`` others.

    ``before_step`` and ``after_step`` must be called around each step of the run. The trace is
    written after the last recorded step, or at the end of the context if the run ends before.

    Args:
        path: file of the trace
        device: device of the steps

    Attributes:
        written: number of steps in the trace at ``path``; 0 until it is written
    """

    def __init__(self, path: Path, device: torch.device):
        self.path, self.written = path, 0
        self._device = device
        self._entered = self._recorded = 0
        self._profile: profile | None = None

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_) -> None:
        if self._profile is not None:
            self._write(self._profile)

    def before_step(self) -> None:
        """To be called before the launch of a step."""
        if self._entered == STEPS_BEFORE:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                torch.cuda.synchronize(
                    self._device
                )  # otherwise steps launched before would be in it
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        if self._profile is not None:
            self._mark = record_function(f"step {self._recorded + 1} of {STEPS}")
            self._mark.__enter__()
        self._entered += 1

    def after_step(self) -> bool:
        """To be called after the launch of a step; returns whether the trace was written."""
        if self._profile is None:
            return False
        self._mark.__exit__(None, None, None)
        self._recorded += 1
        if self._recorded < STEPS:
            return False
        self._write(self._profile)
        return True

    def _write(self, recorded: profile) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        recorded.stop()
        recorded.export_chrome_trace(str(self.path))
        self._profile, self.written = None, self._recorded
