"""Train, resume, evaluate: ``train(config)`` and ``python -m cifar_resnet_fast.train`` (layer 5).

The module can be called: ``from cifar_resnet_fast import TrainConfig, train`` and
``train(TrainConfig(depth=20))`` is ``train.train``.

torchrun starts several processes, one for each GPU: ``torchrun --nproc-per-node=4 -m
cifar_resnet_fast.train``. They train one network together, and the first one writes the files.

With ``--runs N`` each seed has its own folder, seed-0, seed-1, ..., and with ``--sweep`` each
combination of settings has N of them; summary.json holds means and standard deviations.
``--at-once M`` trains M of them at the same time.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from cifar_resnet_fast import ops
from cifar_resnet_fast.data.datasets import NAMES, Dataset, find_dataset, load_dataset, load_npz
from cifar_resnet_fast.data.loader import Loader
from cifar_resnet_fast.data.test_sets import (
    SEVERITIES,
    is_test_file,
    load_test_sets,
    test_files,
)
from cifar_resnet_fast.errors import MissingPackageError
from cifar_resnet_fast.processes import Processes, ProcessLostError
from cifar_resnet_fast.resnet import FastResNet
from cifar_resnet_fast.training.config import (
    SWEPT,
    TrainConfig,
    flag_of,
    parse_flags,
    with_flag_name,
)
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.training.evaluate import (
    Scores,
    SetScores,
    draw_confusion,
    predict,
    table_of,
    write_predictions,
)
from cifar_resnet_fast.training.folder import hold, is_free
from cifar_resnet_fast.training.logbook import CURVES, check_packages
from cifar_resnet_fast.training.many import train_many
from cifar_resnet_fast.training.memory import BatchTooLargeError
from cifar_resnet_fast.training.run import (
    CHECKPOINT,
    IMAGENET_STATISTICS,
    Run,
    RunData,
    RunStopped,
    write_json,
)
from cifar_resnet_fast.training.summary import summarize
from cifar_resnet_fast.weights.pretrained import find_weights, read_weights

# settings that a command line may change with --resume: places, devices and displays
_FREE_ON_RESUME = {
    "resume",
    "data_root",
    "data_url",
    "device",
    "tensorboard",
    "timeout",
    "epochs",
    "profile",
    "no_selfcheck",
    "at_once",
}

# settings in which the configs of a list may differ
MAY_DIFFER = {*SWEPT, "seed", "milestones", "recipe", "out", "resume", "tensorboard"}

# settings that --eval uses: the data, the device and the numerics, and the files that it writes
_WITH_EVAL = {
    "eval",
    "dataset",
    "data_root",
    "data_url",
    "normalization",
    "mean",
    "std",
    "limit",
    "depth",
    "batch_size",
    "tta",
    "dtype",
    "device",
    "implementation",
    "timeout",
    "predictions",
    "confusion",
    "no_selfcheck",
}

_SPEAKS_AFTER_SECONDS = 20.0  # torchrun ends the other processes long before that
_FP16_LOSS_SCALE = 1024.0  # a mean over 1024 images then has the gradients of their sum


@dataclass(frozen=True)
class Result:
    """The result of a training.

    model: the network in evaluation mode, with its card; the averaged one if the run averages
    metrics: the rows of metrics.jsonl, one for each epoch
    accuracy: accuracy after the last epoch that was evaluated, 0 .. 1; None if none was
    folder: the run's folder
    failure: why one of several runs has stopped, if its loss or its weights were not finite;
        otherwise None
    """

    model: FastResNet
    metrics: list[dict]
    accuracy: float | None
    folder: Path
    failure: str | None = None


def train(
    config: TrainConfig | Sequence[TrainConfig],
    *,
    dataset: Dataset | None = None,
    on_epoch: Callable[[dict], object] | None = None,
    at_once: int | str | None = None,
) -> Result | list[Result]:
    """Train as ``python -m cifar_resnet_fast.train`` does, and return the network.

    Several runs, either of a config with ``runs`` or ``sweep`` or of a list of configs, return a
    list of results; a run whose loss is not finite stops alone.

    Seeds PyTorch's generators with ``config.seed``. In the main thread Ctrl-C and SIGTERM stop the
    run between two steps.

    Args:
        config: with ``resume``, only settings that the command line may change then. Each config
            of a list is one run, with its own folder as ``out`` or ``resume``, and they differ
            only in ``MAY_DIFFER``
        dataset: the data set to train on, instead of ``config.dataset``
        on_epoch: called with each epoch's row of metrics.jsonl; if it returns a true value, the
            run ends after this epoch. ``train`` raises its errors. Not with several runs
        at_once: how many of several runs train at the same time: a number, or ``auto`` for as
            many as fit into the GPU's memory. Without it, they train one after the other

    Raises:
        ValueError, OSError: bad input, or a file that cannot be written
        MissingPackageError: of the extra ``train``
        BatchTooLargeError, FloatingPointError, ProcessLostError: as ``Run.train``
        KeyboardInterrupt: the user stopped the run, whose checkpoint is written
    """
    configs = [config] if isinstance(config, TrainConfig) else list(config)
    if not configs:
        raise ValueError("config must be at least one config, got an empty list")
    if at_once is not None:
        configs[0] = replace(configs[0], at_once=str(at_once))
    together = configs[0].at_once
    for one in configs:
        for name in ("eval", "config"):
            if getattr(one, name) is not None:
                raise ValueError(
                    f"{name} must be left to the command line, got {getattr(one, name)}"
                )
        if one.resume and one.out:
            raise ValueError(f"out must be left out with resume, got {one.out}")
        if one.several and not isinstance(config, TrainConfig):
            raise ValueError(f"config must be of one run each in a list, got {one.runs} runs")
    processes = Processes(_device_name(configs[0]), configs[0].timeout)
    with contextlib.ExitStack() as held:  # the runs' folders, held by the first process
        jobs: list[_Job] = []
        try:
            if not isinstance(config, TrainConfig):
                configs[0].check_at_once(len(configs), processes.count)
                configs[0] = replace(configs[0], at_once=None)
            for one in configs:
                beside = jobs[0] if jobs else None
                jobs.append(_prepared(one, _given(one), processes, held, dataset, beside))
            if isinstance(config, TrainConfig) and not jobs[0].config.several:
                return _train(jobs[0], on_epoch)
            if on_epoch is not None:
                raise ValueError("on_epoch must be left out with several runs")
            if not isinstance(config, TrainConfig):
                return _train_list(jobs, together)
            results = _train_several(jobs[0])
            if processes.rank == 0:
                summarize(jobs[0].folder, jobs[0].config, _scores(results))
            return results
        except RunStopped as stopped:
            raise KeyboardInterrupt(str(stopped)) from None
        except (ValueError, OSError):  # a batch that is too large among them
            if processes.rank == 0:
                held.close()
                for job in jobs:
                    _give_back(job.folder)
            raise


def _given(config: TrainConfig) -> dict:
    """The settings that differ from the defaults."""
    defaults = TrainConfig()
    names = (item.name for item in fields(config))
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(defaults, n)}


def _scores(results: list[Result]) -> list[float | None]:
    """The accuracies, with None for a run that has failed."""
    return [None if r.failure is not None else r.accuracy for r in results]


def main(arguments: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        exit status: 0 done, 1 failed on the way, 2 bad input, 130 stopped by the user
    """
    held = contextlib.ExitStack()  # the run's folder, held by the first process
    try:
        with _bad_input_exits():
            config, given = parse_flags(arguments)
            if config.eval is not None:
                return _evaluate(config.eval, config, given)
            processes = Processes(_device_name(config), config.timeout)
            job = _prepared(config, given, processes, held)
        if not job.config.several:
            result = _train(job, bad_input=_bad_input_exits)
            if processes.rank == 0:
                print("\n".join(_afterwards(result.folder, job.config, processes.count)))
            return 0
        results = _train_several(job, bad_input=_bad_input_exits)
        if processes.rank == 0:
            summarize(job.folder, job.config, _scores(results))
        failures = [f"{r.folder}: {r.failure}" for r in results if r.failure is not None]
        if failures:
            _print_error("; ".join(failures))
            return 1
    except RunStopped as stopped:
        if processes.rank == 0:
            print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted; files that were written before are complete", file=sys.stderr)
        return 130
    except ProcessLostError as error:
        _print_error(f"{error}; files that were written before are complete")
        return 1
    except BatchTooLargeError as error:
        _print_error(with_flag_name(str(error)))
        if processes.rank == 0:
            held.close()
            _give_back(job.folder)
        return 2
    except FloatingPointError as error:
        _print_error(str(error))
        return 1
    except OSError as error:
        _print_error(f"{error}; to continue once there is room: {flag_of('resume')} {job.folder}")
        return 1
    finally:
        held.close()
    return 0


def _afterwards(folder: Path, config: TrainConfig, processes: int) -> list[str]:
    """What the run in ``folder`` has left, and the three commands that a user tries next, as they
    can be copied into a shell."""
    python = shlex.quote(_shortest(sys.executable))
    where, checkpoint = (shlex.quote(str(path)) for path in (folder, folder / CHECKPOINT))
    data = ""
    if config.data_root != str(Path(TrainConfig().data_root).absolute()):
        data += f" {flag_of('data_root')} {shlex.quote(_shortest(config.data_root))}"
    if config.limit is not None:
        data += f" {flag_of('limit')} {config.limit}"
    evaluate = f"{flag_of('eval')} {checkpoint}{data}"
    further = f"{flag_of('resume')} {where} {flag_of('epochs')} {2 * config.epochs}"
    commands = {"accuracy by class": f"{python} -m cifar_resnet_fast.train {evaluate}"}
    if _why_not_longer(config) is None and processes == 1:
        commands["train on"] = f"{python} -m cifar_resnet_fast.train {further}"
    else:
        commands["use in Python"] = f"FastResNet.from_pretrained({str(folder)!r})"
    commands["to ONNX"] = f"{python} -m cifar_resnet_fast.export {checkpoint} --to onnx"
    return [
        f"curves: {folder / CURVES}",
        f"checkpoint: {folder / CHECKPOINT}",
        "what you can do next:",
        *(f"  {purpose + ':':18} {command}" for purpose, command in commands.items()),
    ]


