"""The CIFAR ResNet-6n+2 family and how to load its published checkpoints (layer 2).

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_resnet_fast import ops
from cifar_resnet_fast.checkpoint import read_checkpoint
from cifar_resnet_fast.modules import (
    BasicBlock,
    apply_unit,
    conv3x3,
    unit_of,
    why_all_called,
    why_bn_called,
    why_called,
    why_conv_called,
)

STAGE_CHANNELS = (16, 32, 64)
SHORTCUTS = ("A", "B")


class FastResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images.

    A 3x3 convolution with 16 filters; three stages of n basic blocks with 16, 32 and 64
    channels, the second and third starting at stride 2; global average pool; linear.
    State-dict keys are the customary ones: ``conv1``, ``bn1``, ``layer1.0.conv1``, ...,
    ``linear``. Convolutions start from Kaiming's normal distribution, normalisations from 1 and 0.

    Args:
        depth: 6n + 2, at least 8; the paper's are 20, 32, 44, 56, 110 and 1202
        num_classes: at least 2
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``; may be set later, too
        zero_init_last: the last normalisation of each block starts with scale 0, so that the
            block starts as its shortcut (Goyal et al. 2017, section 5.1)
        shortcut: of the two blocks that change the shape of their input. ``A`` has no parameters;
            ``B`` is a 1x1 convolution and a normalisation, with keys ``layer2.0.shortcut.0`` and
            ``layer2.0.shortcut.1``
        width: all three numbers of channels are multiplied by it; ``cuda`` runs width 1 only

    ``forward(x)``: x [N, 3, H, W], any memory format, to logits [N, num_classes]. All but the last
    layer is one operation, ``ops.trunk``, as long as that computes what the modules inside stand
    for. If one of them is of another type or has other settings, has hooks or is traced, or if a
    gradient of x or gradients in evaluation are wanted, the layers run one by one, and those that
    no fused operation stands for are called as the modules that they are.

    Raises:
        ValueError: an argument breaks its rule
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        implementation: str = "auto",
        zero_init_last: bool = False,
        *,
        shortcut: str = "A",
        width: int = 1,
    ):
        super().__init__()
        check_depth(depth)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
        if type(width) is not int or width < 1:
            raise ValueError(f"width must be a whole number of at least 1, got {width!r}")
        if implementation == "cuda" and width != 1:
            raise ValueError(f"width must be 1 for implementation 'cuda', got {width}")
        self.depth = depth
        self.num_classes = num_classes
        self.shortcut = shortcut
        self.width = width

        blocks = (depth - 2) // 6
        channels = [width * count for count in STAGE_CHANNELS]
        self.conv1 = conv3x3(3, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])
        for stage, (before, after) in enumerate(
            zip([channels[0], *channels[:-1]], channels, strict=True), 1
        ):
            first = BasicBlock(before, after, min(stage, 2), implementation, shortcut)
            rest = (BasicBlock(after, after, 1, implementation) for _ in range(blocks - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            before = after
        self.linear = nn.Linear(channels[-1], num_classes)
        self.implementation = implementation
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, BasicBlock) and zero_init_last:
                nn.init.zeros_(module.bn2.weight)

    @property
    def implementation(self) -> str:
        """``auto`` or one of ``ops.IMPLEMENTATIONS``, of all layers."""
        return self._implementation

    @implementation.setter
    def implementation(self, name: str) -> None:
        if name not in ("auto", *ops.IMPLEMENTATIONS):
            raise ValueError(
                f"implementation must be one of auto, {', '.join(ops.IMPLEMENTATIONS)}, "
                f"got {name!r}"
            )
        self._implementation = name
        for module in self.modules():
            if isinstance(module, BasicBlock):
                module.implementation = name

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.forward_features(x)
        if isinstance(x, torch.fx.Proxy):
            return self.linear(pooled)
        last = self.linear
        if type(last) is nn.Linear:
            return last(pooled.to(last.weight.dtype))
        dtypes = (p.dtype for p in last.parameters() if p.is_floating_point())
        return last(pooled.to(next(dtypes, pooled.dtype)))

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, 64 * width]: the average over the pixels, which the last layer takes; in float32,
        or in float64 if x is."""
        units, reason = self._units(x)
        if reason is None:
            training = self.bn1.training
            if training:
                torch._foreach_add_([bn.num_batches_tracked for _, bn in units], 1)
            units = [unit_of(conv, bn) for conv, bn in units]
            return ops.trunk(x, units, training=training, implementation=self.implementation)
        if self.implementation == "cuda":
            raise RuntimeError(
                "implementation 'cuda' runs all layers as one operation, which cannot be where "
                f"{reason}"
            )
        a = apply_unit(x, self.conv1, self.bn1, implementation=self.implementation)
        a = self.layer3(self.layer2(self.layer1(a)))
        if isinstance(x, torch.fx.Proxy):
            return F.adaptive_avg_pool2d(a, 1).flatten(1)
        return a.mean((2, 3), dtype=torch.promote_types(a.dtype, torch.float32))

    def _units(self, x: Tensor) -> tuple[list[tuple[nn.Module, nn.Module]], str | None]:
        """Convolution and normalisation of every unit, and why they cannot run as one operation,
        or None; the list is whole only if they can."""
        reason = why_all_called(x)
        if reason is not None:
            return [], reason
        self._check_images(x)
        units = [(self.conv1, self.bn1)]
        for number in (1, 2, 3):
            name = f"layer{number}"
            stage = self._modules[name]
            reason = why_called(stage, nn.Sequential)
            if reason is not None:
                return units, f"{name} {reason}"
            for index, block in stage._modules.items():
                reason = why_called(block, BasicBlock)
                if reason is None and "shortcut" in block._modules:
                    reason = "has a shortcut with parameters"
                if reason is not None:
                    return units, f"{name}.{index} {reason}"
                inside = block._modules
                units.append((inside["conv1"], inside["bn1"]))
                units.append((inside["conv2"], inside["bn2"]))
        training, C, wants_gradient = self.bn1.training, 3, False
        for i, (conv, bn) in enumerate(units):
            wrong, reason = conv, why_conv_called(conv)
            if reason is None:
                K, stride = len(conv.weight), conv.stride[0]
                if conv.weight.shape[1] != C or not (i == 0 or K == C or (i % 2 and K == 2 * C)):
                    reason = f"takes {conv.weight.shape[1]} channels to {K} after one of {C}"
                elif stride != (2 if i and K != C else 1):
                    reason = f"has stride {stride}"
                C = K
            if reason is None:
                wrong, reason = bn, why_bn_called(bn)
            if reason is None and type(bn) is nn.SyncBatchNorm:
                reason = "is a SyncBatchNorm"
            if reason is None and bn.training != training:
                reason = "and bn1 are not both in training or both in evaluation"
            if reason is not None:
                name = next(name for name, other in self.named_modules() if other is wrong)
                return units, f"{name} {reason}"
            wants_gradient |= (
                conv.weight.requires_grad or bn.weight.requires_grad or bn.bias.requires_grad
            )
        if torch.is_grad_enabled():
            if x.requires_grad:
                return units, "x requires a gradient"
            if not training and wants_gradient:
                return units, "gradients are wanted in evaluation"
        return units, None

    def _check_images(self, x: Tensor) -> None:
        """What x must be for any implementation, in words of the images."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of images, got {type(x).__name__}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x must be images of a floating dtype, got {x.dtype}")
        if x.dim() != 4 or x.numel() == 0:
            raise ValueError(
                f"x must be images [N, C, H, W] with no axis empty, got shape {tuple(x.shape)}"
            )
        stem = self.conv1
        if type(stem) is nn.Conv2d:
            if x.shape[1] != stem.in_channels:
                raise ValueError(
                    f"x must be images of {stem.in_channels} channels, got shape {tuple(x.shape)}"
                )
            if x.device != stem.weight.device:
                raise ValueError(
                    f"x must be on the model's device {stem.weight.device}, got {x.device}"
                )

    def extra_repr(self) -> str:
        more = f", shortcut={self.shortcut!r}" if self.shortcut != "A" else ""
        more += f", width={self.width}" if self.width != 1 else ""
        return f"depth={self.depth}, implementation={self.implementation!r}{more}"


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
    return weights, 6 * blocks + 2, linear.shape[0]


def load_checkpoint(model: FastResNet, path: str | Path) -> None:
    """Load the weights in a checkpoint file into ``model``, all of them or none.

    Args:
        model: of the same depth and number of classes; torch.compile, DataParallel or
            DistributedDataParallel may wrap it
        path: as for ``read_weights``

    Raises:
        FileNotFoundError, ValueError: as ``read_weights``; or depth, number of classes, a key or
            a shape differ from the model's. The model is then as it was.
    """
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(
        model, "_orig_mod"
    ):
        model = getattr(model, "_orig_mod", None) or model.module
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
        if value.shape != expected[key].shape:
            raise ValueError(
                f"checkpoint {path}: {key} must have shape {tuple(expected[key].shape)}, "
                f"got {tuple(value.shape)}"
            )
    with torch.no_grad():
        for key, value in weights.items():
            expected[key].copy_(value)
