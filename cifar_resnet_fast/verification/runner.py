"""Checks in processes of their own, so that a crash or a hang costs one check (layer 4).

A worker process (``worker.py``) runs check after check and answers each with a line of JSON. One
that crashes is replaced, and one that does not answer in time is killed and replaced; the check
at hand has failed then, and the others go on.
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from cifar_resnet_fast.verification.checks import Check
from cifar_resnet_fast.verification.verdicts import FAILED

_START_SECONDS = 120.0  # a worker's imports and its CUDA context, on a machine that is busy
CATALOGUE = "cifar_resnet_fast.verification.checks"


@dataclass(frozen=True)
class Outcome:
    """What became of a check.

    verdict: ``ok``, ``failed`` or ``not possible``
    reason: why it is not ``ok``, one line; else what it found, or empty
    seconds: that it took
    data: figures of a check that measures; of an error, its ``traceback``
    """

    name: str
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    data: dict = field(default_factory=dict)

    def line(self) -> str:
        return f"{self.verdict:12} {self.name:44} {self.seconds:5.1f} s  {self.reason}".rstrip()

    def to_dict(self) -> dict:
        return asdict(self)


def run_checks(
    checks: Sequence[Check],
    device: torch.device,
    *,
    jobs: int = 1,
    catalogue: str = CATALOGUE,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run ``checks`` on ``device``; their outcomes in the same order.

    Args:
        checks: of the catalogue
        device: where they run
        jobs: workers at a time
        catalogue: the module whose ``catalogue(device)`` has the checks by name
        report: called with each outcome as it comes, from one thread at a time
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for place, check in enumerate(checks):
        waiting.put((place, check))
    outcomes: dict[int, Outcome] = {}
    lock, errors = threading.Lock(), []
    stop = threading.Event()

    workers = [Worker(catalogue, device) for _ in range(min(jobs, len(checks)))]

    def work(worker: Worker) -> None:
        try:
            while not stop.is_set():
                try:
                    place, check = waiting.get_nowait()
                except queue.Empty:
                    return
                outcome = worker.run(check)
                with lock:
                    outcomes[place] = outcome
                    report(outcome)
        except BaseException as error:
            errors.append(error)
        finally:
            worker.end()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C
        stop.set()
        for worker in workers:
            worker.kill()
        raise
    if errors:
        raise errors[0]
    return [outcomes[place] for place in range(len(checks))]


class Worker:
    """A worker process, started when a check comes, and anew after it was lost."""

    def __init__(self, catalogue: str, device: torch.device):
        self._command = [sys.executable, "-m", "cifar_resnet_fast.verification.worker"]
        self._command += [catalogue, str(device)]
        self._process: subprocess.Popen | None = None

    def run(self, check: Check) -> Outcome:
        """What becomes of ``check``, in at most its limit and the start of a process."""
        began = time.monotonic()
        verdict, reason, data = self._run(check)
        return Outcome(check.name, verdict, reason, round(time.monotonic() - began, 2), data)

    def _run(self, check: Check) -> tuple[str, str, dict]:
        process = self._process
        if process is None:
            process = self._start()
            began = self._answer(_START_SECONDS)
            if not began:
                lost = self._lost(process, began, _START_SECONDS)
                return FAILED, f"its process did not start: {lost}", {}
        with contextlib.suppress(OSError):  # it has ended: the answer below is empty
            print(check.name, file=process.stdin, flush=True)
        answer = self._answer(check.limit)
        if not answer:
            return FAILED, self._lost(process, answer, check.limit), {}
        if answer["last"]:
            self.end()
        return answer["verdict"], answer["reason"], answer["data"]

    def end(self) -> None:
        """Let the process go, with all that it has started."""
        process = self._process
        if process is None:
            return
        self.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        self._answers.close()
        self._errors.close()
        self._process = None

    def kill(self) -> None:
        """End the process, if there is one; what waits for its answer hears that it is gone."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _start(self) -> subprocess.Popen:
        reading, writing = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by end)
        self._answers = os.fdopen(reading, "rb", buffering=0)
        self._received = b""
        try:
            process = subprocess.Popen(
                [*self._command, str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=(writing,),
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        finally:
            os.close(writing)
        self._process = process
        return process

    def _answer(self, seconds: float) -> dict | None:
        """The next line of the worker; empty if it has ended, None after so many seconds."""
        until = time.monotonic() + seconds
        while b"\n" not in self._received:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                return None
            part = self._answers.read(65536)
            if not part:
                return {}
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def _lost(self, process: subprocess.Popen, answer: dict | None, limit: float) -> str:
        """How the worker was lost, which left ``answer``; it is cleared away."""
        if answer is None:
            self.end()
            return f"hung: no answer in {limit:g} s"
        status = process.wait()
        self._errors.seek(0)
        written = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"exit status {status}"
        if status < 0:
            how = signal.Signals(-status).name
        self.end()
        return f"crashed: {how}" + (f" ({written[-1]})" if written else "")