def _shortest(path: str) -> str:
    """``path`` as it is reached from the working folder, if it lies within."""
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _print_error(message: str) -> None:
    """Print one line on stderr. Of several processes the first one prints for all, and another one
    prints only if it does not end with the first."""
    rank, error_file = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if rank != "0":
        time.sleep(_SPEAKS_AFTER_SECONDS)
    # a name from a file can contain control characters
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"error: {message}")
    print(line, file=sys.stderr, flush=True)
    if error_file:  # torchrun shows its content at the end of its own traceback
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps({"message": line}))


@contextlib.contextmanager
def _bad_input_exits():
    """An error that the user's input caused is one line on stderr and exit status 2."""
    try:
        yield
    except (ValueError, OSError, MissingPackageError) as error:
        _print_error(with_flag_name(str(error)))
        raise SystemExit(2) from None


# --- before a run ------------------------------------------------------------------------------


class _Job(NamedTuple):
    """The arguments of one or several runs; see ``Run``."""

    config: TrainConfig
    folder: Path
    data: RunData
    processes: Processes


def _train(
    job: _Job,
    on_epoch: Callable[[dict], object] | None = None,
    bad_input: Callable[[], AbstractContextManager] = nullcontext,
) -> Result:
    """The one run of a job; ``bad_input`` is the context of everything but the training."""
    with _parting(job.processes):
        with bad_input():
            run = Run(job.config, job.folder, job.data, job.processes)
        rows = run.train(on_epoch)
        return Result(run.trained, rows, run.accuracy, job.folder)


def _train_several(
    job: _Job, bad_input: Callable[[], AbstractContextManager] = nullcontext
) -> list[Result]:
    """The runs of a job of several, each in a folder within the job's; see ``_train``."""

    def begin(held: contextlib.ExitStack, name: str, config: TrainConfig) -> Run:
        with bad_input():
            place = job.folder / name
            if job.processes.rank == 0:
                place.mkdir(exist_ok=True)
                held.enter_context(hold(place))
            return Run(config, place, job.data.sharing(config), job.processes)

    members = job.config.members().items()
    advice = f"; to continue: {flag_of('resume')} {job.folder}"
    begins = [partial(begin, name=name, config=config) for name, config in members]
    return _results(begins, job.config.at_once, job.processes, advice, bad_input)


