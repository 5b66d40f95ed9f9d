"""The CIFAR ResNet-6n+2 family and how to load its published checkpoints (layer 2).

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from cifar_resnet_fast import ops
from cifar_resnet_fast.checkpoint import check_holds, check_weight, read_checkpoint
from cifar_resnet_fast.modules import BasicBlock, apply_unit, conv3x3, unit_of

STAGE_CHANNELS = (16, 32, 64)


class FastResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 pictures, with option-A shortcuts.

    A 3x3 convolution with 16 filters; three stages of n basic blocks with 16, 32 and 64
    channels, the second and third starting at stride 2; global average pool; linear.
    State-dict keys are the customary ones: ``conv1``, ``bn1``, ``layer1.0.conv1``, ...,
    ``linear``. Convolutions start from Kaiming's normal distribution, normalisations from 1 and 0.

    Args:
        depth: 6n + 2, at least 8; the paper's are 20, 32, 44, 56, 110 and 1202
        num_classes: at least 2
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``
        zero_init_last: the last normalisation of each block starts with scale 0, so that the
            block starts as its shortcut (Goyal et al. 2017, section 5.1)

    ``forward(x)``: x [N, 3, H, W], any memory format, to logits [N, num_classes]. All but the last
    layer is one operation, ``ops.trunk``. Layer by layer goes what that is not made for: modules
    inside that have hooks or are of another type (SyncBatchNorm, parametrizations), a gradient of
    x, gradients in evaluation.

    Raises:
        ValueError: depth, num_classes or implementation break their rules
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        implementation: str = "auto",
        zero_init_last: bool = False,
    ):
        super().__init__()
        check_depth(depth)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if implementation not in ("auto", *ops.IMPLEMENTATIONS):
            raise ValueError(
                f"implementation must be one of auto, {', '.join(ops.IMPLEMENTATIONS)}, "
                f"got {implementation!r}"
            )
        self.depth = depth
        self.num_classes = num_classes
        self.implementation = implementation

        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, STAGE_CHANNELS[0])
        self.bn1 = nn.BatchNorm2d(STAGE_CHANNELS[0])
        self.layer1 = _stage(STAGE_CHANNELS[0], STAGE_CHANNELS[0], blocks, implementation)
        self.layer2 = _stage(STAGE_CHANNELS[0], STAGE_CHANNELS[1], blocks, implementation)
        self.layer3 = _stage(STAGE_CHANNELS[1], STAGE_CHANNELS[2], blocks, implementation)
        self.linear = nn.Linear(STAGE_CHANNELS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, BasicBlock) and zero_init_last:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.forward_features(x).to(self.linear.weight.dtype))

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, 64]: the average over the pixels, which the last layer takes; in float32, or in
        float64 if x is."""
        reason = self._why_layer_by_layer(x)
        if reason is None:
            return self._trunk(x)
        if self.implementation == "cuda":
            raise RuntimeError(
                "implementation 'cuda' runs all layers as one operation, which cannot be where "
                f"{reason}"
            )
        a = apply_unit(x, self.conv1, self.bn1, implementation=self.implementation)
        a = self.layer3(self.layer2(self.layer1(a)))
        return a.mean((2, 3), dtype=torch.promote_types(a.dtype, torch.float32))

    def _trunk(self, x: Tensor) -> Tensor:
        """[N, 64]. Everything before the last layer, as one operation."""
        layers = [(self.conv1, self.bn1)]
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                layers += [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        training = self.bn1.training
        if training:
            torch._foreach_add_([bn.num_batches_tracked for _, bn in layers], 1)
        units = [unit_of(conv, bn) for conv, bn in layers]
        return ops.trunk(x, units, training=training, implementation=self.implementation)

    def _why_layer_by_layer(self, x: Tensor) -> str | None:
        """Why the layers cannot run as one operation; None if they can."""
        stages = (self.layer1, self.layer2, self.layer3)
        inside = [self.conv1, self.bn1, *stages]
        for stage in stages:
            for block in stage.children():
                inside += [block, *block.children()]
        training = self.bn1.training
        for module in inside:
            reason = None
            if type(module) not in (nn.Conv2d, nn.BatchNorm2d, BasicBlock, nn.Sequential):
                reason = f"is a {type(module).__name__}"
            elif (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                reason = "has hooks"
            elif type(module) is nn.BatchNorm2d and module.training != training:
                reason = "and bn1 are not both in training or both in evaluation"
            if reason is not None:
                name = next(name for name, other in self.named_modules() if other is module)
                return f"{name} {reason}"
        if torch.is_grad_enabled():
            if x.requires_grad:
                return "x requires a gradient"
            if not training and any(p.requires_grad for p in self.parameters()):
                return "gradients are wanted in evaluation"
        return None

    def extra_repr(self) -> str:
        return f"depth={self.depth}, implementation={self.implementation!r}"


def _stage(in_channels: int, channels: int, blocks: int, implementation: str) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, channels // in_channels, implementation)
    rest = (BasicBlock(channels, channels, 1, implementation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def check_depth(depth: int) -> None:
    """``depth`` is 6n + 2 for an n of at least 1; ValueError where not."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"depth must be 6n + 2 and at least 8 (8, 14, 20, 32, 44, 56, 110, 1202, ...), "
            f"got {depth}"
        )


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], int, int]:
    """The weights in a checkpoint, and the network they are of.

    Args:
        path: a file by ``torch.save`` that holds the weights as they are or under ``state_dict``,
            their keys perhaps prefixed ``module.`` (by DataParallel) or ``_orig_mod.`` (by
            torch.compile)

    Returns:
        state_dict: with the plain keys of ``FastResNet``
        depth: of the network
        num_classes: of its last layer

    Raises:
        FileNotFoundError, ValueError: as ``read_checkpoint``; or the file holds no option-A
            ResNet of this family
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path}: state_dict must be a dictionary of tensors")
    weights = {
        str(key).removeprefix("module.").removeprefix("_orig_mod."): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    blocks = sum(key.startswith("layer1.") and key.endswith(".conv1.weight") for key in weights)
    linear = weights.get("linear.weight")
    if blocks == 0 or linear is None or linear.dim() != 2:
        raise ValueError(
            f"checkpoint {path} must hold a ResNet-6n+2 with keys conv1, layer1.0.conv1, ..., "
            f"linear; got keys {', '.join(list(weights)[:3]) or 'none'}, ..."
        )
    check_holds(path, weights)
    # before a network is built for a file that only claims to hold one
    for stage, channels in enumerate(STAGE_CHANNELS, 1):
        for block in range(blocks):
            for conv in ("conv1", "conv2"):
                key = f"layer{stage}.{block}.{conv}.weight"
                if key not in weights or weights[key].shape[:1] != (channels,):
                    got = tuple(weights[key].shape) if key in weights else "none"
                    raise ValueError(
                        f"checkpoint {path}: ResNet-{6 * blocks + 2} must have {key} with "
                        f"{channels} filters, got {got}"
                    )
    return weights, 6 * blocks + 2, linear.shape[0]


def load_checkpoint(model: FastResNet, path: str | Path) -> None:
    """Load the weights in a checkpoint file into ``model``, all of them or none.

    Args:
        model: of the same depth and number of classes
        path: as for ``read_weights``

    Raises:
        FileNotFoundError, ValueError: as ``read_weights``; or depth, number of classes, a key or
            a shape differ from the model's, or ``check_weight`` refuses a tensor. The model is
            then as it was.
    """
    weights, depth, num_classes = read_weights(path)
    for name, ours, theirs in (
        ("depth", model.depth, depth),
        ("num_classes", model.num_classes, num_classes),
    ):
        if ours != theirs:
            raise ValueError(
                f"checkpoint {path} must have the model's {name} {ours}, got {theirs}"
            )
    expected = model.state_dict()
    # files from before PyTorch 0.4.1 do not count the batches
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = expected.keys() - weights.keys() - counters
    unknown = weights.keys() - expected.keys()
    if missing or unknown:
        what, key = ("lacks", min(missing)) if missing else ("has an unknown", min(unknown))
        raise ValueError(
            f"checkpoint {path} must have the keys of ResNet-{depth}: it {what} {key}"
        )
    for key, value in weights.items():
        check_weight(path, key, value, expected[key])
    with torch.no_grad():
        for key, value in weights.items():
            expected[key].copy_(value)
