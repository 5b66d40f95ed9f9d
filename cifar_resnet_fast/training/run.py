"""One training in its folder: begun, stopped, resumed, finished (layer 4).

The folder holds config.json, metrics.jsonl, curves.png and checkpoint.pt. The checkpoint is
written after an epoch, unless the last one is at most ten seconds old, and when the run ends or
stops. It holds everything that the next step depends on, so a run that was stopped at any step and
resumed ends bitwise like one that was not. Its ``state_dict`` holds the evaluated weights, so
``load_checkpoint`` takes the same file.
"""

import contextlib
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_resnet_fast.checkpoint import read_checkpoint, save_checkpoint, write_atomically
from cifar_resnet_fast.data.datasets import Dataset
from cifar_resnet_fast.data.loader import Loader
from cifar_resnet_fast.errors import first_line
from cifar_resnet_fast.processes import Processes
from cifar_resnet_fast.resnet import FastResNet
from cifar_resnet_fast.training.capture import capture_for
from cifar_resnet_fast.training.config import TrainConfig, flag_of
from cifar_resnet_fast.training.engine import DTYPES, Engine
from cifar_resnet_fast.training.logbook import Logbook, SilentLogbook, read_metrics
from cifar_resnet_fast.training.memory import batch_must_fit
from cifar_resnet_fast.training.schedules import learning_rates
from cifar_resnet_fast.training.signals import StopRequest, Wish
from cifar_resnet_fast.training.trace import STEPS_BEFORE, StepTrace

_SHOW_EVERY_SECONDS = 0.2
_SAVE_EVERY_SECONDS = 10.0  # an epoch can take less time than the writing of a checkpoint
_AGREE_EVERY_STEPS = 8
_MOST_STEPS = (
    2**24
)  # a count that float32 holds exactly; the learning rates of so many steps fit into memory
CHECKPOINT, _TRACE = "checkpoint.pt", "trace.json"
IMAGENET_STATISTICS = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


class RunStopped(Exception):
    """The user asked the run to stop; its checkpoint is written."""