def _train_list(jobs: list[_Job], at_once: str | None) -> list[Result]:
    """One run of each job, whose folders are held already."""

    def begin(held: contextlib.ExitStack, job: _Job) -> Run:
        return Run(job.config, job.folder, job.data, job.processes)

    begins = [partial(begin, job=job) for job in jobs]
    return _results(begins, at_once, jobs[0].processes, "", nullcontext)


def _results(
    begins: Sequence[Callable[[contextlib.ExitStack], Run]],
    at_once: str | None,
    processes: Processes,
    advice: str,
    bad_input: Callable[[], AbstractContextManager],
) -> list[Result]:
    results = []
    with _parting(processes):
        try:
            for run, rows, failure in train_many(begins, at_once, bad_input):
                results.append(Result(run.trained, rows, run.accuracy, run.folder, failure))
        except RunStopped as stopped:
            raise RunStopped(f"{stopped}{advice}") from None
    return results


@contextlib.contextmanager
def _parting(processes: Processes) -> Iterator[None]:
    """Context of runs, after which the processes part, whether they have all ended alike or not.
    They have agreed on a stop by the user."""
    failed = True
    try:
        yield
        failed = False
    except RunStopped:
        failed = False
        raise
    finally:
        processes.leave(failed)


def _prepared(
    config: TrainConfig,
    given: dict,
    processes: Processes,
    held: contextlib.ExitStack,
    dataset: Dataset | None = None,
    beside: _Job | None = None,
) -> _Job:
    """The settings, the folder and the data of a run. The first process determines them for all,
    and holds the folder until ``held`` is closed. A run ``beside`` another one shares its
    images."""
    check_packages("rich", "matplotlib", *["tensorboard"] * config.tensorboard)
    folder = None
    if dataset is not None and not config.resume:
        config = replace(config, dataset=dataset.name)
    if processes.rank == 0:
        if config.resume:
            folder = Path(config.resume)
            config = _resumed(folder, given, held)
        else:
            config = _resolved(config, given, processes, named=dataset is None)
    config, folder = processes.tell((config, folder))
    runs = config.runs * len(config.settings())
    if config.at_once is not None and not config.several:
        raise ValueError(
            f"at_once must be left out without {flag_of('runs')} or {flag_of('sweep')}, "
            f"got {config.at_once}"
        )
    config.check_at_once(runs, processes.count)
    if beside is None:
        _verify_kernels(config, processes)
        with processes.first_here_first():
            if dataset is None:
                dataset = load_dataset(
                    config.dataset, config.data_root, config.limit, config.data_url
                )
            elif config.limit is not None:
                dataset = dataset.limited(config.limit)
        data = RunData(config, dataset, processes)
    else:
        _check_alike(config, beside.config)
        data = beside.data.sharing(config)
    if processes.rank == 0:
        if folder is None:
            folder = _claim_folder(config, held)
        elif "epochs" in given:
            write_json(folder / "config.json", config.to_dict())
    return _Job(config, processes.tell(folder), data, processes)


def _check_alike(config: TrainConfig, first: TrainConfig) -> None:
    """Check that a config of a list can train beside the first one."""
    for item in fields(config):
        ours, theirs = getattr(config, item.name), getattr(first, item.name)
        if item.name not in MAY_DIFFER and ours != theirs:
            raise ValueError(
                f"{item.name} must be the same in all configs of a list, got {theirs} and {ours}"
            )


def _verify_kernels(config: TrainConfig, processes: Processes) -> None:
    """Check the kernels of a run before the first one with a card, a driver and a build.

    The processes agree on the kernels that are not trusted, so that all train alike.

    Raises:
        ValueError: the requested implementation has failed
    """
    if config.no_selfcheck or processes.device.type != "cuda":
        return
    # needed only on a GPU
    from cifar_resnet_fast.verification.first_run import operations_of_run, verify_run

    plain = config.sync_bn and processes.count > 1
    implementation = "reference" if plain else config.implementation
    network = "trunk" if config.shortcut == "A" else "conv_bn_relu"
    with processes.first_here_first():
        own = verify_run(implementation, _dtype(config), processes.device, network, config.width)
    for operation in operations_of_run(network):
        for name in ops.OPERATIONS[operation][:-1]:
            failed = (operation, name) in own
            if processes.any(failed) and not failed:
                ops.distrust(name, operation, "its check failed in another process")


