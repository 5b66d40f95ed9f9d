"""The recipe's optimiser over flat buffers, and averaged weights (layer 2).

A model's parameters are moved into flat float32 buffers, one each for values, gradients and
momenta. The modules then hold views, so state dictionaries, deep copies and checkpoints are the
same as without the buffers. One kernel updates all parameters, and one all-reduce suffices.
"""

import contextlib
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from cifar_resnet_fast import ops

_Model = TypeVar("_Model", bound=nn.Module)
_ALIGNMENT = 64  # elements; each view starts at a multiple, so kernels can load 16 bytes at a time


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Move tensors into one flat buffer; each becomes a view of it, and the gaps are zero.

    Args:
        tensors: at least one, all of one dtype and device. each keeps its shape, its memory
            format and its identity

    Returns:
        [P], with P at least the total number of elements
    """
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
    flat = torch.zeros(size, dtype=tensors[0].dtype, device=tensors[0].device)
    for tensor, offset in zip(tensors, offsets, strict=True):
        strides = torch.empty_like(tensor).stride()  # dense, unlike the tensor's perhaps
        view = flat.as_strided(tensor.shape, strides, offset)
        view.copy_(tensor.detach())
        tensor.data = view
    return flat


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``flat`` at the places that the tensors ``like`` have in their own flat buffer."""
    return [flat.as_strided(t.shape, t.stride(), t.storage_offset()) for t in like]


