"""Export of a network to one file: ``python -m cifar_resnet_fast.export`` (layer 5).

============  ==========================================================================
onnx          the network for evaluation, for ONNX Runtime and others
torch-export  the same as a torch.export program, for torch.export.load and AOTInductor
safetensors   the weights as they are, with a card, for ``FastResNet.from_pretrained``
============  ==========================================================================

The first two fold each normalisation into its convolution and take a batch of any size; with
``--bytes`` they also normalise the images. Every file is compared with the network on the CPU
before it is kept.
"""

import argparse
import copy
import io
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cifar_resnet_fast.checkpoint import read_checkpoint, write_atomically
from cifar_resnet_fast.errors import MissingPackageError, extra
from cifar_resnet_fast.resnet import FastResNet
from cifar_resnet_fast.training.logbook import read_metrics
from cifar_resnet_fast.weights.pretrained import NETWORK, find_weights, read_state, write_weights

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
_CHECKED_BATCHES = (1, 2, 37)


class Inference(nn.Module):
    """A network for evaluation alone, in plain PyTorch.

    Args:
        model: any ``FastResNet``, changed or not; it is copied
        mean, std: three numbers each, for images in 0 .. 1; if given, the images are bytes

    ``forward(images)``: [N, 3, H, W] normalised, or [N, H, W, 3] uint8 with mean and std, to
    logits [N, num_classes].
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: FastResNet,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ):
        super().__init__()
        self.network = folded(model)
        self.takes_bytes = mean is not None
        if self.takes_bytes:
            deviation = torch.tensor(std)
            self.register_buffer("scale", 1 / (255 * deviation))
            self.register_buffer("shift", -torch.tensor(mean) / deviation)

    def forward(self, images: Tensor) -> Tensor:
        if self.takes_bytes:
            images = images.to(self.scale.dtype) * self.scale + self.shift
            images = images.permute(0, 3, 1, 2)
        return self.network(images)


def folded(model: FastResNet) -> FastResNet:
    """A copy for evaluation, in which each normalisation is part of the convolution before it."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")]
    for parent in list(model.modules()):
        for first, second in pairs:
            conv, bn = parent._modules.get(first), parent._modules.get(second)
            if type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d:
                parent.add_module(first, fuse_conv_bn_eval(conv, bn))
                parent.add_module(second, nn.Identity())
    return model


def export(
    model: FastResNet,
    path: Path,
    to: str,
    *,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    card: dict[str, Any] | None = None,
) -> None:
    """Write ``model`` to ``path`` after the exported network was compared with it.

    Args:
        model: on the CPU, float32
        path: the file
        to: one of ``SUFFIXES``
        mean, std: as ``Inference``
        card: plain values that describe the network

    Raises:
        MissingPackageError: a package that the format needs is not installed
        ArithmeticError: the exported network does not compute the same as the model
        OSError: the file cannot be written
    """
    if to == "safetensors":
        write_weights(path, model.state_dict(), card or {})
        back, _ = read_state(path)
        for key, value in model.state_dict().items():
            if not torch.equal(back[key], value.cpu()):
                path.unlink()
                raise ArithmeticError(f"{path} does not hold the model's {key}")
        return
    network = Inference(model, mean, std)
    write = {"onnx": _onnx, "torch-export": _torch_export}[to]
    data, run = write(network, _images(network, 2), card or {})
    _compare(model, network, run)
    write_atomically(path, data)


def _images(network: Inference, count: int) -> Tensor:
    """Drawn images in the form that the network takes."""
    generator = torch.Generator().manual_seed(count)
    if network.takes_bytes:
        shape = (count, 32, 32, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(count, 3, 32, 32, generator=generator)


def _dynamic() -> dict[str, Any]:
    return {"dynamic_shapes": {"images": {0: torch.export.Dim("batch", min=1, max=2**16 - 1)}}}


def _onnx(
    network: Inference, images: Tensor, card: dict
) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    with extra("export"):
        import onnx  # noqa: F401 (torch imports it, too late for an error in one line)
        import onnxruntime
        import onnxscript  # noqa: F401

    with warnings.catch_warnings():
        # warnings about versions of operators, which are of no use to the user
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            **_dynamic(),
        )
    assert program is not None  # with dynamo=True
    proto = program.model_proto
    proto.metadata_props.add(key="card", value=json.dumps(card))
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return data, run


