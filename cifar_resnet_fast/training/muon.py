"""Muon for the 3x3 convolutions, SGD for all other parameters, over flat buffers (layer 2).

Muon makes the average of the gradients nearly orthogonal, by a few steps of a Newton-Schulz
iteration, and keeps the norm of each weight. The convolutions of a network of this family have
matrices with 16, 32 or 64 rows. Those with the same number of rows are one batch, in which the
narrower ones are padded with columns of zeros, which the iteration preserves. Twin:
``reference.muon``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cifar_resnet_fast.training.optimizers import FlatSGD

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 3
_EPS = 1e-7


class FlatMuon(FlatSGD):
    """``FlatSGD``, except that the 3x3 convolutions are trained by Muon.

    Their weights have no weight decay: each is scaled to the norm of a matrix of orthogonal rows
    before it moves, which the batch normalisation after the convolution undoes.
    Nothing is read back to the host, so a CUDA graph can capture a step.

    Args:
        model, settings: as in ``FlatSGD``; the momentum is also Muon's
        rate: Muon's learning rate as a multiple of ``lr``

    Source: Jordan et al. 2024 (Muon), as in cifar10-airbench's airbench94_muon.py, in float32.
    """

    def __init__(self, model: nn.Module, *, rate: float, **settings: Any):
        weights = [p for p in model.parameters() if p.requires_grad and p.shape[2:] == (3, 3)]
        weights.sort(key=len)
        super().__init__(model, ahead=weights, **settings)
        self._rate = rate
        device, end = self.parameters.device, self._start
        # for each batch, [n, rows, columns]: the place of an element in the flat buffers, and 1
        # if there is one; for each element of the flat buffers: its place in all batches
        self._batches, batched = [], 0
        places, held = torch.zeros(end, dtype=torch.int64), torch.zeros(end, dtype=torch.bool)
        for rows in sorted({len(weight) for weight in weights}):
            members = [weight for weight in weights if len(weight) == rows]
            columns = max(weight[0].numel() for weight in members)
            index = torch.zeros((len(members), rows, columns), dtype=torch.int64)
            filled = torch.zeros(index.shape)
            numbers = batched + torch.arange(index.numel()).reshape(index.shape)
            for number, weight in enumerate(members):
                own = torch.arange(weight.numel()).reshape(rows, -1)
                own += int(weight.storage_offset())
                place = (number, slice(None), slice(own.shape[1]))
                index[place], filled[place] = own, 1.0
                places[own], held[own] = numbers[place], True
            self._batches.append((index.to(device), filled.to(device)))
            batched += index.numel()
        self._places, self._held = places.to(device), held.to(device)

    @torch.no_grad()
    def _update(self) -> None:
        end, momentum = self._start, self._settings["momentum"]
        finite = self.gradients.isfinite().all()
        # the step must also leave the other parameters unchanged and be counted
        alarm = torch.zeros_like(self.lr).masked_fill(~finite, float("nan"))
        self.gradients[end : end + 1].add_(alarm)
        gradients, momenta = self.gradients[:end], self.momenta[:end]
        direction = gradients * self.loss_scale.reciprocal()
        average = (momenta * momentum).add_(direction)
        nesterov = self._settings["nesterov"]
        direction = direction.add_(average, alpha=momentum) if nesterov else average
        parameters, moved = self.parameters[:end], []
        for index, filled in self._batches:
            weights = torch.take(parameters, index) * filled
            ways = orthogonalized(torch.take(direction, index) * filled)
            norms = torch.linalg.vector_norm(weights, dim=(1, 2), keepdim=True)
            weights = weights * (weights.shape[1] ** 0.5 / norms.clamp(min=_EPS))
            moved.append((weights - self._rate * self.lr * ways).flatten())
        found = torch.take(torch.cat(moved), self._places)
        parameters.copy_(torch.where(finite & self._held, found, parameters))
        momenta.copy_(torch.where(finite, average, momenta))
        super()._update()


def orthogonalized(matrices: Tensor) -> Tensor:
    """[n, R, C], R <= C. Each matrix with its singular values moved close to 1.

    An iteration is ``X = a X + (b A + c A A) X`` with ``A = X X^T``, from ``X`` of norm 1.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + _EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