class FlatSGD:
    """SGD with momentum over all parameters of a model, in flat float32 buffers.

    The parameters become views of ``parameters``, their ``grad`` views of ``gradients``. A step
    whose gradients are not all finite changes nothing and is counted in ``skipped``. Nothing is
    read back to the host, so a CUDA graph can capture a step.

    Args:
        model: float32, already on its device, since moving it would detach it from the buffers
        momentum, nesterov: as in torch.optim.SGD
        weight_decay: of all parameters
        decay_vectors: False leaves parameters of one axis (normalisations, biases) without decay
        norm_bias_factor: the biases of the normalisations have so many times the learning rate,
            and their weight decay divided by it
        loss_scale: the loss was multiplied by it before the backward pass
        clip: the largest norm of the gradient over all parameters, without the loss scale, as in
            torch.nn.utils.clip_grad_norm_; 0 for no limit
        passengers: count of numbers that are exchanged between processes with the gradients
        ahead: parameters that come first in the buffers and that ``step`` does not change, for a
            subclass with another rule for them
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Attributes:
        lr: [] float32, on the device. to be set before a step
        loss_scale: [] float32, on the device
        skipped: [] int32, on the device. number of steps left out so far
        parameters, momenta: [P] float32
        gradients: [P] float32. must stay zero in the gaps between parameters
        passengers: [passengers] float32
        exchanged: float32. gradients and passengers in one tensor, for a sum over the processes

    Source: He et al. 2015, section 4.2; Goyal et al. 2017, section 5.3 (decay of vectors);
    Jordan 2024, section 3.4 (norm_bias_factor).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float,
        weight_decay: float,
        nesterov: bool = False,
        decay_vectors: bool = True,
        norm_bias_factor: float = 1.0,
        loss_scale: float = 1.0,
        clip: float = 0.0,
        passengers: int = 0,
        ahead: Sequence[nn.Parameter] = (),
        implementation: str = "auto",
    ):
        others = set(ahead)
        trained = [p for p in model.parameters() if p.requires_grad and p not in others]
        boosted = set() if norm_bias_factor == 1 else set(_norm_biases(model))
        scaled = [p for p in trained if p in boosted]
        trained = [p for p in trained if p not in boosted]
        decayed = [p for p in trained if decay_vectors or p.dim() > 1]
        rest = [p for p in trained if not decay_vectors and p.dim() <= 1]
        scaled_decay = weight_decay / norm_bias_factor if decay_vectors else 0.0
        groups = [
            (list(ahead), 0.0),
            (decayed, weight_decay),
            (rest, 0.0),
            (scaled, scaled_decay),
        ]
        self._groups = [(members, decay) for members, decay in groups if members]
        self._members = [*ahead, *decayed, *rest, *scaled]
        self._settings: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
        self._weight_decay, self._clip = weight_decay, clip
        self._implementation = implementation

        self.parameters = flatten(self._members)
        P = self.parameters.numel()
        self._start = int((decayed + rest + scaled)[0].storage_offset())
        bare = rest if decay_vectors else rest + scaled
        end = int(bare[0].storage_offset()) if bare else P
        self._decayed = end - self._start
        self._scaled = P - int(scaled[0].storage_offset()) if scaled else 0
        self._lr_factor = norm_bias_factor
        self.exchanged = self.parameters.new_zeros(P + passengers)
        self.gradients, self.passengers = self.exchanged[:P], self.exchanged[P:]
        self.momenta = torch.zeros_like(self.parameters)
        self._gradient_views = _views(self.gradients, self._members)
        self._momentum_views = _views(self.momenta, self._members)
        for parameter, gradient in zip(self._members, self._gradient_views, strict=True):
            parameter.grad = gradient
        device = self.parameters.device
        self.lr = torch.zeros((), device=device)
        self.loss_scale = torch.tensor(loss_scale, dtype=torch.float32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int32, device=device)

    def differentiate(self, loss: Tensor) -> None:
        """Put the gradients of ``loss`` times the loss scale into ``gradients``."""
        # the scale is the incoming gradient, which costs no launch of its own
        found = torch.autograd.grad(loss, self._members, self.loss_scale)
        # gradients that the backward pass has written in place are not copied
        pairs = [
            (view, gradient)
            for view, gradient in zip(self._gradient_views, found, strict=True)
            if gradient.data_ptr() != view.data_ptr()
        ]
        if pairs:
            views, gradients = zip(*pairs, strict=True)
            torch._foreach_copy_(views, gradients)

    def gradients_in_place(self) -> contextlib.AbstractContextManager[None]:
        """Context of a forward pass whose backward pass writes into ``gradients`` if it can."""
        return ops.gradients_into(list(zip(self._members, self._gradient_views, strict=True)))

    def step(self) -> None:
        """Update the parameters with ``gradients``; skip and count it if they are not finite."""
        if self._clip:
            # in float64, in which squares of finite gradients do not overflow
            norm = torch.linalg.vector_norm(self.gradients, dtype=torch.float64) / self.loss_scale
            factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            # the gaps between parameters must stay zero, so nothing is multiplied by NaN
            self.gradients.mul_(factor.masked_fill(~norm.isfinite(), 1.0).float())
        self._update()

    def _update(self) -> None:
        ops.sgd(
            self.parameters[self._start :],
            self.gradients[self._start :],
            self.momenta[self._start :],
            self.lr,
            self.loss_scale,
            self.skipped,
            decayed=self._decayed,
            scaled=self._scaled,
            lr_factor=self._lr_factor,
            weight_decay=self._weight_decay,
            implementation=self._implementation,
            **self._settings,
        )

    def state_dict(self) -> dict:
        """The momenta in the format of torch.optim.SGD with the same settings."""
        kept = self._momentum_views if self._settings["momentum"] else ()
        return {
            "state": {place: {"momentum_buffer": view} for place, view in enumerate(kept)},
            "param_groups": self._param_groups(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Load momenta in torch.optim.SGD's format, from this class or from that one.

        Raises:
            ValueError: the state has other parameters or other settings; nothing has changed
        """
        for place, (group, given) in enumerate(
            zip(self._param_groups(), state["param_groups"], strict=False)
        ):
            for name in ("momentum", "dampening", "weight_decay", "nesterov", "maximize"):
                if group[name] != given[name]:
                    raise ValueError(
                        f"optimizer state must have {name} {group[name]} in group {place}, "
                        f"got {given[name]}"
                    )
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != [len(members) for members, _ in self._groups]:
            raise ValueError(
                f"optimizer state must have groups of "
                f"{[len(members) for members, _ in self._groups]} parameters, got {sizes}"
            )
        kept = [state["state"].get(place, {}) for place in range(len(self._members))]
        found = [entry.get("momentum_buffer") for entry in kept]
        for place, (ours, theirs) in enumerate(zip(self._momentum_views, found, strict=True)):
            if theirs is not None and theirs.shape != ours.shape:
                raise ValueError(
                    f"optimizer state must have shape {tuple(ours.shape)} for parameter {place}, "
                    f"got {tuple(theirs.shape)}"
                )
        for ours, theirs in zip(self._momentum_views, found, strict=True):
            # torch.optim.SGD has none before its first step, which equals a step from zero
            ours.zero_() if theirs is None else ours.copy_(theirs)

    def _param_groups(self) -> list[dict]:
        """The settings in the form of torch.optim.SGD, with its defaults for the others.

        They are written out here because a torch optimiser imports PyTorch's compiler.
        """
        first, groups = 0, []
        for members, decay in self._groups:
            places = list(range(first, first + len(members)))
            first += len(members)
            settings = {"lr": 0.0, "dampening": 0, "weight_decay": decay, **self._settings}
            unused = {"maximize": False, "differentiable": False, "foreach": None, "fused": None}
            groups.append({**settings, **unused, "params": places})
        return groups


