"""One training step, evaluation, and all state that a step changes (layer 3)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_resnet_fast.optimizer import AveragedWeights, FlatSGD, flatten_buffers
from cifar_resnet_fast.resnet import FastResNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """A model in training: its optimiser and averaged weights.

    Args:
        model: moved to ``device``; its parameters stay float32
        device: where it trains
        dtype: of the activations
        momentum, nesterov, weight_decay, decay_vectors: as ``FlatSGD`` has them
        label_smoothing: 0 .. 1, of the training loss
        loss_scale: the backward pass runs on the loss times this, which keeps small gradients
            from vanishing in float16
        ema: decay a step of the averaged weights, which evaluation then uses; 0 for none
    """

    def __init__(
        self,
        model: FastResNet,
        *,
        device: torch.device,
        dtype: torch.dtype,
        momentum: float,
        weight_decay: float,
        nesterov: bool = False,
        decay_vectors: bool = True,
        label_smoothing: float = 0.0,
        loss_scale: float = 1.0,
        ema: float = 0.0,
    ):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.device = device
        self.dtype = dtype
        self.label_smoothing = label_smoothing
        self.optimizer = FlatSGD(
            model,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            decay_vectors=decay_vectors,
            loss_scale=loss_scale,
        )
        # steps taken, on the device
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.averaged = None
        if ema:
            flats = [self.optimizer.parameters, *flatten_buffers(model)]
            self.averaged = AveragedWeights(model, flats, ema)

    @property
    def evaluated_model(self) -> FastResNet:
        """The model that evaluation uses: the averaged one where there is one."""
        return self.model if self.averaged is None else self.averaged.model

    def train_step(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One step of SGD.

        Args:
            images: [N, 3, 32, 32], normalised
            labels: [N] int64
            lr: learning rate of this step

        Returns:
            loss: [] float32, mean over the batch, on the device
            correct: [] int64, pictures classified right before the step, on the device
        """
        self.model.train()
        self.optimizer.lr.fill_(lr)
        with self._autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        self.optimizer.differentiate(loss)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update(first=self.step == 0)
        self.step += 1
        return loss.detach(), (logits.argmax(1) == labels).sum()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean cross entropy and accuracy (0 .. 1) over all pictures of ``batches``."""
        model = self.evaluated_model.eval()
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        count = 0
        for images, labels in batches:
            with self._autocast():
                logits = model(images)
            loss += F.cross_entropy(logits.float(), labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
        return loss.item() / count, correct.item() / count

    def is_finite(self) -> bool:
        """Whether no weight and no running statistic of the model is infinite or NaN."""
        values = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        return bool(torch.stack([v.isfinite().all() for v in values]).all())

    def state_dict(self) -> dict:
        """All state that a step changes; ``load_state_dict`` takes it back."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.optimizer.skipped,
            "step": self.step,
            "averaged": None if self.averaged is None else self.averaged.model.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.skipped.copy_(state["skipped"])
        self.step.copy_(state["step"])
        if self.averaged is not None:
            self.averaged.model.load_state_dict(state["averaged"])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )
