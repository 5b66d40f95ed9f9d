"""Weights in files: of this package, of its checkpoints, and published by others (layer 1).

The package's format is a folder with ``model.safetensors`` and ``config.json``, the card: depth,
num_classes, shortcut, width, mean, std, class_names, dataset, accuracy and how it was trained.
The networks of the package lie beside this module as NAME.safetensors and NAME.json.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cifar_resnet_fast.checkpoint import (
    check_holds,
    check_weight,
    read_checkpoint,
    write_atomically,
)
from cifar_resnet_fast.errors import MissingPackageError, extra, first_line

FOLDER = Path(__file__).parent
WEIGHTS, CARD = "model.safetensors", "config.json"
NETWORK = ("depth", "num_classes", "shortcut", "width")  # the arguments of FastResNet

# keys under which published files hold the weights, and prefixes of their names
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "state_dict_ema",
    "model",
    "net",
    "weights",
    "params",
)
_PREFIXES = re.compile(r"^(module|_orig_mod|model|net|encoder|backbone)\.")
_FAMILIES = (  # a key that only another family has, and the name of that family
    (r"layer4\.", "a ResNet of four stages, such as ResNet-18 or ResNet-50"),
    (r"layer\d\.\d+\.conv3\.", "a ResNet of bottleneck blocks"),
    (r"block1\.layer\.0\.", "a WideResNet"),
    (r"(features\.)?(denseblock1|dense1)\.", "a DenseNet"),
    (r"(cls_token|patch_embed\.|blocks\.0\.attn\.|vit\.)", "a vision transformer"),
    (r"features\.\d+\.", "a network of the VGG or MobileNet families"),
    (r"stages\.\d+\.", "a ConvNeXt or RegNet"),
)


class Weights(NamedTuple):
    """The content of a file, and the network that it belongs to.

    state: tensors under the keys of ``FastResNet``
    depth, num_classes, shortcut, width: as ``FastResNet`` takes them
    card: further facts, as plain values; empty if there are none
    """

    state: dict[str, Tensor]
    depth: int
    num_classes: int
    shortcut: str
    width: int
    card: dict[str, Any]

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of ``FastResNet``."""
        return {name: getattr(self, name) for name in NETWORK}


def models() -> list[str]:
    """The names of the networks in the package, for ``FastResNet.from_pretrained``."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def find_weights(name: str | Path) -> Path:
    """The file or folder of a name, downloaded if it is on a hub.

    Args:
        name: one of ``models()``, a file, a folder, or OWNER/NAME on the Hugging Face hub

    Raises:
        FileNotFoundError: nothing has that name
        OSError: it cannot be downloaded
    """
    if str(name) in models():
        return FOLDER / f"{name}.safetensors"
    path = Path(name)
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.suffix:
        return _downloaded(str(name))
    known = ", ".join(["a file", "a folder", *models()])
    raise FileNotFoundError(
        f"checkpoint {name} must be {known} or OWNER/NAME on the hub, found none there"
    )


def _downloaded(repository: str) -> Path:
    try:
        with extra("hub"):
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except MissingPackageError as error:
        raise FileNotFoundError(
            f"weights {repository} are neither a file nor a folder, and cannot be downloaded: "
            f"{error}"
        ) from None
    try:
        files = [hf_hub_download(repository, file) for file in (CARD, WEIGHTS)]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OSError(
            f"weights {repository} are neither a file nor a folder and cannot be downloaded: "
            f"{first_line(error)}"
        ) from None
    return Path(files[-1]).parent


def read_weights(path: str | Path) -> Weights:
    """The weights in a file, and the network they belong to.

    Args:
        path: as for ``read_state``; or a folder written by ``write_weights``, or a run's folder

    Raises:
        FileNotFoundError, ValueError: as ``read_state``; or the file holds no ResNet of this
            family
    """
    path = _file_in(Path(path))
    state, card = read_state(path)
    count = dict.fromkeys("123", 0)
    for key in state:
        found = re.fullmatch(r"layer([123])\.\d+\.conv1\.weight", key)
        if found:
            count[found[1]] += 1
    for pattern, family in _FAMILIES:
        foreign = next((key for key in state if re.match(pattern, key)), None)
        if foreign is not None:
            raise ValueError(
                f"checkpoint {path} must hold a CIFAR ResNet-6n+2, got {family}: it has the key "
                f"{foreign}"
            )
    blocks = list(count.values())
    for key, dims in (("conv1.weight", 4), ("linear.weight", 2)):
        if not any(blocks) or key not in state or state[key].dim() != dims:
            shape = f"of shape {tuple(state[key].shape)}" if key in state else "missing"
            raise ValueError(
                f"checkpoint {path} must hold a CIFAR ResNet-6n+2 with keys conv1, "
                f"layer1.0.conv1, ..., linear: {key} is {shape}; its keys are "
                f"{', '.join(list(state)[:3]) or 'none'}, ..."
            )
    if len(set(blocks)) != 1:
        raise ValueError(
            f"checkpoint {path} must hold the same number of blocks in each of three stages, got "
            f"{', '.join(map(str, blocks))}"
        )
    width = max(len(state["conv1.weight"]) // 16, 1)
    # before the memory of a network is allocated for a file that only claims to hold one
    for stage, block in itertools.product(range(3), range(blocks[0])):
        for conv in ("conv1", "conv2"):
            key, channels = f"layer{stage + 1}.{block}.{conv}.weight", 16 * width * 2**stage
            if key not in state or state[key].shape[:1] != (channels,):
                got = tuple(state[key].shape) if key in state else "none"
                raise ValueError(
                    f"checkpoint {path}: ResNet-{6 * blocks[0] + 2} must have {key} with "
                    f"{channels} filters, got {got}"
                )
    return Weights(
        state,
        6 * blocks[0] + 2,
        len(state["linear.weight"]),
        "B" if any(".shortcut." in key for key in state) else "A",
        width,
        card,
    )


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a file under the customary names, and its card.

    Args:
        path: a file by ``torch.save`` or by safetensors. The weights may be under ``state_dict``,
            ``model_state_dict``, ``model``, ``net``, ..., their names may have any of the prefixes
            ``module.``, ``_orig_mod.``, ``model.``, ``net.``, ``encoder.`` and ``backbone.``; the
            last layer may be called ``fc``, an option-B shortcut ``downsample``

    Raises:
        FileNotFoundError, ValueError: as ``read_checkpoint`` and ``check_holds``; or two tensors
            have one name
    """
    path = Path(path)
    content: dict[str, Any]
    if path.suffix == ".safetensors":
        content, card = _read_safetensors(path), _read_card(path)
    else:
        content = read_checkpoint(path)
        card = _card_of_checkpoint(content)
    while True:
        name = next((name for name in _WRAPPERS if name in content), None)
        if name is None or isinstance(content[name], Tensor):
            break
        wrapped: Any = content[name]
        if not isinstance(wrapped, dict):
            raise ValueError(
                f"checkpoint {path}: {name} must be a dictionary of tensors, "
                f"got a {type(wrapped).__name__}"
            )
        content = wrapped
    state: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            continue
        name = customary_name(str(key))
        if name in state:
            raise ValueError(
                f"checkpoint {path} must hold one network: {origin[name]} and {key} both stand "
                f"for {name}"
            )
        state[name], origin[name] = value, str(key)
    check_holds(path, state)
    return state, card


