"""Weights in files: other people's layouts, this package's own, and what is refused and why."""

import argparse
import copy
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_resnet import PlainResNet
from torch import nn

import cifar_resnet_fast
from cifar_resnet_fast import FastResNet, load_checkpoint, models
from cifar_resnet_fast.data.datasets import NAMES
from cifar_resnet_fast.verification.budget import assert_within_budget
from cifar_resnet_fast.weights import pretrained
from cifar_resnet_fast.weights.pretrained import read_weights

ROOT = Path(cifar_resnet_fast.__file__).parents[1]


class BlockB(nn.Module):
    """The block of the published option-B networks."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.downsample = None
        if c_in != c:
            conv = nn.Conv2d(c_in, c, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + shortcut)


class ResNetB(PlainResNet):
    def __init__(self, n, num_classes=10):
        super().__init__(n, num_classes)
        for stage, (c_in, c) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [BlockB(c_in, c, c // c_in)] + [BlockB(c, c, 1) for _ in range(n - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = self.linear
        del self.linear

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.avg_pool2d(x, x.shape[3]).flatten(1))


@pytest.fixture
def trained():
    """A ResNet-8 whose weights and statistics are not those of a new one."""
    torch.manual_seed(0)
    model = FastResNet(8)
    model(torch.randn(8, 3, 8, 8))
    return model.eval()


def same(ours, theirs):
    assert list(ours) == list(theirs)
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- what people have --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["backbone.", "encoder.module.", "module.model.", "_orig_mod.net.", "model.encoder."]
)
@pytest.mark.parametrize(
    "wrapper", ["net", "model", "model_state_dict", "state_dict_ema", "weights", "params"]
)
def test_prefixes_and_wrappers(tmp_path, trained, prefix, wrapper):
    state = {prefix + key: value for key, value in trained.state_dict().items()}
    torch.save({"epoch": 3, wrapper: state}, tmp_path / "file.pth")
    model = FastResNet(8)
    load_checkpoint(model, tmp_path / "file.pth")
    assert same(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("keys", ["downsample", "shortcut"])
@pytest.mark.parametrize("training", [True, False])
def test_option_b_is_the_published_network(tmp_path, keys, training):
    torch.manual_seed(0)
    plain = ResNetB(2).double()
    state = plain.state_dict()
    if keys == "shortcut":
        state = {key.replace("downsample", "shortcut"): value for key, value in state.items()}
    torch.save(state, tmp_path / "b.pth")
    weights = read_weights(tmp_path / "b.pth")
    assert weights.network == {"depth": 14, "num_classes": 10, "shortcut": "B", "width": 1}
    fast = FastResNet(14, shortcut="B").double()
    load_checkpoint(fast, tmp_path / "b.pth")
    x = torch.randn(4, 3, 8, 8).double()
    for model in (plain.train(training), fast.train(training)):
        F.cross_entropy(model(x), torch.arange(4)).backward()
    torch.testing.assert_close(fast(x), plain(x))
    gradients = {pretrained.customary_name(name): p.grad for name, p in plain.named_parameters()}
    for name, p in fast.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=lambda m, name=name: f"{name} {m}")


@pytest.mark.parametrize("kind", ["half-the-bits", "autocast"])
def test_option_b_in_16_bits(kind, device):
    model = FastResNet(8, shortcut="B").to(device)
    x = torch.randn(4, 3, 8, 8, device=device)
    if kind == "autocast":
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(x)
    else:
        logits = model(x.bfloat16())
        assert logits.dtype == torch.float32
    logits.float().sum().backward()
    assert model.layer2[0].shortcut[0].weight.grad.dtype == torch.float32


def test_option_b_with_the_triton_kernels(device):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    ours = FastResNet(8, shortcut="B", implementation="triton").to(device)
    eager, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    eager.implementation = exact.implementation = "reference"
    x = torch.randn(4, 3, 8, 8, device=device)
    gradients = []
    for model, images in ((ours, x), (eager, x), (exact, x.double())):
        model(images).square().sum().backward()
        gradients.append(model.layer2[0].shortcut[0].weight.grad)
    assert_within_budget("dweight", *gradients)


def test_option_b_is_refused_by_cuda_by_name(kernels_run):
    kernels_run("cuda")
    model = FastResNet(8, shortcut="B", implementation="cuda")
    with pytest.raises(RuntimeError, match="if layer2.0 has a shortcut with parameters"):
        model(torch.randn(2, 3, 32, 32).half())


def test_shortcut_must_be_one_of_two():
    with pytest.raises(ValueError, match="shortcut must be one of A, B, got 'C'"):
        FastResNet(8, shortcut="C")


# --- what is refused ---------------------------------------------------------------------------


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


REFUSED = {
    "four-stages": (
        lambda s: {**s, "layer4.0.conv1.weight": torch.ones(1)},
        "must hold a CIFAR ResNet-6n.2, got a ResNet of four stages.* the key layer4.0.conv1.weig",
    ),
    "bottleneck": (
        lambda s: {**s, "layer1.0.conv3.weight": torch.ones(1)},
        "got a ResNet of bottleneck blocks: it has the key layer1.0.conv3.weight",
    ),
    "vgg": (lambda s: {"features.0.weight": torch.ones(1)}, "got a network of the VGG"),
    "wide": (lambda s: {"block1.layer.0.conv1.weight": torch.ones(1)}, "got a WideResNet"),
    "densenet": (lambda s: {"dense1.0.bn1.weight": torch.ones(1)}, "got a DenseNet"),
    "transformer": (lambda s: {"cls_token": torch.ones(1)}, "got a vision transformer"),
    "uneven": (
        lambda s: {**s, "layer1.1.conv1.weight": torch.ones(1)},
        "must hold the same number of blocks in each of three stages, got 2, 1, 1",
    ),
    "key": (without("layer2.0.bn2.bias"), "it lacks layer2.0.bn2.bias$"),
    "unknown-key": (
        lambda s: {**s, "projector.weight": torch.ones(1)},
        "unknown projector.weight",
    ),
    "integers": (
        lambda s: {**s, "bn1.bias": torch.zeros(16, dtype=torch.int64)},
        "bn1.bias must be of a floating dtype, got torch.int64",
    ),
    "two-networks": (
        lambda s: {**s, "module.bn1.bias": torch.zeros(16)},
        "must hold one network: bn1.bias and module.bn1.bias both stand for bn1.bias",
    ),
    "shortcut": (
        lambda s: FastResNet(8, shortcut="B").state_dict(),
        "must have the model's shortcut A, got B",
    ),
    "width": (lambda s: FastResNet(8, width=2).state_dict(), "the model's width 1, got 2"),
    "numpy": (
        lambda s: {"state_dict": s, "accuracy": np.float64(0.9)},
        r"it holds a numpy[\w.]*scalar; if you trust it, read it with torch.load\(.*anew",
    ),
    "namespace": (
        lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)},
        "it holds a argparse.Namespace; if you trust it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_the_reason_and_changes_nothing(tmp_path, trained, name):
    change, message = REFUSED[name]
    path = tmp_path / "wrong.pt"
    torch.save(change(trained.state_dict()), path)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(trained, path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert same(trained.state_dict(), before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        ("<!DOCTYPE html><html>404</html>", "it is an HTML page"),
    ],
)
def test_what_is_no_checkpoint_at_all(tmp_path, text, message):
    (tmp_path / "file.pt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "file.pt")


@pytest.mark.parametrize("damage", ["cut", "header", "text"])
def test_damaged_safetensors(tmp_path, trained, damage):
    path = tmp_path / "file.safetensors"
    save_file(trained.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-100], "header": b"\xff" * 8 + data[8:], "text": b"no"}[damage])
    with pytest.raises(ValueError, match="must be a whole safetensors file") as error:
        load_checkpoint(FastResNet(8), path)
    assert "\n" not in str(error.value)


# --- the package's own form --------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"shortcut": "B"}, {"width": 2, "num_classes": 7}])
def test_save_and_load(tmp_path, settings):
    model = FastResNet(8, **settings).to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path / "new" / "folder", mean=[0.5] * 3, accuracy=0.9)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        "model.safetensors",
        "config.json",
    }
    back = FastResNet.from_pretrained(tmp_path / "new" / "folder", implementation="reference")
    assert same(back.state_dict(), model.state_dict())
    assert not back.training
    assert back.implementation == "reference"
    assert back.card["accuracy"] == 0.9
    assert (back.shortcut, back.width) == (model.shortcut, model.width)
    back.save_pretrained(tmp_path / "again", accuracy=0.8)
    card = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (card["mean"], card["accuracy"], card["depth"]) == ([0.5] * 3, 0.8, 8)


def test_models_of_the_package(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    assert models() == []
    pretrained.write_weights(
        tmp_path / "resnet8-shapes.safetensors", trained.state_dict(), {"accuracy": 0.5}
    )
    assert models() == ["resnet8-shapes"]
    model = FastResNet.from_pretrained("resnet8-shapes")
    assert same(model.state_dict(), trained.state_dict())
    assert model.card == {"accuracy": 0.5}
    with pytest.raises(
        FileNotFoundError,
        match="nix must be a file, a folder, resnet8-shapes or ",
    ):
        FastResNet.from_pretrained("nix")


@pytest.mark.parametrize("name", models())
def test_every_network_of_the_package_has_a_whole_card(name):
    card = FastResNet.from_pretrained(name).card
    known = {"mean", "std", "class_names", "dataset", "accuracy", "training"}
    assert known | {*pretrained.NETWORK} <= card.keys()
    assert card["dataset"] in NAMES  # --eval finds it on any machine


def test_damaged_card(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    for text, message in (("{", "must be JSON"), ("[]", "must be a JSON object, got a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            FastResNet.from_pretrained(tmp_path)


def test_torch_hub(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    model = torch.hub.load(str(ROOT), "pretrained", str(tmp_path), source="local")
    assert same(model.state_dict(), trained.state_dict())
    assert torch.hub.load(str(ROOT), "resnet", source="local", depth=14).depth == 14


def test_import_is_light():
    heavy = ["safetensors", "huggingface_hub", "matplotlib", "rich", "torchvision", "triton"]
    code = f"import sys, cifar_resnet_fast; print(set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


# --- the hub -----------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs."""

    files: dict[str, bytes]

    def _answer(self, with_body: bool) -> None:
        name = self.path.rpartition("/")[2]
        known = self.path == f"/someone/network/resolve/main/{name}" and name in self.files
        self.send_response(200 if known else 404)
        body = self.files[name] if known else b""
        if known:
            self.send_header("ETag", f'"{len(body)}-{name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def log_message(self, *_):
        pass


DOWNLOAD = """
import sys
from cifar_resnet_fast import FastResNet
try:
    model = FastResNet.from_pretrained(sys.argv[1])
    print(model.depth, model.card["accuracy"], float(model.linear.bias.double().sum()))
except OSError as error:
    print(error)
"""


def test_download_from_a_hub(tmp_path, trained):
    pytest.importorskip("huggingface_hub")
    trained.save_pretrained(tmp_path, accuracy=0.75)
    files = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    handler = type("HubOfFiles", (Hub,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        for name in ("someone/network", "someone/nothing"):
            done = subprocess.run(
                [sys.executable, "-c", DOWNLOAD, name],
                env=environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=120,
            )
            if name == "someone/network":
                total = float(trained.linear.bias.detach().double().sum())
                assert done.stdout == f"8 0.75 {total}\n", done.stderr
            else:
                assert (
                    "someone/nothing are neither a file nor a folder and cannot be" in done.stdout
                )
    finally:
        server.shutdown()


def test_upload_to_a_hub(trained, monkeypatch):
    """Which calls the client gets; it uploads nothing here."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def create_repo(self, repository, **settings):
            calls.append((repository, settings))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append((repo_id, FastResNet.from_pretrained(folder_path)))
            return "the commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert trained.push_to_hub("someone/network", private=True, accuracy=0.5) == "the commit"
    (created, settings), (uploaded, model) = calls
    assert created == uploaded == "someone/network"
    assert settings == {"private": True, "exist_ok": True}
    assert same(model.state_dict(), trained.state_dict())
    assert model.card["accuracy"] == 0.5
