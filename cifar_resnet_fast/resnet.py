"""The CIFAR ResNet-6n+2 family and the loading of its published checkpoints (layer 2).

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_resnet_fast import ops
from cifar_resnet_fast.errors import extra
from cifar_resnet_fast.modules import (
    BasicBlock,
    apply_unit,
    conv3x3,
    held,
    unit_of,
    why_all_called,
    why_bn_called,
    why_called,
    why_conv_called,
)
from cifar_resnet_fast.weights.pretrained import (
    NETWORK,
    WEIGHTS,
    check_fits,
    find_weights,
    read_state,
    read_weights,
    take,
    write_weights,
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
        depth: 6n + 2, at least 8; the paper has 20, 32, 44, 56, 110 and 1202
        num_classes: at least 2
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``; can also be set later
        zero_init_last: the last normalisation of each block starts with scale 0, so that the
            block starts as its shortcut (Goyal et al. 2017, section 5.1)
        shortcut: the shortcut of the two blocks that change the shape of their input. ``A`` has no
            parameters; ``B`` is a 1x1 convolution and a normalisation, with keys
            ``layer2.0.shortcut.0`` and ``layer2.0.shortcut.1``
        width: factor on the three numbers of channels; ``cuda`` runs width 1 only

    ``forward(x)``: x [N, 3, H, W], any memory format, to logits [N, num_classes]. All but the last
    layer is one operation, ``ops.trunk``, if that computes the same as the modules inside. If one
    of them is of another type or has other settings, has hooks or is traced, or if a gradient of x
    or gradients in evaluation are needed, the network falls back to layer-by-layer execution, in
    which modules without a fused operation are called themselves.

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
        self.card: dict[str, Any] = {}  # facts about trained weights

        blocks = (depth - 2) // 6
        channels = [width * count for count in STAGE_CHANNELS]
        self.conv1 = conv3x3(3, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])

        def stage(before: int, after: int, stride: int) -> nn.Sequential:
            first = BasicBlock(before, after, stride, implementation, shortcut)
            rest = (BasicBlock(after, after, 1, implementation) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        self.layer1 = stage(channels[0], channels[0], 1)
        self.layer2 = stage(channels[0], channels[1], 2)
        self.layer3 = stage(channels[1], channels[2], 2)
        self.linear = nn.Linear(channels[-1], num_classes)
        self.implementation = implementation
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, BasicBlock) and zero_init_last:
                nn.init.zeros_(module.bn2.weight)

    @property
    def implementation(self) -> str:
        """The implementation of all layers: ``auto`` or one of ``ops.IMPLEMENTATIONS``."""
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
        """[N, 64 * width]: the average over the pixels, the input of the last layer; in float32,
        or in float64 if x is."""
        pairs, reason = self._units(x)
        if reason is None:
            training = self.bn1.training
            if training:
                torch._foreach_add_([held(bn, "num_batches_tracked") for _, bn in pairs], 1)
            units = [unit_of(conv, bn) for conv, bn in pairs]
            return ops.trunk(x, units, training=training, implementation=self.implementation)
        if self.implementation == "cuda":
            raise RuntimeError(
                "implementation 'cuda' runs all layers as one operation, which is impossible if "
                f"{reason}"
            )
        a = apply_unit(x, self.conv1, self.bn1, implementation=self.implementation)
        a = self.layer3(self.layer2(self.layer1(a)))
        if isinstance(x, torch.fx.Proxy):
            return F.adaptive_avg_pool2d(a, 1).flatten(1)
        return a.mean((2, 3), dtype=torch.promote_types(a.dtype, torch.float32))

    def why_not_fused(self) -> str | None:
        """Why the layers before the last one run one by one, such as ``layer2.0 has a shortcut
        with parameters``; None if they are one operation for images without a gradient."""
        example = torch.empty((1, self.conv1.in_channels, 32, 32), device=self.conv1.weight.device)
        return self._units(example)[1]

    def _units(self, x: Tensor) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], str | None]:
        """Convolution and normalisation of every unit, and why they cannot run as one operation,
        or None. Only if they can is the list complete, with modules of these types."""
        reason = why_all_called(x)
        if reason is not None:
            return [], reason
        self._check_images(x)
        units = [(self.conv1, self.bn1)]
        for number in (1, 2, 3):
            name = f"layer{number}"
            stage: Any = self._modules[
                name
            ]  # the checks establish the types of it and of the blocks inside
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
        training, C = self.bn1.training, 3
        for i, (conv, bn) in enumerate(units):
            wrong: nn.Module = conv
            reason = why_conv_called(conv)
            if reason is None:
                K, taken = held(conv, "weight").shape[:2]
                stride = conv.stride[0]
                if taken != C or not (i == 0 or K == C or (i % 2 and K == 2 * C)):
                    reason = f"takes {taken} channels to {K} after one of {C}"
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
        if torch.is_grad_enabled():
            if x.requires_grad:
                return units, "x requires a gradient"
            if not training and any(
                held(conv, "weight").requires_grad
                or held(bn, "weight").requires_grad
                or held(bn, "bias").requires_grad
                for conv, bn in units
            ):
                return units, "gradients are needed in evaluation"
        return units, None

    def _check_images(self, x: Tensor) -> None:
        """Check x for any implementation, with errors in terms of images."""
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

    @classmethod
    def from_pretrained(cls, name: str | Path, implementation: str = "auto") -> "FastResNet":
        """A trained network, in evaluation mode, with the facts about it in its ``card``.

        Args:
            name: one of ``models()``, OWNER/NAME on the Hugging Face hub, a folder written by
                ``save_pretrained``, a run's folder, or a file that ``load_checkpoint`` takes
            implementation: as ``FastResNet`` takes it

        Raises:
            FileNotFoundError, OSError, ValueError: as ``pretrained.find_weights`` and
                ``pretrained.read_weights``
        """
        path = find_weights(name)
        weights = read_weights(path)
        model = cls(implementation=implementation, **weights.network)
        expected = model.state_dict()
        check_fits(path, weights.state, expected)
        take(weights.state, expected)
        model.card = dict(weights.card)
        return model.eval()

    def save_pretrained(self, folder: str | Path, **card: Any) -> None:
        """Write ``model.safetensors`` and ``config.json`` for ``from_pretrained``.

        Args:
            folder: created if it does not exist
            card: plain values about the network, in addition to ``self.card``: mean, std,
                class_names, dataset, accuracy, training

        Raises:
            OSError: a file cannot be written
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        network = {name: getattr(self, name) for name in NETWORK}
        write_weights(folder / WEIGHTS, self.state_dict(), {**network, **self.card, **card})

    def push_to_hub(self, repository: str, *, private: bool = False, **card: Any) -> str:
        """Upload the files of ``save_pretrained`` to the Hugging Face hub, with the user's token.

        Args:
            repository: OWNER/NAME; created if it does not exist
            private: whether a new repository is private
            card: as ``save_pretrained``

        Returns:
            the address of the commit

        Raises:
            MissingPackageError: the package huggingface_hub is not installed
        """
        with extra("hub"):
            from huggingface_hub import HfApi

        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **card)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder))

    def extra_repr(self) -> str:
        more = f", shortcut={self.shortcut!r}" if self.shortcut != "A" else ""
        more += f", width={self.width}" if self.width != 1 else ""
        return f"depth={self.depth}, implementation={self.implementation!r}{more}"