def _resolved(config: TrainConfig, given: dict, processes: Processes, named: bool) -> TrainConfig:
    """The settings with ``auto`` and relative paths resolved, so that a resume keeps them.

    Args:
        named: whether the data set is given by ``config.dataset``
    """
    if config.batch_size_per_process is not None:
        if "batch_size" in given:
            raise ValueError(
                f"batch_size must be left out if {flag_of('batch_size_per_process')} is given, "
                f"got {config.batch_size}"
            )
        whole = config.batch_size_per_process * processes.count
        config = replace(config, batch_size=whole, batch_size_per_process=None)
    if config.out is not None:
        _check_free(Path(config.out))
    if not named:
        return _with_precision(config)
    dataset, reason = find_dataset(config.dataset, config.data_root, config.data_url)
    if reason is not None:
        print(f"Training on drawn shapes instead of CIFAR-10: {reason}")
    if dataset not in NAMES and Path(dataset).exists():
        dataset = str(Path(dataset).absolute())  # a resume then finds it from any folder
    root = str(Path(config.data_root).absolute())
    return _with_precision(replace(config, dataset=dataset, data_root=root))


def _resumed(folder: Path, given: dict, held: contextlib.ExitStack) -> TrainConfig:
    """The settings with which the stopped run in ``folder`` began."""
    path = folder / "config.json"
    if not path.is_file():
        begin = f"; to begin a run there: {flag_of('out')} {folder}" * is_free(folder)
        raise ValueError(f"resume must name the folder of a run, found no {path}{begin}")
    held.enter_context(hold(folder))
    try:
        values = json.loads(path.read_text())
        begun = TrainConfig.from_dict(values)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"resume: {path} is damaged: {error}") from None
    for name, value in given.items():
        if name not in _FREE_ON_RESUME and value != getattr(begun, name):
            raise ValueError(
                f"{name} must be left out or be the resumed run's {getattr(begun, name)}, "
                f"got {value}"
            )
    if given.get("epochs", begun.epochs) < begun.epochs:
        raise ValueError(
            f"epochs must be at least the resumed run's {begun.epochs}, got {given['epochs']}"
        )
    bound = _why_not_longer(begun)
    if given.get("epochs", begun.epochs) > begun.epochs and bound is not None:
        raise ValueError(
            f"epochs must be left out or be the resumed run's {begun.epochs}, to which its "
            f"{bound} is fitted, got {given['epochs']}"
        )
    free = {name: given[name] for name in _FREE_ON_RESUME & given.keys()}
    return _with_precision(replace(begun, **free))


def _why_not_longer(config: TrainConfig) -> str | None:
    """The setting that is fitted to the number of epochs, if there is one: such a run cannot be
    resumed with more of them."""
    if config.schedule != "step":
        return f"schedule {config.schedule}"
    if config.unmixed_epochs:
        return f"{flag_of('unmixed_epochs')} {config.unmixed_epochs}"
    return None


def _check_free(folder: Path) -> None:
    """Raise ValueError unless ``folder`` is new or empty."""
    if not is_free(folder):
        raise ValueError(
            f"out must be a new or an empty folder, got {folder}, which is not empty; "
            f"to continue a run there: {flag_of('resume')} {folder}"
        )


def _claim_folder(config: TrainConfig, held: contextlib.ExitStack) -> Path:
    """Create the run's folder with its config.json, and hold it."""
    started = time.strftime("%Y%m%d-%H%M%S")
    default = f"runs/{Path(config.dataset).stem}-resnet{config.depth}-{started}"
    folder = Path(config.out or default)
    while config.out is None and folder.exists():  # another run of the same second
        name, _, count = folder.name.partition("--")
        folder = folder.with_name(f"{name}--{int(count or 1) + 1}")
    _check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=config.out is not None)
        held.enter_context(hold(folder))
        _check_free(folder)  # another process may have used it meanwhile
        write_json(folder / "config.json", config.to_dict())
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written: {error}") from None
    return folder