def customary_name(key: str) -> str:
    """The key of ``FastResNet`` that corresponds to a published key."""
    while _PREFIXES.match(key):
        key = _PREFIXES.sub("", key)
    key = re.sub(r"^fc\.", "linear.", key)
    return re.sub(r"^(layer\d\.\d+)\.downsample\.", r"\1.shortcut.", key)


def write_weights(path: Path, state: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write a safetensors file and its card beside it, each atomically.

    Args:
        path: NAME.safetensors; the card is NAME.json, or config.json beside model.safetensors
        state: tensors of any device and memory format
        card: plain values

    Raises:
        OSError: as ``write_atomically``
    """
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    write_atomically(path, save(tensors, metadata={"format": "pt"}))
    write_atomically(_card_of(path), (json.dumps(card, indent=2) + "\n").encode())


def _file_in(path: Path) -> Path:
    """The file with the weights in a folder."""
    if not path.is_dir():
        return path
    names = (WEIGHTS, "checkpoint.pt")
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"folder {path} must hold {' or '.join(names)}, found neither")
    return found


def _card_of(path: Path) -> Path:
    return path.with_name(CARD) if path.name == WEIGHTS else path.with_suffix(".json")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} must be a file, found none there")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path} must be a whole safetensors file: {first_line(error)}"
        ) from None


def _read_card(path: Path) -> dict[str, Any]:
    card = _card_of(path)
    if not card.is_file():
        return {}
    try:
        values = json.loads(card.read_text())
    except ValueError as error:
        raise ValueError(f"card {card} must be JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"card {card} must be a JSON object, got a {type(values).__name__}")
    return values


def _card_of_checkpoint(content: dict) -> dict[str, Any]:
    """The card in a checkpoint of this package; empty for other checkpoints."""
    card = {name: content[name] for name in ("mean", "std") if name in content}
    config, data = content.get("config"), content.get("data")
    if isinstance(config, dict):
        card |= {"dataset": config.get("dataset"), "training": config}
    if isinstance(data, dict) and "classes" in data:
        card["class_names"] = data["classes"]
    return card


def check_fits(path: str | Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that ``state`` can replace ``expected``: the same keys, with tensors that fit.

    Raises:
        ValueError: names the key that does not fit
    """
    # files written before PyTorch 0.4.1 do not count the batches
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = expected.keys() - state.keys() - counters
    unknown = state.keys() - expected.keys()
    if missing or unknown:
        what, key = ("lacks", min(missing)) if missing else ("has an unknown", min(unknown))
        raise ValueError(f"checkpoint {path} must have the keys of the model: it {what} {key}")
    for key, value in state.items():
        check_weight(path, key, value, expected[key])


def take(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Copy the values of ``state`` into the tensors ``expected``."""
    with torch.no_grad():
        for key, value in state.items():
            expected[key].copy_(value)