def _norm_biases(model: nn.Module) -> list[nn.Parameter]:
    norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm))
    return [norm.bias for norm in norms if norm.bias is not None]


class Lookahead:
    """Slow weights, which move a share of the way to the fast ones every few steps; the fast ones
    then continue from there.

    Args:
        parameters: [P] float32. the fast weights, of which the first slow ones are a copy
        every: number of steps between two such moves
        share: share of the way, 0 .. 1

    Attributes:
        slow: [P] float32

    Source: Zhang et al. 2019, algorithm 1; the momenta are unchanged.
    """

    def __init__(self, parameters: Tensor, every: int, share: float):
        self._parameters, self._every, self._share = parameters, every, share
        self.slow = parameters.clone()

    @torch.no_grad()
    def update(self, step: Tensor) -> None:
        """To be called after step ``step`` of the optimiser, [] int64 on the device, from 0."""
        due = (step + 1) % self._every == 0
        self.slow.lerp_(self._parameters, self._share * due)
        self._parameters.copy_(torch.where(due, self.slow, self._parameters))

    def state_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The slow weights by the names of the parameters that are views of the fast ones."""
        named = dict(model.named_parameters())
        return dict(zip(named, _views(self.slow, list(named.values())), strict=True))


class AveragedWeights(Generic[_Model]):
    """An exponential moving average of a model's parameters and running statistics.

    Args:
        model: all its parameters and buffers are views of ``sources``, made by ``flatten``
        sources: flat buffers
        decay: decay per step, 0 .. 1
        floor: 0 .. decay. decay of the first step, which rises as ``(1 + n) / (10 + n)`` after n
            steps; None for a constant decay

    Attributes:
        model: a separate network that holds the averages, for evaluation
        flats: its flat buffers, one for each of ``sources``

    Source: the rising decay is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(
        self,
        model: _Model,
        sources: Sequence[Tensor],
        decay: float,
        floor: float | None = None,
    ):
        self._sources, self._decay, self._floor = list(sources), decay, floor
        self.model = deepcopy(model).requires_grad_(False)
        self.flats = [source.clone() for source in sources]
        by_storage = {
            source.untyped_storage().data_ptr(): flat
            for source, flat in zip(sources, self.flats, strict=True)
        }
        for ours, theirs in zip(_tensors(self.model), _tensors(model), strict=True):
            flat = by_storage[theirs.untyped_storage().data_ptr()]
            (ours.data,) = _views(flat, [theirs])

    @torch.no_grad()
    def update(self, age: Tensor) -> None:
        """Move towards the model, or copy it if ``age`` is not positive.

        Args:
            age: [] int64, on the device. steps since the average began
        """
        decay: float | Tensor = self._decay
        if self._floor is not None:
            n = age.clamp(min=0)
            decay = ((1 + n) / (10 + n)).clamp(self._floor, self._decay)
        weight = 1.0 - decay * (age > 0)
        for flat, source in zip(self.flats, self._sources, strict=True):
            if flat.is_floating_point():
                flat.lerp_(source, weight)
            else:
                flat.copy_(source)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def flatten_buffers(model: nn.Module) -> list[Tensor]:
    """Move a model's buffers into one flat buffer per dtype."""
    dtypes = dict.fromkeys(buffer.dtype for buffer in model.buffers())
    return [flatten([b for b in model.buffers() if b.dtype == dtype]) for dtype in dtypes]