def _give_back(folder: Path) -> None:
    """Remove a run's folder if nothing was trained in it yet."""
    metrics = folder / "metrics.jsonl"
    if {path.name for path in folder.iterdir()} <= {"config.json", metrics.name}:
        for name in ("config.json", metrics.name):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _device_name(config: TrainConfig) -> str:
    """``cpu`` or ``cuda``; ValueError if the requested implementation cannot run there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto if PyTorch finds no GPU, got cuda")
    device = torch.device(name)
    if config.implementation != "auto":
        reason = ops.why_not(config.implementation, device, "trunk")
        if reason is not None:
            raise ValueError(
                f"implementation must be one that can run here, got "
                f"{config.implementation}: {reason}"
            )
    return name


def _with_precision(config: TrainConfig) -> TrainConfig:
    dtype = _dtype(config)
    scale = config.loss_scale or (_FP16_LOSS_SCALE if dtype == "fp16" else 1.0)
    return replace(config, dtype=dtype, loss_scale=scale)


def _dtype(config: TrainConfig) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "fp16" if _device_name(config) == "cuda" else "fp32"


def _evaluate(checkpoint: str, config: TrainConfig, given: dict) -> int:
    """Score a checkpoint of this package or a published one on the test set."""
    if config.confusion is not None:
        check_packages("matplotlib")
    weights = read_weights(find_weights(checkpoint))
    card = weights.card
    if given.get("depth", weights.depth) != weights.depth:
        raise ValueError(
            f"depth must be left out or be the checkpoint's {weights.depth}, got {config.depth}"
        )
    network = {name: value for name, value in weights.network.items() if name != "num_classes"}
    name = config.dataset
    if name == "auto":
        name = card.get("dataset") or "cifar10"  # a published checkpoint names none
    for other in given.keys() - _WITH_EVAL:
        raise ValueError(f"{other} must be left out with {flag_of('eval')}, got {given[other]}")
    config = replace(config, **network)
    folder = Path(str(name))
    several = name not in NAMES and bool(test_files(folder))
    for other in ("predictions", "confusion") if several else ():
        if other in given:
            raise ValueError(
                f"{other} must be left out with a folder of test sets, got {given[other]}"
            )
    names = card.get("class_names")
    if not isinstance(names, list) or len(names) != weights.num_classes:
        names = range(weights.num_classes)
    classes, alone = tuple(map(str, names)), several or is_test_file(folder)
    statistics = _statistics(checkpoint, config, given, card)
    if statistics is None:
        if alone:
            raise ValueError(
                f"mean must be given with {flag_of('std')}, as {name} has no training images and "
                f"{checkpoint} does not say what its images were normalised with"
            )
        dataset = load_dataset(str(name), config.data_root, data_url=config.data_url)
        statistics = dataset.channel_statistics()  # of all images, even with --limit
    elif alone and not several:
        dataset = load_npz(folder, ("test",), classes)
    elif not several:
        dataset = load_dataset(str(name), config.data_root, config.limit, config.data_url)
    if config.limit is not None and not several:
        dataset = dataset.limited(config.limit)
    processes = Processes(_device_name(config))
    if processes.count > 1:
        raise ValueError(f"eval must be run by one process, not by {processes.count}")
    device = processes.device
    _verify_kernels(config, processes)
    model = FastResNet.from_pretrained(checkpoint, config.implementation)
    model.to(device).to(memory_format=torch.channels_last)
    dtype = DTYPES[_dtype(config)]
    mean, std = statistics

    def predicted(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if len(dataset.classes) != weights.num_classes:
            raise ValueError(
                f"dataset must have the checkpoint's {weights.num_classes} classes, "
                f"{dataset.name} has {len(dataset.classes)}"
            )
        loader = Loader(
            dataset.x_test,
            dataset.y_test,
            mean,
            std,
            batch_size=min(config.batch_size, len(dataset.x_test)),
            device=device,
            dtype=dtype,
            augmented=False,
        )
        return predict(model, loader, device=device, dtype=dtype, mirrored=config.tta == "flip")

    if several:
        print(
            f"ResNet-{model.depth} on the test sets in {folder}, in % (ECE: expected calibration "
            f"error; 1 to {SEVERITIES}: top-1 by severity); {checkpoint}"
        )
        sets = load_test_sets(folder, classes, config.limit)
        for line in table_of(SetScores.of(s.name, *predicted(s), parts) for s, parts in sets):
            print(line)
        return 0
    logits, labels, both = predicted(dataset)
    scores = Scores.of(logits, labels)
    flip = ""
    if both is not None:
        flip = f" ({100 * Scores.of(both, labels).top1:.2f} % with mirror images)"
    print(
        f"ResNet-{model.depth} on {dataset.name}: test accuracy {100 * scores.top1:.2f} %{flip}, "
        f"loss {scores.loss:.4f}, {len(labels)} images; {checkpoint}"
    )
    print(
        f"top-5 accuracy {100 * scores.top5:.2f} %, "
        f"expected calibration error {100 * scores.calibration_error:.2f} %"
    )
    for name, share in zip(dataset.classes, scores.by_class(), strict=True):
        print(f"  {name}: {'no image' if share is None else f'{100 * share:.2f} %'}")
    if config.predictions is not None:
        write_predictions(Path(config.predictions), logits, labels, dataset.classes)
    if config.confusion is not None:
        title = f"ResNet-{model.depth} on {dataset.name}, {100 * scores.top1:.2f} %"
        draw_confusion(Path(config.confusion), scores.confusion, dataset.classes, title)
    return 0


def _statistics(
    checkpoint: str, config: TrainConfig, given: dict, card: dict
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation for the normalisation of images, from the flags or from the
    checkpoint; None if those of the training images apply."""
    if (config.mean is None) != (config.std is None):
        missing = "std" if config.std is None else "mean"
        raise ValueError(f"{missing} must be given, because the other one of mean and std is")
    if config.mean is not None and config.std is not None:
        return _from_flag("mean", config.mean), _from_flag("std", config.std)
    if "normalization" not in given and "mean" in card:
        mean, std = (_three_numbers(card, key, checkpoint) for key in ("mean", "std"))
        return mean, std
    return IMAGENET_STATISTICS if config.normalization == "imagenet" else None