def _torch_export(
    network: Inference, images: Tensor, card: dict
) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    program = torch.export.export(network, (images,), **_dynamic())
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"card": json.dumps(card)})
    file.seek(0)
    loaded = torch.export.load(file).module()
    return file.getvalue(), loaded


@torch.no_grad()
def _compare(model: FastResNet, network: Inference, run: Callable[[Tensor], Tensor]) -> None:
    """Check that the error against float64 is at most twice the model's own in float32."""
    exact = copy.deepcopy(model).double().eval()
    model = copy.deepcopy(model).eval()
    exact.implementation = model.implementation = "reference"
    for count in _CHECKED_BATCHES:
        given = _images(network, count)
        images = given
        if network.takes_bytes:
            images = (given * network.scale + network.shift).permute(0, 3, 1, 2)
        wanted = exact(images.double())
        allowed = 2 * (model(images) - wanted).norm() + 1e-6 * wanted.norm()
        error = (run(given) - wanted).norm()
        if not error <= allowed:
            raise ArithmeticError(
                f"the exported network must compute the same as the model, its logits of "
                f"{count} images err by {error:.3g}, at most {allowed:.3g} is allowed"
            )


def card_of(path: Path, model: FastResNet) -> dict[str, Any]:
    """The network's card; that of a run's checkpoint has the accuracy from the run's metrics."""
    card = {**{name: getattr(model, name) for name in NETWORK}, **model.card}
    if path.name == "checkpoint.pt":
        step = read_checkpoint(path).get("step")
        row = next((row for row in read_metrics(path.parent)[0] if row["step"] == step), None)
        if row is not None:
            validation = card.get("training", {}).get("validation")
            card["evaluated_on"] = "validation" if validation else "test"
            card |= {"accuracy": row.get("test_accuracy"), "epochs": row["epoch"]}
    return card


def main(arguments: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        exit status: 0 done, 1 the file does not compute the same as the model, 2 bad input
    """
    parser = argparse.ArgumentParser(
        prog="python -m cifar_resnet_fast.export",
        description="Export a trained network to one file, which is checked on the CPU.",
    )
    parser.add_argument("checkpoint", help="a file, a run's folder or a name")
    parser.add_argument("--to", required=True, choices=list(SUFFIXES), help="format of the file")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file (default: the checkpoint's name, in this folder)",
    )
    parser.add_argument(
        "--bytes",
        action="store_true",
        help="the network takes uint8 images [N, 32, 32, 3] and normalises them itself",
    )
    options = parser.parse_args(arguments)
    try:
        path = find_weights(options.checkpoint)
        if (path / "checkpoint.pt").is_file():
            path = path / "checkpoint.pt"
        model = FastResNet.from_pretrained(path, "reference")
        card = card_of(path, model)
        if options.bytes and options.to == "safetensors":
            raise ValueError("--bytes must be left out with --to safetensors, which has no images")
        if options.bytes and not {"mean", "std"} <= card.keys():
            raise ValueError(f"--bytes needs mean and std, which {path} does not have")
        out = options.out or Path(Path(options.checkpoint).stem + SUFFIXES[options.to])
        if out.suffix != SUFFIXES[options.to]:
            raise ValueError(f"--out must end in {SUFFIXES[options.to]}, got {out}")
        statistics = {name: card[name] for name in ("mean", "std")} if options.bytes else {}
        export(model, out, options.to, card=card, **statistics)
    except ArithmeticError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, MissingPackageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: ResNet-{model.depth}, {out.stat().st_size:,} bytes, checked on the CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
