"""One training step, evaluation, and all state that a step changes (layer 3).

A step is device work alone: a counter on the device determines the batch, the learning rate and
the place of the metrics. A step can therefore be captured once, as a CUDA graph, and replayed with
one launch; if it cannot be captured, the same function runs directly.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_resnet_fast import ops
from cifar_resnet_fast.data.loader import Loader
from cifar_resnet_fast.errors import first_line, is_out_of_memory
from cifar_resnet_fast.processes import Processes
from cifar_resnet_fast.resnet import FastResNet
from cifar_resnet_fast.training.capture import CudaGraphs, Readback
from cifar_resnet_fast.training.muon import FlatMuon
from cifar_resnet_fast.training.optimizers import (
    AveragedWeights,
    FlatSGD,
    Lookahead,
    flatten_buffers,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Evaluator:
    """Scores a model on all images of a loader.

    Args:
        model: moved to ``device``
        loader: without augmentation, on ``device``, with the images of this process
        device: the device of the evaluation
        dtype: dtype of the activations
        processes: the processes that share the images
        mirrored: also score the mean over each image and its mirror image
    """

    def __init__(
        self,
        model: FastResNet,
        loader: Loader,
        *,
        device: torch.device,
        dtype: torch.dtype,
        processes: Processes,
        mirrored: bool = False,
    ):
        self._processes = processes
        self._mirrored = mirrored
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self._loader = loader
        self._device, self._dtype = device, dtype
        # sums over the images so far: cross entropy, hits and, if mirrored, hits of the means;
        # and the number of batches since the start
        self._sums = torch.zeros(2 + mirrored, dtype=torch.float64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._done = 0
        self._replay = self._run

    def start(self) -> None:
        """Launch the whole evaluation; ``result`` waits for it."""
        self._sums.zero_()
        for _ in range(self._loader.steps):
            self._loader.prepare(self._done)
            self._replay()
            self._done += 1

    def result(self) -> tuple[float, ...]:
        """Mean cross entropy and accuracy (0 .. 1) over all images.

        With ``mirrored`` there is a third number, the accuracy of the mean of the logits of each
        image and of its mirror image.
        """
        self._processes.all_reduce(self._sums)
        self._processes.wait()
        return tuple(value / self._loader.size for value in self._sums.tolist())

    def capture(self, capture: CudaGraphs) -> None:
        """Replay a batch from now on; raises as ``capture``. Sums and counter are unchanged."""
        self._loader.prepare(self._done)
        with _Kept([self._sums, self._step]):
            self._replay = capture(self._run, self._run)

    def release(self) -> None:
        """Release the memory of a captured batch."""
        self._replay = self._run

    @torch.no_grad()
    def _run(self) -> None:
        self.model.eval()
        images, labels = self._loader.batch(self._step)
        with _autocast(self._device, self._dtype):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-1)
        sums = [loss, (logits.argmax(1) == labels).sum()]
        if self._mirrored:
            with _autocast(self._device, self._dtype):
                other = self.model(images.flip(3))
            both = logits.float() + other.float()
            sums.append((both.argmax(1) == labels).sum())
        self._sums += torch.stack(sums)
        self._step += 1


class Engine:
    """A model in training: its loaders, optimiser, schedule, metrics and averaged weights.

    Args:
        model: moved to ``device``; its parameters stay float32
        training, testing: loaders on ``device``, the second without augmentation
        device: the device of the training
        dtype: dtype of the activations
        schedule: [steps] float32. the learning rate of every step of the run
        seed: seed of the training batches
        momentum, nesterov, weight_decay, decay_vectors, norm_bias_factor: as ``FlatSGD`` has them
        muon_rate: learning rate of Muon, which then trains the 3x3 convolutions, as a multiple of
            the learning rate; 0 for SGD on all parameters
        label_smoothing: label smoothing of the training loss, 0 .. 1
        loss_scale: factor on the loss in the backward pass, which keeps small gradients from
            vanishing in float16
        ema: decay per step of the averaged weights, which evaluation then uses; 0 for none
        ema_start: number of steps before the average, during which it is a copy of the weights
        ema_floor: as ``AveragedWeights`` has it
        clip: as ``FlatSGD`` has it
        lookahead, lookahead_share: ``every`` and ``share`` of ``Lookahead``; 0 steps for none
        mirrored: evaluation also scores the mean over each image and its mirror image
        processes: the processes that train together, each on its part of every batch. Their
            gradients are summed, so weights and metrics stay the same in all of them. A batch
            normalisation uses the statistics of each process's part, unless the model has
            SyncBatchNorm; evaluation and checkpoints use the running ones of the first process.

    Attributes:
        done: steps taken since the start of the run
        metrics: [3, steps of an epoch] float32, on the device. one column per step of the last
            epoch: mean loss of the batch, images classified correctly before the step, steps
            skipped since the start of the run
    """

    def __init__(
        self,
        model: FastResNet,
        training: Loader,
        testing: Loader,
        *,
        device: torch.device,
        dtype: torch.dtype,
        schedule: Tensor,
        seed: int,
        momentum: float,
        weight_decay: float,
        nesterov: bool = False,
        decay_vectors: bool = True,
        norm_bias_factor: float = 1.0,
        muon_rate: float = 0.0,
        clip: float = 0.0,
        lookahead: int = 0,
        lookahead_share: float = 0.5,
        label_smoothing: float = 0.0,
        loss_scale: float = 1.0,
        ema: float = 0.0,
        ema_start: int = 0,
        ema_floor: float | None = None,
        mirrored: bool = False,
        processes: Processes,
    ):
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self._training = training
        self._device, self._dtype, self._seed = device, dtype, seed
        self._label_smoothing = label_smoothing
        rule = partial(FlatMuon, rate=muon_rate) if muon_rate else FlatSGD
        self.optimizer = rule(
            model,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            decay_vectors=decay_vectors,
            norm_bias_factor=norm_bias_factor,
            loss_scale=loss_scale,
            clip=clip,
            passengers=2,
        )
        self._processes = processes
        self._buffers = flatten_buffers(model)
        self._flats = [self.optimizer.parameters, *self._buffers]
        self._lookahead = None
        if lookahead:
            fast = self.optimizer.parameters
            self._lookahead = Lookahead(fast, lookahead, lookahead_share)
        self._averaged: AveragedWeights[FastResNet] | None = None
        if ema:
            self._averaged = AveragedWeights(model, self._flats, ema, ema_floor)
        self._ema_start = ema_start
        self._evaluator = Evaluator(
            self.evaluated_model,
            testing,
            device=device,
            dtype=dtype,
            processes=processes,
            mirrored=mirrored,
        )
        self._schedule = schedule.to(device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)  # `done` on the device
        self._continue_from(0)
        self.metrics = torch.zeros((3, training.steps), device=device)
        self._readback = Readback(self.metrics, processes.wait)
        self._replay: Callable[[], None] = self.run_step

    @property
    def evaluated_model(self) -> FastResNet:
        """The model that evaluation uses: the averaged one if there is one."""
        return self.model if self._averaged is None else self._averaged.model

    def capture(self, capture: CudaGraphs) -> str | None:
        """Replay steps and evaluation from now on, if ``capture`` can record them.

        The warm-up before it trains on dummy labels and leaves no trace in the weights, the
        running statistics, the optimiser or the metrics.

        Returns:
            why they are not replayed, or None

        Raises:
            RuntimeError: a step does not fit into the device's memory; see ``is_out_of_memory``
        """
        if self.done == len(self._schedule):
            return None  # no step is left
        self.prepare()
        try:
            with _Kept(self.state()):
                self._replay = capture(self.run_step, lambda: self.run_step(dummy=True))
            self._evaluator.capture(capture)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.drop_graphs()
            return first_line(error)
        return None

    def capture_evaluation(self, capture: CudaGraphs) -> None:
        """Replay evaluation alone from now on; raises as ``capture``."""
        self._evaluator.capture(capture)

    def prepare(self) -> None:
        """Put everything on the device that the next step needs."""
        self._training.prepare(self.done, self._seed)

    def train_step(self) -> None:
        """Launch the next step of the run, without waiting for it."""
        self.prepare()
        self._replay()
        self._processes.mark()
        self.done += 1

    def ask_metrics(self) -> None:
        """Launch a copy of ``metrics`` to the host, with all steps launched so far."""
        self._readback.ask()

    def metrics_arrived(self) -> bool:
        """Whether the metrics requested last can be read without waiting."""
        return self._readback.arrived()

    def read_metrics(self) -> Tensor:
        """The metrics requested last, on the host."""
        return self._readback.values()

    def start_evaluation(self) -> None:
        """Launch the evaluation on all images of the testing loader, without waiting for it."""
        # the next exchanges then wait for nothing but each other
        self._processes.wait()
        averaged = [] if self._averaged is None else self._averaged.flats[1:]
        for flat in (*self._buffers, *averaged):
            self._processes.spread(flat)
        self._evaluator.start()
        self._processes.mark()
        if self.done < len(self._schedule):
            self.prepare()  # the next epoch is drawn while the device evaluates

    def evaluation(self) -> tuple[float, ...]:
        """The ``Evaluator.result`` of the last evaluation."""
        return self._evaluator.result()

    def step_bytes(self, pictures: int) -> int:
        """The peak device memory of a step with that many images, measured with black ones.

        Only after a run has ended, since it changes the running statistics.

        Raises:
            RuntimeError: it does not fit; see ``is_out_of_memory``
        """
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        images = torch.zeros((pictures, 3, 32, 32), dtype=self._dtype, device=self._device)
        with _autocast(self._device, self._dtype):
            logits = self.model.train()(images.to(memory_format=torch.channels_last))
        self.optimizer.differentiate(logits.float().sum())
        return torch.cuda.max_memory_allocated(self._device) - before

    def planned_bytes(self, pictures: int) -> tuple[int, int, int]:
        """The figures that determine how many networks of this kind fit into the device's memory.

        Args:
            pictures: images per step

        Returns:
            held: bytes of all state of this network
            step: bytes that a step takes in addition
            available: bytes that are free now
        """
        state = self.state()
        with _Kept(state):
            step = self.step_bytes(pictures)
        torch.cuda.empty_cache()
        held = sum(t.nbytes for t in state) + self.optimizer.exchanged.nbytes
        return held, step, torch.cuda.mem_get_info(self._device)[0]

    def drop_graphs(self) -> None:
        """Run steps and evaluation directly from now on, and drop the captured ones."""
        self._replay = self.run_step
        self._evaluator.release()
        gc.collect()

    def release(self) -> int:
        """Release the memory of captured steps; returns the bytes that are then free."""
        self.drop_graphs()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def is_finite(self) -> bool:
        """Whether no weight and no running statistic of the model is infinite or NaN."""
        self._processes.wait()
        return all(bool(flat.isfinite().all()) for flat in self._flats)

    def state_dict(self) -> dict:
        """All state that a step changes; ``load_state_dict`` restores it."""
        averaged, slow = self._averaged, self._lookahead
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.optimizer.skipped,
            "lookahead": None if slow is None else slow.state_of(self.model),
            "averaged": None if averaged is None else averaged.model.state_dict(),
            "step": self.done,
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict) -> None:
        """Load the state of a run; ValueError, KeyError or RuntimeError if it does not fit."""
        if not 0 <= state["step"] <= len(self._schedule):
            raise ValueError(f"step must be within the run's, got {state['step']}")
        if state["metrics"].shape != self.metrics.shape:
            raise ValueError(
                f"metrics must have shape {tuple(self.metrics.shape)}, "
                f"got {tuple(state['metrics'].shape)}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.skipped.copy_(state["skipped"])
        if self._lookahead is not None:
            for name, slow in self._lookahead.state_of(self.model).items():
                slow.copy_(state["lookahead"][name])
        if self._averaged is not None:
            self._averaged.model.load_state_dict(state["averaged"])
        self._continue_from(int(state["step"]))
        self.metrics.copy_(state["metrics"])

    def _continue_from(self, step: int) -> None:
        """Continue after ``step`` steps; each step sets the number and rate of the next one."""
        self.done = step
        self._step.fill_(step)
        self.optimizer.lr.copy_(self._schedule[min(step, len(self._schedule) - 1)])

    def run_step(self, dummy: bool = False) -> None:
        """The device work of a step, or of a ``dummy`` one for warm-up, which does not depend on
        the labels."""
        optimizer = self.optimizer
        self.model.train()
        images, labels, *mix = self._training.batch(self._step)
        if dummy:
            labels = torch.zeros_like(labels)
            mix = mix and [labels, mix[1]]
        loss, hits = self._score(images, labels, *mix)
        if self._processes.count > 1:
            # the mean over the whole batch is the sum of the contributions of its parts
            loss = loss / self._processes.count
        optimizer.differentiate(loss)
        loss = loss.detach()
        if self._processes.count > 1:
            optimizer.passengers.copy_(torch.stack((loss, hits)))
            self._processes.all_reduce(optimizer.exchanged)
            loss, hits = optimizer.passengers
        optimizer.step()
        if self._lookahead is not None:
            self._lookahead.update(self._step)
        if self._averaged is not None:
            self._averaged.update(self._step - self._ema_start)
        ops.record_step(
            self.metrics,
            loss,
            hits,
            optimizer.skipped,
            self._step,
            optimizer.lr,
            self._schedule,
        )
        if dummy:
            self._step -= 1  # afterwards, because captured work must have been launched before

    def _score(
        self,
        images: Tensor,
        labels: Tensor,
        labels_b: Tensor | None = None,
        ratio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss of the model on a batch and number of images classified correctly, both as
        returned by ``ops.linear_cross_entropy``."""
        last = _plain_last_layer(self.model)
        with _autocast(self._device, self._dtype), self.optimizer.gradients_in_place():
            if last is not None:
                features = self.model.forward_features(images)
            else:
                logits = self.model(images)
        if last is not None:
            return ops.linear_cross_entropy(
                features,
                last.weight,
                last.bias,
                labels,
                label_smoothing=self._label_smoothing,
                labels_b=labels_b,
                ratio=ratio,
            )
        largest = logits.detach().argmax(1)

        def score(labels: Tensor) -> tuple[Tensor, Tensor]:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self._label_smoothing)
            return loss, (largest == labels).sum().float()

        if labels_b is None:
            return score(labels)
        assert ratio is not None  # because there are second labels
        (loss, hits), (loss_b, hits_b) = score(labels), score(labels_b)
        return ratio * loss + (1 - ratio) * loss_b, ratio * hits + (1 - ratio) * hits_b

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes and that a later step or the user reads."""
        averaged = [] if self._averaged is None else self._averaged.flats
        optimizer = self.optimizer
        kept = [optimizer.momenta, optimizer.lr, optimizer.skipped, self._step, self.metrics]
        slow = [] if self._lookahead is None else [self._lookahead.slow]
        return [*self._flats, *averaged, *slow, *kept]


class EngineGroup:
    """Engines whose next steps are launched as one.

    Each has its own state, and a step of the group changes it bitwise as the engine's own step
    does. If they cannot be captured, the steps run in turn.

    Args:
        engines: on one device, in one process, each with a step left
    """

    def __init__(self, engines: Sequence[Engine]):
        self._engines = engines
        self._replay = self._in_turn

    def capture(self, capture: CudaGraphs) -> str | None:
        """Replay the steps from now on, as branches of one graph; like ``Engine.capture``, but
        without the evaluation."""
        for engine in self._engines:
            engine.prepare()
        step = capture.side_by_side([engine.run_step for engine in self._engines])
        warm_up = capture.side_by_side([partial(e.run_step, dummy=True) for e in self._engines])
        try:
            with _Kept([tensor for engine in self._engines for tensor in engine.state()]):
                self._replay = capture(step, warm_up)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.drop_graphs()
            return first_line(error)
        return None

    def train_step(self) -> None:
        """Launch the next step of every engine, without waiting for them."""
        for engine in self._engines:
            engine.prepare()
        self._replay()
        for engine in self._engines:
            engine.done += 1

    def drop_graphs(self) -> None:
        """Run the steps in turn from now on, and drop the captured ones."""
        self._replay = self._in_turn
        gc.collect()

    def _in_turn(self) -> None:
        for engine in self._engines:
            engine.run_step()


def _plain_last_layer(model: FastResNet) -> nn.Linear | None:
    """The model's last layer if a call of the model is just ``forward_features`` and a plain
    linear layer, which can then run together with the loss; otherwise None."""
    last = model.linear
    called = (model, last)
    if type(model).forward is not FastResNet.forward or type(last) is not nn.Linear:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in called):
        return None
    if any(m._backward_hooks or m._backward_pre_hooks for m in called):
        return None
    return last


class _Kept:
    """Restores the values that tensors had on entry."""

    def __init__(self, tensors: list[Tensor]):
        self._tensors = tensors

    def __enter__(self) -> None:
        self._values = [tensor.clone() for tensor in self._tensors]

    def __exit__(self, *_) -> None:
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