def _from_flag(name: str, text: str) -> torch.Tensor:
    """[3] float32, from three numbers with commas between them."""
    try:
        values = torch.tensor([float(part) for part in text.split(",")])
    except ValueError:
        values = torch.empty(0)
    if values.shape != (3,) or not values.isfinite().all() or (name == "std" and min(values) <= 0):
        rule = "three numbers more than 0" if name == "std" else "three numbers"
        raise ValueError(f"{name} must be {rule}, with commas between them, got {text!r}")
    return values


def _three_numbers(content: dict, key: str, path: str) -> torch.Tensor:
    """[3] float32, a statistic of the channels from a checkpoint."""
    values = content.get(key)
    if not isinstance(values, list) or [type(value) for value in values] != [float] * 3:
        raise ValueError(f"eval: checkpoint {path} must have three numbers as its {key}")
    if not all(math.isfinite(value) and (key == "mean" or value > 0) for value in values):
        rule = "finite numbers" + (" above 0" if key == "std" else "")
        raise ValueError(f"eval: checkpoint {path} must have {rule} as its {key}, got {values}")
    return torch.tensor(values)


class _CallableModule(types.ModuleType):
    """Makes this module callable, since it has the same name as its function ``train``."""

    def __call__(self, *arguments, **settings) -> Result | list[Result]:
        return train(*arguments, **settings)


sys.modules[__name__].__class__ = _CallableModule


def _command_line() -> None:
    """Run ``main``, with only its own errors on stderr, and end the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see __init__.py
    warnings.simplefilter("ignore")  # main reports these problems itself
    warnings.filterwarnings("default", message="checkpoint ")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    status = 130
    with contextlib.suppress(KeyboardInterrupt):
        status = main()
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # after a second signal nothing is left to interrupt
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


if __name__ == "__main__":
    _command_line()
