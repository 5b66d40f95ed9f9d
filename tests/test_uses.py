"""What people do with a network in their own code: each row of docs/uses.md, tried out.

A use is a function of a model and a batch of images that returns what can be compared. It is run
on the plain PyTorch network and on ``FastResNet`` with the same weights, in float64 on the CPU by
the reference, and in float32 by the Triton kernels, interpreted if there is no GPU.
"""

import copy
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_resnet import PlainResNet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from cifar_resnet_fast import ConvBNReLU, FastResNet, load_checkpoint, ops
from cifar_resnet_fast.verification.budget import assert_within_budget

TABLE = Path(__file__).parents[1] / "docs" / "uses.md"
USES: dict[str, Callable[[nn.Module, Tensor], object]] = {}
KERNELS = set()  # the uses that are tried with the Triton kernels, too


def use(kernels: bool = True):
    def register(function):
        USES[function.__name__] = function
        if kernels:
            KERNELS.add(function.__name__)
        return function

    return register


def flat(value: object) -> list[Tensor]:
    """All tensors in a nest."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in flat(item)]
    return [torch.tensor(value, dtype=torch.float64)]


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits, gradients of the parameters, and running statistics after a training step."""
    model.zero_grad()
    logits = model(x)
    F.cross_entropy(logits.flatten(1), torch.arange(len(x), device=x.device) % 3).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [logits, gradients, [b for b in model.buffers() if b.is_floating_point()]]


def twins(dtype: torch.dtype, implementation: str, device) -> tuple[nn.Module, FastResNet]:
    torch.manual_seed(0)
    plain, fast = PlainResNet(1), FastResNet(8, implementation=implementation)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fast.load_state_dict(plain.state_dict())
    return plain.to(device, dtype), fast.to(device, dtype)


def images(dtype: torch.dtype, device, N: int = 4, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, side, side, generator=generator, dtype=torch.float64).to(
        device, dtype
    )


# --- changed layers ----------------------------------------------------------------------------


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def swapped(model: nn.Module, place: str, new: nn.Module, keep_state: bool = True) -> None:
    """Put ``new`` where the module at ``place`` was, with its weights."""
    old = model.get_submodule(place)
    new = new.to(next(model.parameters()))
    if keep_state:
        new.load_state_dict(old.state_dict(), strict=False)
    model.get_submodule(place.rpartition(".")[0]).add_module(place.rpartition(".")[2], new)


@use()
def subclass_of_a_layer(model, x):
    swapped(model, "layer1.0.conv1", ScaledConv(16, 16, 3, padding=1, bias=False))
    swapped(model, "layer2.0.bn2", ShiftedNorm(32))
    return step(model, x)


@use()
def patched_forward(model, x):
    conv, bn = model.layer2[0].conv2, model.bn1
    conv.forward = lambda x: 3 * F.conv2d(x, conv.weight, padding=1)
    bn.forward = lambda x: type(bn).forward(bn, x) - 0.5
    return step(model, x)


@use()
def other_settings_of_a_layer(model, x):
    torch.manual_seed(2)
    block, made = model.layer1[0], []
    for settings in (
        {"bias": True, "padding": 1},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "groups": 4},
        {"padding": 2, "kernel_size": 5},
    ):
        settings = {"kernel_size": 3, "bias": False, **settings}
        block.conv1 = nn.Conv2d(16, 16, **settings).to(x)
        with torch.no_grad():
            made.append(model(x))
    return made


@use()
def settings_changed_in_place(model, x):
    made = []
    model.layer1[0].conv2.dilation = model.layer1[0].conv2.padding = (2, 2)
    model.layer2[0].bn1.momentum, model.layer2[0].bn1.eps = 0.3, 0.1
    made.append(step(model, x))
    model.conv1.stride = (2, 2)
    made.append(model(x))
    return made


@use()
def other_normalisations(model, x):
    torch.manual_seed(2)
    made = []
    for new in (
        nn.GroupNorm(4, 16),
        nn.Identity(),
        nn.BatchNorm2d(16, affine=False),
        nn.BatchNorm2d(16, track_running_stats=False),
    ):
        model.layer1[0].bn1 = new.to(x)
        with torch.no_grad():
            made += [model.train()(x), model.eval()(x)]
    model.train()
    swapped(model, "bn1", nn.GroupNorm(2, 16), keep_state=False)
    return [*made, step(model, x)]


@use(kernels=False)  # by name, Triton refuses 10 channels
def other_numbers_of_channels(model, x):
    """What physical pruning leaves: fewer channels between the convolutions of a block."""
    block = model.layer1[0]
    block.conv1.weight = nn.Parameter(block.conv1.weight[:10].detach())
    block.bn1 = nn.BatchNorm2d(10).to(x)
    block.conv2.weight = nn.Parameter(block.conv2.weight[:, :10].detach())
    return step(model, x)