def check_depth(depth: int) -> None:
    """Raise ValueError unless ``depth`` is 6n + 2 for an n of at least 1."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"depth must be 6n + 2 and at least 8 (8, 14, 20, 32, 44, 56, 110, 1202, ...), "
            f"got {depth}"
        )


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load the weights in a file into ``model``, either all of them or none.

    Args:
        model: a ``FastResNet``, changed or not; torch.compile, DataParallel or
            DistributedDataParallel may wrap it
        path: as for ``pretrained.read_state``

    Raises:
        FileNotFoundError, ValueError: as ``pretrained.read_weights``; or depth, number of classes,
            shortcut, width, a key, a shape or the kind of a dtype differ from the model's. The
            model is then unchanged.
    """
    network: Any = model  # without its wrappers in the end
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(network, wrappers) or hasattr(network, "_orig_mod"):
        network = getattr(network, "_orig_mod", None) or network.module
    state, _ = read_state(path)
    expected = network.state_dict()
    try:
        check_fits(path, state, expected)
    except ValueError:
        # name a difference of the whole network rather than one of its keys
        for name, theirs in read_weights(path).network.items():
            if getattr(network, name) != theirs:
                raise ValueError(
                    f"checkpoint {path} must have the model's {name} {getattr(network, name)}, "
                    f"got {theirs}"
                ) from None
        raise
    take(state, expected)