class RunData:
    """The two splits as loaders on this process's device, and their description in a checkpoint.

    Args:
        like: data of the same images, whose memory is shared; the draws are not

    Raises:
        ValueError: the batch size, the validation split or the number of epochs does not fit the
            data
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        processes: Processes,
        like: "RunData | None" = None,
    ):
        if config.validation and like is None:
            dataset = dataset.with_validation(config.validation)
        self._dataset, self._processes = dataset, processes
        for name in ("mixup", "cutmix"):
            if getattr(config, name) and (dataset.y_train == dataset.y_train[0]).all():
                raise ValueError(
                    f"{name} must be 0 with training images of one class, got "
                    f"{getattr(config, name)}"
                )
        self.name = dataset.name
        self.num_classes = len(dataset.classes)
        self.evaluated = "validation" if config.validation else "test"
        own = dataset.channel_statistics() if like is None else like._own_statistics
        self._own_statistics: tuple[Tensor, Tensor] = own
        self.mean, self.std = own if config.normalization == "dataset" else IMAGENET_STATISTICS
        settings: dict[str, Any] = {
            "mean": self.mean,
            "std": self.std,
            "dtype": DTYPES[config.dtype],
            "device": processes.device,
            "rank": processes.rank,
            "processes": processes.count,
            "wait": processes.wait,
        }
        training, testing = (dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)
        if like is not None:
            training, testing = like.training.source, like.testing.source
        self.training: Loader = Loader(
            *training,
            batch_size=config.batch_size,
            cutout=config.cutout,
            flip=config.flip,
            crop_padding=config.crop_padding,
            padding_mode=config.padding_mode,
            trivial_augment=config.trivial_augment,
            mixup=config.mixup,
            cutmix=config.cutmix,
            mixed_epochs=config.epochs - config.unmixed_epochs,
            resident=None if like is None else like.training.resident,
            **settings,
        )
        if config.epochs * self.training.steps > _MOST_STEPS:
            raise ValueError(
                f"epochs must be at most {_MOST_STEPS // self.training.steps} at "
                f"{self.training.steps} steps each, got {config.epochs}"
            )
        self.testing: Loader = Loader(
            *testing,
            batch_size=_divided(min(config.batch_size, len(dataset.x_test)), processes.count),
            augmented=False,
            resident=None if like is None else like.testing.resident,
            **settings,
        )
        # enough to recognise on a resume that the images are the same
        self.fingerprint = {
            "train": len(dataset.x_train),
            "test": len(dataset.x_test),
            "classes": list(dataset.classes),
            "statistics": [value for part in own for value in part.tolist()],
        }

    def sharing(self, config: TrainConfig) -> "RunData":
        """The data of a run with other settings beside this one's: the same images in memory, but
        its own draws."""
        return RunData(config, self._dataset, self._processes, like=self)


def _divided(batch_size: int, processes: int) -> int:
    """The largest batch size that can be split, up to the one given."""
    return max(batch_size // processes, 1) * processes


class Run:
    """One training in its folder: a new one, or one continued from the folder's checkpoint.

    Every process has one; that of the first process shows, logs and writes.

    Raises:
        ValueError: the checkpoint is damaged, or of another run or other data; or the run has too
            many steps
    """

    def __init__(self, config: TrainConfig, folder: Path, data: RunData, processes: Processes):
        self.config, self.folder, self.data = config, folder, data
        self.processes = processes
        torch.manual_seed(config.seed)
        model = FastResNet(
            config.depth,
            data.num_classes,
            config.implementation,
            config.zero_init_last,
            shortcut=config.shortcut,
            width=config.width,
        )
        if config.sync_bn and processes.count > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert config.loss_scale is not None  # train.py has replaced None by the default
        steps_per_epoch = data.training.steps
        self._rates = learning_rates(
            config.epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            lr=config.lr,
            schedule=config.schedule,
            warmup_epochs=config.warmup_epochs,
            milestones=config.milestones,
            final_lr=config.final_lr,
        )
        self.engine = Engine(
            model,
            data.training,
            data.testing,
            schedule=self._rates.float(),
            seed=config.seed,
            device=processes.device,
            dtype=DTYPES[config.dtype],
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            decay_vectors=not config.decay_weights_only,
            norm_bias_factor=config.norm_bias_lr_factor,
            muon_rate=config.muon_lr / config.lr if config.optimizer == "muon" else 0.0,
            label_smoothing=config.label_smoothing,
            loss_scale=config.loss_scale,
            ema=config.ema,
            ema_start=round(config.ema_start * steps_per_epoch),
            ema_floor=config.ema_floor,
            clip=config.clip,
            lookahead=config.lookahead,
            lookahead_share=config.lookahead_share,
            mirrored=config.tta == "flip",
            processes=processes,
        )
        self.seconds = 0.0
        self._saved = -math.inf  # time of the last checkpoint
        self._said: list[str] = []  # first value of the display
        reason = model.why_not_fused()
        if reason is not None:
            self._said.append(f"layers run one by one, not as one operation: {reason}")
        self.accuracy: float | None = None  # at the end, 0 .. 1; None if nothing was evaluated
        processes.any(False)  # the first process has finished its work in the folder
        if os.path.lexists(folder / CHECKPOINT):
            self._load()
        elif processes.rank == 0 and len(read_metrics(folder)[0]) > 1:
            # a checkpoint is written after the first row and before the second one
            raise ValueError(
                f"resume must name a folder with its checkpoint, found rows of epochs in "
                f"{folder / 'metrics.jsonl'} and no {folder / CHECKPOINT}"
            )
        elif processes.rank == 0 and not (folder / "config.json").exists():
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", config.to_dict())

    @property
    def step(self) -> int:
        """Steps taken since the start of the run."""
        return self.engine.done

    def train(self, on_epoch: Callable[[dict], object] | None = None) -> list[dict]:
        """Train to the end; returns the rows of metrics.jsonl.

        Args:
            on_epoch: called in the first process with each epoch's row; if it returns a true
                value, the run ends there, with its checkpoint written

        Raises:
            RunStopped: the user stopped it; the checkpoint is written
            FloatingPointError: loss or weights are not finite; names the step
            OSError: a file cannot be written
            BatchTooLargeError: the batch does not fit into memory
            ProcessLostError: another process has died or does not answer
        """
        logbook = self.logbook()
        patient = self.processes.count > 1
        fits = batch_must_fit(self.config.batch_size, self.processes, self.engine)
        captured = self._graphs_dropped()
        with StopRequest(patient) as stop, logbook, captured, fits, self._tracing(logbook):
            self._capture(logbook)
            for _ in self.course(logbook, stop, on_epoch):
                self._step(logbook)
            return logbook.rows

    def course(
        self,
        logbook: Logbook | SilentLogbook,
        stop: Wish,
        on_epoch: Callable[[dict], object] | None = None,
    ) -> Iterator[None]:
        """The training without its steps: at each ``yield`` the caller launches the next one.

        Raises as ``train``.
        """
        config, steps = self.config, self.data.training.steps
        for line in self._said:
            logbook.say(line)
        for epoch in range(self.step // steps, config.epochs):
            speed = yield from self._train_epoch(epoch, logbook, stop)
            self._finish_epoch(epoch, speed, logbook)
            last, stopping = epoch + 1 == config.epochs, self.processes.any(stop.wished)
            if last or stopping or time.monotonic() - self._saved > _SAVE_EVERY_SECONDS:
                self._save()
            if stopping and not last:
                raise self._stopped()
            if on_epoch is not None:
                first = self.processes.rank == 0
                if self.processes.any(first and bool(on_epoch(dict(logbook.rows[-1])))):
                    self._save()
                    break
        self.accuracy = self._final_accuracy(logbook)
        score = "not evaluated"
        if self.accuracy is not None:
            score = f"accuracy {100 * self.accuracy:.2f} %"
        logbook.say(
            f"ResNet-{config.depth} on {self.data.name}, seed {config.seed}: "
            f"{self.data.evaluated} {score} after {self.step // steps} "
            f"epochs, {self.seconds:.0f} s; in {self.folder}"
        )

    @property
    def trained(self) -> FastResNet:
        """The network that was evaluated last, with its card."""
        model = self.engine.evaluated_model
        model.card = {
            "mean": self.data.mean.tolist(),
            "std": self.data.std.tolist(),
            "class_names": self.data.fingerprint["classes"],
            "dataset": self.data.name,
            "accuracy": self.accuracy,
            "training": self.config.to_dict(),
        }
        return model.eval()

    def _final_accuracy(self, logbook: Logbook | SilentLogbook) -> float | None:
        """That of the last evaluated epoch, or evaluated anew if metrics.jsonl has lost rows."""
        if self.processes.any(not logbook.rows or logbook.rows[-1]["step"] < self.step):
            self.engine.start_evaluation()
            return self.engine.evaluation()[1]
        return _last_accuracy(logbook.rows)

    def _capture(self, logbook: Logbook | SilentLogbook) -> None:
        """Replay captured steps if possible; a Ctrl-C waits until the capture is over."""
        capture = capture_for(self.processes.device)
        if capture is not None:
            reason = self.engine.capture(capture)
            if reason is not None:
                logbook.say(f"steps run one kernel at a time, slower than captured: {reason}")

    @contextlib.contextmanager
    def _graphs_dropped(self) -> Iterator[None]:
        """Context that drops what was captured within, since the processes cannot part before."""
        try:
            yield
        except BaseException as error:
            if self.processes.count > 1:  # the frame of a failed replay holds its graph
                traceback.clear_frames(error.__traceback__)
            raise
        finally:
            self.engine.drop_graphs()

    def _tracing(self, logbook: Logbook | SilentLogbook) -> contextlib.AbstractContextManager:
        """Records a few steps of the first process, if a trace was requested."""
        self._trace = None
        if not self.config.profile or self.processes.rank:
            return contextlib.nullcontext()
        left = self.config.epochs * self.data.training.steps - self.step
        if left <= STEPS_BEFORE:
            logbook.say(
                f"no trace is written: the first {STEPS_BEFORE} steps are not recorded, and "
                f"{left} are left"
            )
            return contextlib.nullcontext()
        self._trace = StepTrace(self.folder / _TRACE, self.processes.device)
        return self._trace

    def _step(self, logbook: Logbook | SilentLogbook) -> None:
        """Launch a step, and record it if it belongs to the trace."""
        if self._trace is None:
            self.engine.train_step()
            return
        self._trace.before_step()
        self.engine.train_step()
        if self._trace.after_step():
            logbook.say(f"a trace of {self._trace.written} steps is in {self._trace.path}")

    def logbook(self, label: str = "") -> Logbook | SilentLogbook:
        """The logbook of this run; with a label if it runs beside others."""
        if self.processes.rank:
            return SilentLogbook(
                [r for r in read_metrics(self.folder)[0] if r["step"] <= self.step]
            )
        return Logbook(
            self.folder,
            epochs=self.config.epochs,
            steps_per_epoch=self.data.training.steps,
            start_step=self.step,
            evaluated=self.data.evaluated,
            title=f"ResNet-{self.config.depth} on {self.data.name}, seed {self.config.seed}",
            tensorboard=self.config.tensorboard,
            label=label,
        )

    def _train_epoch(
        self, epoch: int, logbook: Logbook | SilentLogbook, stop: Wish
    ) -> Generator[None, None, float]:
        """The remaining steps of an epoch, one at each ``yield``; returns images per second."""
        engine, training = self.engine, self.data.training
        steps = training.steps
        began, first, shown = time.monotonic(), self.step, 0.0
        asked = None  # the step whose metrics are being copied
        while self.step < (epoch + 1) * steps:
            yield
            last = self.step == (epoch + 1) * steps
            now = time.monotonic()
            if asked is None and not last and now - shown > _SHOW_EVERY_SECONDS:
                engine.ask_metrics()
                asked = self.step
            if asked is not None and engine.metrics_arrived():
                self._show(asked, (asked - first) / (now - began), epoch, logbook)
                asked, shown = None, now
            if not last and self._agreed(stop.wished):
                self.seconds += time.monotonic() - began
                self._save()
                raise self._stopped()
        engine.ask_metrics()
        if self._evaluates(epoch):
            engine.start_evaluation()  # before any waiting, so that the device stays busy
        engine.read_metrics()  # waits for the last step, not for the evaluation
        elapsed = time.monotonic() - began
        self._show(self.step, (self.step - first) / elapsed, epoch, logbook)
        self.seconds += elapsed
        return (self.step - first) * training.batch_size / elapsed

    def _evaluates(self, epoch: int) -> bool:
        """Whether the network is evaluated after this epoch, counted from 0."""
        finished = epoch + 1
        return finished % self.config.evaluate_every == 0 or finished == self.config.epochs

    def _agreed(self, wish: bool) -> bool:
        """Whether to stop after this step. All processes agree on it, but not at each step, since
        they wait for each other to agree."""
        if self.processes.count == 1:
            return wish
        return self.step % _AGREE_EVERY_STEPS == 0 and self.processes.any(wish)

    def _show(
        self,
        step: int,
        steps_per_second: float,
        epoch: int,
        logbook: Logbook | SilentLogbook,
    ) -> None:
        """Move the bar to ``step``, whose metrics have arrived."""
        training = self.data.training
        loss, accuracy = self._epoch_so_far(epoch, step - epoch * training.steps)
        logbook.show(step, loss, accuracy, steps_per_second * training.batch_size)

    def _finish_epoch(
        self, epoch: int, images_per_second: float, logbook: Logbook | SilentLogbook
    ) -> None:
        """Record the epoch's row; its checkpoint, if there is one, is written afterwards.

        A row without its checkpoint is dropped on resume; a checkpoint without its row would
        leave a gap.
        """
        began = time.monotonic()
        before = logbook.rows[-1].get("skipped_steps", 0) if logbook.rows else 0
        loss, accuracy = self._epoch_so_far(epoch, self.data.training.steps)
        self._check_weights()
        skipped = int(self.engine.read_metrics()[2, -1])
        scores = {}
        if self._evaluates(epoch):
            names = ("test_loss", "test_accuracy", "test_accuracy_flip")
            scores = dict(zip(names, self.engine.evaluation(), strict=False))
        self.seconds += time.monotonic() - began
        logbook.add(
            {
                "epoch": epoch + 1,
                "step": self.step,
                "lr": self._rates[self.step - 1].item(),
                "train_loss": loss,
                "train_accuracy": accuracy,
                "skipped_steps": skipped,
                **scores,
                "images_per_second": round(images_per_second, 1),
                "seconds": round(self.seconds, 3),
            }
        )
        if skipped > before:
            logbook.say(
                f"{skipped - before} steps of epoch {epoch + 1} were skipped: their gradients "
                f"overflowed at loss scale {self.config.loss_scale:g}; a lower "
                f"{flag_of('loss_scale')} helps if there are many"
            )

    def _epoch_so_far(self, epoch: int, steps: int) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch's first ``steps`` steps, from the metrics requested
        last; all must be finite."""
        metrics = self.engine.read_metrics()[:, :steps]
        losses = metrics[0].tolist()
        for place, loss in enumerate(losses):
            if not math.isfinite(loss):
                passed = (place + 1) / self.data.training.steps
                raise FloatingPointError(
                    f"the loss is {loss} at step {epoch * self.data.training.steps + place + 1} "
                    f"(epoch {epoch + passed:.2f}): training stopped, {self._kept()}; a lower "
                    f"{flag_of('lr')} or a longer {flag_of('warmup_epochs')} often helps"
                )
        hits = metrics[1].double().sum().item()  # mixed images count as fractions of a hit
        return sum(losses) / steps, hits / (steps * self.data.training.batch_size)

    def _check_weights(self) -> None:
        if not self.engine.is_finite():
            raise FloatingPointError(
                f"the weights are not finite after step {self.step}: training stopped, "
                f"{self._kept()}"
            )

    def _kept(self) -> str:
        path = self.folder / CHECKPOINT
        return f"{path} keeps the last good state" if path.exists() else "nothing was saved yet"

    def _stopped(self) -> RunStopped:
        # torchrun ends all processes with the first that ends; the others must have saved before
        self.processes.any(False)
        return RunStopped(
            f"stopped after step {self.step}; to continue: {flag_of('resume')} {self.folder}"
        )

    def _save(self) -> None:
        self._check_weights()
        if self.processes.rank:
            return
        content = {
            "format": 2,
            "config": self.config.to_dict(),
            "data": self.data.fingerprint,
            "mean": self.data.mean.tolist(),
            "std": self.data.std.tolist(),
            "processes": self.processes.count,
            "step": self.step,
            "seconds": self.seconds,
            "state_dict": self.engine.evaluated_model.state_dict(),
            "engine": self.engine.state_dict(),
        }
        save_checkpoint(self.folder / CHECKPOINT, content)
        self._saved = time.monotonic()

    def _load(self) -> None:
        path = self.folder / CHECKPOINT
        content = read_checkpoint(path)
        try:
            if content["format"] != 2:
                raise ValueError(f"format must be 2, got {content['format']}")
            if content["data"] != self.data.fingerprint:
                raise ValueError("the data set is not the one that the run began with")
            for name in ("depth", "seed", "batch_size", "dtype"):
                ours, theirs = getattr(self.config, name), content["config"][name]
                if ours != theirs:
                    raise ValueError(f"{name} must be {ours}, as in config.json, got {theirs}")
            self.engine.load_state_dict(content["engine"])
            self.seconds = float(content["seconds"])
            before, now = content.get("processes"), self.processes.count
            if before not in (None, now) and not self.config.sync_bn:
                self._said.append(
                    f"resumed by {now} process{'es' * (now > 1)} after {before}: batch "
                    f"normalisation is over {self.config.batch_size // now} images instead of "
                    f"{self.config.batch_size // before}, so the results differ from those of an "
                    f"undisturbed run"
                )
        except Exception as error:  # a value of the wrong kind can cause any error
            reason = first_line(error)
            raise ValueError(f"resume: checkpoint {path} does not fit the run: {reason}") from None


def _last_accuracy(rows: list[dict]) -> float | None:
    """The accuracy of the last epoch that was evaluated, 0 .. 1; None if none was."""
    return next((row["test_accuracy"] for row in rows[::-1] if "test_accuracy" in row), None)


def write_json(path: Path, values: dict) -> None:
    """Replace the content of ``path`` by ``values``, atomically."""
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