@use(kernels=False)
def grey_images(model, x):
    swapped(model, "conv1", nn.Conv2d(1, 16, 3, padding=1, bias=False), keep_state=False)
    torch.manual_seed(2)
    nn.init.normal_(model.conv1.weight)
    return step(model, x[:, :1])


@use()
def replaced_last_layer(model, x):
    torch.manual_seed(2)
    made = []
    for new in (
        nn.Identity(),
        nn.Linear(64, 100),
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)),
    ):
        model.linear = new.to(x)
        with torch.no_grad():
            made.append(model(x))
    return made


@use(kernels=False)
def changed_model_saved_and_loaded(model, x):
    torch.manual_seed(2)

    def change(model):
        swapped(model, "layer1.0.bn1", nn.GroupNorm(4, 16), keep_state=False)
        model.linear = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).to(x)

    other = copy.deepcopy(model)
    change(model)
    change(other)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other(x)


@use(kernels=False)
def whole_model_pickled(model, x):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return step(torch.load(file, weights_only=False), x)


# --- hooks and what is built on them -----------------------------------------------------------


@use()
def hooks_inside_blocks(model, x):
    """Activations and gradients of inner layers."""
    seen = []
    model.layer1[0].conv1.register_forward_hook(lambda m, i, o: seen.append(o))
    model.layer2[0].bn2.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    model.layer3[0].conv2.register_full_backward_hook(lambda m, i, o: seen.append(o[0]))
    model.layer3[0].bn1.register_forward_hook(lambda m, i, o: 2 * o)
    made = step(model, x)
    assert len(seen) == 3
    return made + seen


@use(kernels=False)
def hooks_on_all_modules(model, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(o))
    try:
        model(x)
    finally:
        handle.remove()
    convolutions = [o for o in seen if o.dim() == 4]
    return [sum(o.sum() for o in convolutions)]


@use()
def pruning(model, x):
    for module in (model.conv1, model.layer2[0].conv1):
        prune.l1_unstructured(module, "weight", amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = []
    for _ in range(2):
        made.append(step(model, x)[0])
        optimizer.step()
    return made


@use()
def weight_norm(model, x):
    conv = model.layer1[0].conv1
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(conv)
    with torch.no_grad():
        conv.weight_g.mul_(2)
    return step(model, x)


@use()
def parametrization(model, x):
    parametrizations.weight_norm(model.layer1[0].conv1)
    with torch.no_grad():
        model.layer1[0].conv1.parametrizations.weight.original0.mul_(2)
    return step(model, x)


@use(kernels=False)
def quantisation_aware_training(model, x):
    from torch.ao import quantization

    model = model.float().train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    prepared = quantization.prepare_qat(model)
    prepared(x.float())
    ranges = [m for m in prepared.modules() if isinstance(m, quantization.MinMaxObserver)]
    assert len(ranges) == 15  # 7 convolutions, 7 normalisations, the last layer
    assert all(bool(m.max_val.isfinite().all()) and m.max_val.numel() for m in ranges)
    return [m.max_val.abs().max() > 0 for m in ranges]


@use(kernels=False)
def static_quantisation(model, x):
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x, mapping = x.float(), quantization.get_default_qconfig_mapping("x86")
    prepared = prepare_fx(model.float().eval(), mapping, (x,))
    with torch.no_grad():
        prepared(x)
        quantized = convert_fx(prepared)
        return quantized(x).double()


@use(kernels=False)
def counting_operations_and_parameters(model, x):
    thop, torchinfo = pytest.importorskip("thop"), pytest.importorskip("torchinfo")
    shown = torchinfo.summary(copy.deepcopy(model), input_data=x, verbose=0)
    counted = thop.profile(copy.deepcopy(model), inputs=(x,), verbose=False)
    return [shown.total_params, shown.total_mult_adds, *counted]


@use(kernels=False)
def flop_counter(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(model, display=False) as counter:
        model(x).sum().backward()
    counts = counter.get_flop_counts()
    by_module = {name.partition(".")[2]: sum(ops.values()) for name, ops in counts.items()}
    return [counter.get_total_flops(), by_module["layer2.0.conv1"]]


@use()
def grad_cam(model, x):
    """Class activation maps from an inner layer, in evaluation."""
    kept = {}

    def keep(module, inputs, output):
        kept["a"] = output
        output.register_hook(lambda gradient: kept.update(da=gradient))

    model.eval().layer3[0].conv1.register_forward_hook(keep)
    model(x)[:, 1].sum().backward()
    return (kept["da"].mean((2, 3), keepdim=True) * kept["a"]).sum(1).relu()


# --- statistics, tracing, transforms -----------------------------------------------------------


@use()
def update_bn(model, x):
    from torch.optim.swa_utils import AveragedModel
    from torch.optim.swa_utils import update_bn as update

    averaged = AveragedModel(model)
    update([x, 2 * x], averaged)
    return [b for b in averaged.module.buffers() if b.is_floating_point()]


@use()
def statistics_frozen_in_part(model, x):
    model.layer1.eval()
    model.layer3[0].bn2.eval()
    return step(model, x)


@use(kernels=False)
def jit_trace(model, x):
    traced = torch.jit.trace(model.eval(), x)
    return traced(torch.cat([x, -x]))


@use()
def fx_trace(model, x):
    traced = torch.fx.symbolic_trace(model)
    names = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"conv1", "layer2.0.bn2", "linear"} <= names
    return [step(traced, x), traced.eval()(x[:2])]


@use(kernels=False)
def feature_extractor(model, x):
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = ["layer1.0.conv1", "layer2", "linear"]
    return create_feature_extractor(model, return_nodes=nodes)(x)


@use(kernels=False)
def torch_export(model, x):
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
    assert all("cifar_resnet_fast" not in str(node.target) for node in program.graph.nodes)
    return program.module()(torch.cat([x, -x]))


@use()
def functional_gradients(model, x):
    """torch.func.grad, and by vmap one gradient an image."""
    from torch.func import functional_call, grad, vmap

    parameters = {name: p.detach() for name, p in model.eval().named_parameters()}

    def loss(parameters, image, label):
        logits = functional_call(model, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    labels = torch.arange(len(x), device=x.device)
    whole = grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), labels))(parameters)
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    return [whole["conv1.weight"], each["layer2.0.conv2.weight"]]


