"""Several trainings at once on one device, each in its folder (layer 4).

The networks step side by side: on a GPU as branches of one captured graph, with one launch per
step; elsewhere in turn. All of them read one data set in memory. Each has its own draws, schedule,
metrics, checkpoints and folder, and ends bitwise as in a run of its own, so each folder is that of
an ordinary run.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence

from cifar_resnet_fast.errors import first_line, is_out_of_memory
from cifar_resnet_fast.training.capture import CudaGraphs, capture_for
from cifar_resnet_fast.training.engine import EngineGroup
from cifar_resnet_fast.training.logbook import Logbook, SilentLogbook, read_metrics
from cifar_resnet_fast.training.memory import (
    BatchTooLargeError,
    batch_must_fit,
    networks_that_fit,
)
from cifar_resnet_fast.training.run import Run, RunStopped
from cifar_resnet_fast.training.signals import StopRequest, Wish


def number_at_once(wanted: str, first: Run, runs: int) -> int:
    """The number of networks that train at the same time; prints it and the number that fits.

    Args:
        wanted: a number or ``auto``
        first: the first run, already in memory
        runs: the number of runs

    Raises:
        ValueError: that many networks do not fit
        BatchTooLargeError: not even one does
    """
    if first.processes.device.type != "cuda":
        count = 1 if wanted == "auto" else int(wanted)
        turns = "one network at a time" if count == 1 else f"{count} networks step in turn"
        print(f"{turns}: on a CPU, training at once takes as long as one after the other")
        return count
    with batch_must_fit(first.config.batch_size, first.processes, first.engine):
        planned = first.engine.planned_bytes(first.data.training.part_size)
    fit = max(networks_that_fit(*planned), 1)
    count = min(fit, runs) if wanted == "auto" else int(wanted)
    if count > fit:
        raise ValueError(
            f"at_once must be at most {fit}, as many networks as fit into the GPU's memory, "
            f"got {count}"
        )
    print(f"{count} of {runs} networks at once; {fit} fit into the GPU's memory")
    return count


class RunGroup:
    """Runs that train at the same time.

    Args:
        runs: in one process, of the same shapes

    Attributes:
        failures: by place in ``runs``, why a network with non-finite loss or weights stopped
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self.failures: dict[int, str] = {}

    def train(self) -> list[list[dict]]:
        """Train all of them to the end; returns the rows of each metrics.jsonl.

        Raises:
            RunStopped: the user stopped them; the checkpoints are written
            BatchTooLargeError: the networks do not fit into memory after all
            OSError: a file cannot be written
        """
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest(patient=False))
            logbooks = [run.logbook(label=run.folder.name) for run in self.runs]
            for logbook in logbooks:
                stack.enter_context(logbook)
            stack.enter_context(self._graphs_dropped())
            stack.enter_context(_must_fit(len(self.runs)))
            stopped = self._steps(logbooks, stop)
        if stopped:
            raise RunStopped(
                f"stopped {stopped} of {len(self.runs)} networks, each with its checkpoint"
            )
        return [logbook.rows for logbook in logbooks]

    def _steps(self, logbooks: Sequence[Logbook | SilentLogbook], stop: Wish) -> int:
        """All steps of all networks; returns how many of them the user has stopped."""
        wish = Wish()  # the value at the start of a step, so that it is the same for all networks
        capture = capture_for(self.runs[0].processes.device)
        courses = {place: run.course(logbooks[place], wish) for place, run in enumerate(self.runs)}
        stopped = 0
        group: EngineGroup | None = None
        while courses:
            wish.wished = stop.wished
            number = len(courses)
            for place in list(courses):
                try:
                    next(courses[place])
                    continue
                except StopIteration:
                    pass
                except RunStopped:
                    stopped += 1
                except FloatingPointError as error:
                    self.failures[place] = str(error)
                    logbooks[place].say(str(error))
                del courses[place]
            if group is None or len(courses) < number:
                first = group is None
                if group is not None:
                    group.drop_graphs()
                group = EngineGroup([self.runs[place].engine for place in courses])
                if capture is not None and courses:
                    self._capture(group, capture, list(courses), first)
            if courses:
                group.train_step()
        return stopped

    def _capture(
        self, group: EngineGroup, capture: CudaGraphs, places: list[int], first: bool
    ) -> None:
        """Replay captured steps if possible, and the first time evaluations too."""
        reason = group.capture(capture)
        if reason is not None:
            print(f"steps run one kernel at a time, slower than captured: {reason}")
        elif first:
            for place in places:
                self.runs[place].engine.capture_evaluation(capture)

    @contextlib.contextmanager
    def _graphs_dropped(self) -> Iterator[None]:
        try:
            yield
        finally:
            for run in self.runs:
                run.engine.drop_graphs()


@contextlib.contextmanager
def _must_fit(count: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        traceback.clear_frames(error.__traceback__)  # the frames hold the failed step's tensors
    else:
        return
    raise BatchTooLargeError(f"at_once must be less than {count}, which do not fit: {reason}")


def train_many(
    begin: Sequence[Callable[[contextlib.ExitStack], Run]],
    at_once: str | None,
    bad_input: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[tuple[Run, list[dict], str | None]]:
    """Train several runs, ``at_once`` of them at the same time; yields, in their order, each with
    its rows and the reason of its failure or None.

    Args:
        begin: functions that begin a run; its folder is held until the stack that they receive is
            closed
        at_once: a number or ``auto``; None for one after the other, each with its own display
        bad_input: the context in which the memory is planned

    Raises:
        RunStopped, BatchTooLargeError, OSError: as ``RunGroup.train``
        ValueError: that many networks do not fit
    """
    count: int | None = None
    done = 0
    while done < len(begin):
        with contextlib.ExitStack() as held:
            runs = [begin[done](held)]
            if at_once is None:
                count = 1
            elif count is None:
                with bad_input():
                    count = number_at_once(at_once, runs[0], len(begin))
            runs += [one(held) for one in begin[done + 1 : done + count]]
            done += len(runs)
            if count == 1:
                yield _alone(runs[0])
                continue
            group = RunGroup(runs)
            rows = group.train()
            failures = [group.failures.get(place) for place in range(len(runs))]
            yield from zip(runs, rows, failures, strict=True)


def _alone(run: Run) -> tuple[Run, list[dict], str | None]:
    try:
        return run, run.train(), None
    except FloatingPointError as error:
        return run, read_metrics(run.folder)[0], str(error)
