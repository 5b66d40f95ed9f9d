"""The network: sizes, names, shapes, and how checkpoints load."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_resnet_fast import ConvBNReLU, FastResNet, load_checkpoint
from cifar_resnet_fast.weights.pretrained import read_weights

PARAMETERS = {  # DESIGN.md, from the paper's table 6 and the published implementations
    20: 269_722,
    32: 464_154,
    44: 658_586,
    56: 853_018,
    110: 1_727_962,
    1202: 19_421_274,
}


@pytest.mark.parametrize(("depth", "parameters"), PARAMETERS.items())
def test_parameter_counts_are_the_papers(depth, parameters):
    with torch.device("meta"):
        model = FastResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters


class PlainBlock(nn.Module):
    """The published implementations' block, written with PyTorch's own modules."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.stride = stride

    def forward(self, x):
        short = x
        if self.stride == 2:
            quarter = self.conv1.out_channels // 4
            short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + short)


class PlainResNet(nn.Module):
    def __init__(self, n, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (c_in, c) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [PlainBlock(c_in, c, c // c_in)] + [PlainBlock(c, c, 1) for _ in range(n - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


@pytest.mark.parametrize("training", [True, False])
def test_is_the_plain_network(training):
    plain, fast = PlainResNet(2).double(), FastResNet(14, implementation="reference").double()
    assert list(plain.state_dict()) == list(fast.state_dict())
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fast.load_state_dict(plain.state_dict())
    plain.train(training)
    fast.train(training)
    x, labels = torch.randn(5, 3, 32, 32).double(), torch.arange(5)
    for model in (plain, fast):
        F.cross_entropy(model(x), labels).backward()
    torch.testing.assert_close(fast(x), plain(x))
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, name=name: f"{name}: {m}")
    for (name, b), c in zip(plain.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(c, b, msg=lambda m, name=name: f"{name}: {m}")


def test_initialisation():
    torch.manual_seed(0)
    model = FastResNet(56)
    weight = model.layer3[4].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert (model.bn1.weight == 1).all()
    assert (model.bn1.bias == 0).all()


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 21, 57])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2.*got {depth}$"):
        FastResNet(depth)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        FastResNet(8, num_classes=1)
    with pytest.raises(ValueError, match="implementation must be one of auto.*got 'magic'"):
        FastResNet(8, implementation="magic")


def test_conv_bn_relu_module():
    unit = ConvBNReLU(16, 32, stride=2)
    assert set(unit.state_dict()) >= {"conv.weight", "bn.weight", "bn.running_mean"}
    x = torch.randn(2, 16, 9, 7)
    a = unit(x, shortcut=torch.ones(2, 32, 5, 4))
    torch.testing.assert_close(
        a, F.relu(F.batch_norm(unit.conv(x), None, None, training=True) + 1)
    )
    assert unit.bn.num_batches_tracked == 1


# --- checkpoints ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:checkpoint .* holds no checksums")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_published_layouts_load(tmp_path, prefix, wrapped, legacy):
    plain = PlainResNet(1)
    state = {prefix + key: value for key, value in plain.state_dict().items()}
    content = {"state_dict": state, "best_prec1": 91.7} if wrapped else state
    path = tmp_path / "published.th"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert read_weights(path)[1:5] == (8, 10, "A", 1)
    model = FastResNet(8)
    load_checkpoint(model, path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_without_batch_counters(tmp_path):
    state = FastResNet(8).state_dict()
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(old, tmp_path / "old.th")
    load_checkpoint(FastResNet(8), tmp_path / "old.th")


def quantised(state):
    return torch.quantize_per_tensor(state["conv1.weight"], 0.1, 0, torch.qint8)


def nested():
    return torch.nested.nested_tensor([torch.ones(8), torch.ones(8)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: FastResNet(14).state_dict(), "must have the model's depth 8, got 14"),
        (lambda s: FastResNet(8, 100).state_dict(), "the model's num_classes 10, got 100"),
        (lambda s: {k: v for k, v in s.items() if k != "bn1.bias"}, "it lacks bn1.bias"),
        (lambda s: {**s, "extra": torch.ones(1)}, "it has an unknown extra"),
        (lambda s: {**s, "bn1.bias": torch.ones(3)}, r"bn1.bias must have shape \(16,\), got"),
        (lambda s: {**s, "conv1.weight": s["conv1.weight"].to_sparse()}, "got a sparse_coo one"),
        (lambda s: {**s, "conv1.weight": quantised(s)}, "conv1.weight must be a.*a quantised one"),
        (lambda s: {**s, "bn1.bias": torch.ones(16, device="meta")}, "bn1.bias.*a meta one"),
        (lambda s: {**s, "bn1.bias": nested()}, "bn1.bias must be a dense.*a nested one"),
        (lambda s: {**s, "bn1.bias": torch.ones(1).expand(10**9)}, "hold the 4.* bytes of its"),
        (lambda s: {**s, "bn1.bias": torch.full((16,), math.nan)}, "bn1.bias must be finite.*nan"),
        (
            lambda s: {**s, "bn1.bias": torch.full((16,), 1e300, dtype=torch.float64)},
            "in torch.float32.*inf",
        ),
        (lambda s: {**s, "bn1.running_var": -torch.ones(16)}, "running_var must be 0 or more"),
        (lambda s: {**s, "bn1.bias": torch.ones(16, dtype=torch.int64)}, "be of a floating dtype"),
        (lambda s: {**s, "bn1.bias": torch.ones(16) * 1j}, "bn1.bias must be of a floating"),
        (lambda s: {"weights": torch.ones(3)}, "must hold a CIFAR ResNet-6n"),
        (lambda s: {"state_dict": 3}, "state_dict must be a dictionary"),
    ],
    ids=[
        "depth",
        "classes",
        "missing",
        "unknown",
        "shape",
        "sparse",
        "quantised",
        "meta",
        "nested",
        "expanded",
        "nan",
        "too-large",
        "negative-variance",
        "integers",
        "complex",
        "other-network",
        "no-dictionary",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_checkpoints_are_named_and_change_nothing(tmp_path, change, message):
    model = FastResNet(8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "wrong.pt"
    torch.save(change(FastResNet(8).state_dict()), path)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(model, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_zero_init_last_makes_blocks_their_shortcuts():
    networks = []
    for zero in (False, True):
        torch.manual_seed(0)
        networks.append(FastResNet(14, zero_init_last=zero))
    usual, zero = (network.state_dict() for network in networks)
    changed = {name for name in usual if not torch.equal(usual[name], zero[name])}
    assert changed == {f"layer{s}.{b}.bn2.weight" for s in (1, 2, 3) for b in (0, 1)}
    assert all(not zero[name].any() for name in changed)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).relu()
    assert torch.equal(networks[1].layer1(x), x)


def test_no_network_is_built_for_a_file_that_only_names_its_layers(tmp_path):
    """ResNet-120002 would take 7 GB and a minute."""
    state = FastResNet(8).state_dict()
    one = torch.ones(1)
    state |= {
        f"layer{stage}.{block}.conv1.weight": one for stage in (1, 2, 3) for block in range(20_000)
    }
    torch.save(state, tmp_path / "tall.pt")
    began = time.monotonic()
    with pytest.raises(ValueError, match="ResNet-120002 must have layer1.0.conv1.weight with 16"):
        read_weights(tmp_path / "tall.pt")
    assert time.monotonic() - began < 10