@use(kernels=False)
def double_backward(model, x):
    """A gradient penalty: second derivatives by create_graph=True."""
    loss = F.cross_entropy(model(x), torch.arange(len(x), device=x.device))
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (loss + sum(g.square().sum() for g in gradients)).backward()
    return [p.grad for p in model.parameters()]


@use()
def gradient_of_the_images(model, x):
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return x.grad


@use()
def activations_kept_on_the_host(model, x):
    with torch.autograd.graph.save_on_cpu():
        return step(model, x)


@use()
def activation_checkpoints(model, x):
    from torch.utils.checkpoint import checkpoint

    made = checkpoint(model, x, use_reentrant=False)
    made.square().sum().backward()
    return [made, model.conv1.weight.grad]


@use(kernels=False)
def data_parallel(model, x):
    """Replicas as DataParallel makes them for two GPUs; and the wrapper itself, without one."""
    replication = sys.modules["torch.nn.parallel.replicate"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            replication,
            "_broadcast_coalesced_reshape",
            lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
        )
        replicas = replication.replicate(model, [0, 0])
    logits = [replica(part) for replica, part in zip(replicas, x.chunk(2), strict=True)]
    torch.cat(logits).square().sum().backward()
    return [*logits, [p.grad for p in model.parameters()], nn.DataParallel(model)(x)]


@use(kernels=False)
def compiled(model, x):
    torch.compiler.reset()
    return step(torch.compile(model, backend="aot_eager"), x)


