"""Networks in one file: what it computes, what it says, and what is not kept."""

import json
from dataclasses import replace

import pytest
import torch
from test_api import TINY
from torch import nn

from cifar_resnet_fast import FastResNet, export, load_checkpoint, train
from cifar_resnet_fast.checkpoint import save_checkpoint
from cifar_resnet_fast.export import Inference, folded, main
from cifar_resnet_fast.verification.budget import assert_within_budget

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def network(**settings) -> FastResNet:
    """A ResNet-8 with statistics of its own in every normalisation."""
    torch.manual_seed(0)
    model = FastResNet(8, **settings)
    for _ in range(20):
        model(torch.randn(16, 3, 8, 8))
    return model.eval()


def loaded(path):
    """A function of images that runs a file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(path.read_bytes())
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("images", ["bytes", "normalised"])
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_file_computes_what_the_network_does(tmp_path, to, images, shortcut):
    if to == "onnx":
        pytest.importorskip("onnxscript")
    model = network(shortcut=shortcut)
    model.save_pretrained(tmp_path / "model", mean=MEAN, std=STD)
    path = tmp_path / f"file{export.SUFFIXES[to]}"
    flags = ["--bytes"] if images == "bytes" else []
    assert main([str(tmp_path / "model"), "--to", to, "--out", str(path), *flags]) == 0
    run = loaded(path)
    for count in (1, 5):
        drawn = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
        x = ((drawn / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
        with torch.no_grad():
            eager, exact = model(x), Inference(model).double()(x.double())
            made = run(drawn if images == "bytes" else x.contiguous())
        # the bytes are normalised in another order of operations: measured against that order's
        if images == "normalised":
            assert_within_budget("logits", made, eager, exact, measures=("norm",))
        else:
            torch.testing.assert_close(made, eager)


def test_folded_network_has_no_normalisation_and_is_the_network():
    model = network(shortcut="B").double()
    model.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=True).double()
    short = folded(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in short.modules())
    x = torch.randn(3, 3, 8, 8).double()
    torch.testing.assert_close(short(x), model(x))
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()), "a copy"


def test_a_run_becomes_a_pretrained_network(tmp_path):
    made = train(replace(TINY, out=str(tmp_path / "run")))
    out = tmp_path / "resnet8-shapes.safetensors"
    assert main([str(tmp_path / "run"), "--to", "safetensors", "--out", str(out)]) == 0
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["accuracy"] == made.accuracy
    assert (card["evaluated_on"], card["epochs"], card["depth"]) == ("test", 2, 8)
    assert len(card["class_names"]) == 10
    assert card["training"]["lr"] == 0.1
    model = FastResNet.from_pretrained(out)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), made.model.state_dict().values(), strict=True)
    )
    load_checkpoint(FastResNet(8), out)


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_wrong_file_is_not_kept(tmp_path, to, monkeypatch, capsys):
    if to == "onnx":
        pytest.importorskip("onnxscript")
    network().save_pretrained(tmp_path / "model")

    def wrong(model):
        model = folded(model)
        model.layer2[0].conv1.bias.data += 0.01
        return model

    monkeypatch.setattr(export, "folded", wrong)
    out = tmp_path / f"file{export.SUFFIXES[to]}"
    assert main([str(tmp_path / "model"), "--to", to, "--out", str(out)]) == 1
    assert "must compute the same as the model, its logits of 1 images err" in (
        capsys.readouterr().err
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("none.pt --to onnx", "none.pt must be a file, a folder"),
        ("model --to onnx --bytes", "--bytes needs mean and std, which model does not have"),
        ("model --to safetensors --bytes", "--bytes must be left out with --to safetensors"),
        ("model --to onnx --out file.pt2", "--out must end in .onnx, got file.pt2"),
        ("other.pt --to onnx", "got a ResNet of four stages"),
    ],
)
def test_bad_input(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    FastResNet(8).save_pretrained("model")
    save_checkpoint(tmp_path / "other.pt", {"layer4.0.conv1.weight": torch.ones(1)})
    assert main(flags.split()) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