@use()
def deep_copy(model, x):
    model.layer1[0].conv1.register_forward_hook(lambda m, i, o: 2 * o)
    return step(copy.deepcopy(model), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", USES)
def test_is_as_with_the_plain_network(name):
    plain, fast = twins(torch.float64, "auto", "cpu")
    x = images(torch.float64, "cpu")
    torch.manual_seed(3)
    expected = flat(USES[name](plain, x))
    torch.manual_seed(3)
    made = flat(USES[name](fast, x))
    assert len(expected) == len(made) > 0
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_is_so_with_the_triton_kernels(name, device):
    """All that a use gives, as one vector: at most twice the error of plain PyTorch in float32."""
    pytest.importorskip("triton")
    vectors = []
    for dtype, ours in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model = twins(dtype, "triton", device)[ours]
        torch.manual_seed(3)
        parts = flat(USES[name](model, images(dtype, device)))
        vectors.append(torch.cat([part.to(dtype).flatten() for part in parts]))
    exact, eager, made = vectors
    assert_within_budget(name, made, eager, exact, measures=("norm",))


# --- what has no twin in the plain network -----------------------------------------------------


def test_second_derivatives_of_the_kernels_are_refused(device):
    model = twins(torch.float32, "triton", device)[1]
    with pytest.raises(RuntimeError, match="no second derivatives, which create_graph=True"):
        double_backward(model, images(torch.float32, device))


def test_second_derivatives_of_a_unit_are_refused(device):
    x = torch.randn(2, 16, 4, 4, device=device, requires_grad=True)
    unit = ConvBNReLU(16, 16, implementation="triton").to(device)
    with pytest.raises(RuntimeError, match="no second derivatives, which create_graph=True"):
        torch.autograd.grad(unit(x).sum(), x, create_graph=True)


def changes(model):
    yield "layer1.0.conv1 has a bias", nn.Conv2d(16, 16, 3, padding=1)
    yield "layer1.0.conv1 has padding", nn.Conv2d(16, 16, 3, padding=0, bias=False)
    yield "layer1.0.conv1 is a ScaledConv", ScaledConv(16, 16, 3, padding=1, bias=False)
    yield "layer1.0.conv1 has stride", nn.Conv2d(16, 16, 3, 2, padding=1, bias=False)


@pytest.mark.parametrize("place", range(4))
def test_one_operation_that_cannot_be_is_refused_by_name(place, kernels_run):
    kernels_run("cuda")
    model = FastResNet(8, implementation="cuda")
    reason, model.layer1[0].conv1 = list(changes(model))[place]
    with pytest.raises(RuntimeError, match=f"as one operation, which is impossible if {reason}"):
        model(images(torch.float16, "cpu"))


def test_units_around_a_called_one_stay_fused(device, monkeypatch):
    model = twins(torch.float32, "triton", device)[1]
    model.layer2[0].bn1.register_forward_hook(lambda *_: None)
    fused, run = [], ops.conv_bn_relu
    monkeypatch.setattr(ops, "conv_bn_relu", lambda *a, **s: fused.append(1) or run(*a, **s))
    model(images(torch.float32, device))
    assert len(fused) == 6, "of the 7 units of a ResNet-8"


def test_called_layers_take_16_bits_with_float32_weights(device):
    """As the fused ones do: activations have the dtype of the images, all else is float32."""
    model = twins(torch.float32, "auto", device)[1]
    seen = []
    model.layer1[0].conv1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    logits = model(images(torch.bfloat16, device))
    logits.sum().backward()
    assert seen == [torch.bfloat16]
    assert logits.dtype == model.layer1[0].conv1.weight.grad.dtype == torch.float32


def test_implementation_takes_effect_everywhere(device, monkeypatch):
    model = twins(torch.float32, "reference", device)[1]
    model.implementation = "triton"
    named, run = [], ops.conv_bn_relu
    monkeypatch.setattr(
        ops, "conv_bn_relu", lambda *a, **s: named.append(s["implementation"]) or run(*a, **s)
    )
    model.layer1[0].register_forward_hook(lambda *_: None)
    model(images(torch.float32, device))
    assert named == ["triton"] * 7
    with pytest.raises(ValueError, match="implementation must be one of auto.*got 'magic'"):
        model.implementation = "magic"
    assert model.implementation == "triton"


@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_features_and_width(implementation, device):
    model = FastResNet(8, width=2, implementation=implementation).to(device)
    x = images(torch.float32, device)
    with torch.no_grad():
        features = model.eval().forward_features(x)
        assert features.shape == (4, 128)
        assert torch.equal(model(x), model.linear(features))
    assert model.layer3[0].conv2.weight.shape == (128, 128, 3, 3)


def test_width_that_cannot_be():
    with pytest.raises(ValueError, match="width must be 1 for implementation 'cuda', got 2"):
        FastResNet(8, width=2, implementation="cuda")
    for width in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"width must be a whole number of .* got {width}"):
            FastResNet(8, width=width)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 1, 32, 32), ValueError, "x must be images of 3 channels, got shape (2, 1,"),
        (torch.ones(3, 32, 32), ValueError, "x must be images [N, C, H, W] with no axis empty"),
        (torch.ones(0, 3, 32, 32), ValueError, "x must be images [N, C, H, W] with no axis empty"),
        (torch.ones(2, 3, 8, 8).byte(), TypeError, "x must be images of a floating dtype, got"),
        (torch.ones(2, 3, 8, 8, device="meta"), ValueError, "x must be on the model's device cpu"),
        ([[0.0]], TypeError, "x must be a tensor of images, got list"),
    ],
    ids=["grey", "one-image", "none", "bytes", "device", "list"],
)
def test_errors_about_images_name_them(x, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        FastResNet(8)(x)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "parallel"])
def test_loading_into_a_wrapped_model(wrap, tmp_path):
    model, other = FastResNet(8), FastResNet(8)
    torch.save(wrap(model).state_dict(), tmp_path / "weights.pt")
    load_checkpoint(wrap(other), tmp_path / "weights.pt")
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_row_of_the_table_is_a_test():
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    names = [re.findall(r"`(\w+)` \|$", row) for row in rows[1:]]
    assert [name for (name,) in names] == [*USES], "docs/uses.md, last column"
