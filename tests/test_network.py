"""``FastResNet`` behaves as any module does, whatever runs its layers."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from cifar_resnet_fast import FastResNet, ops

HERE = [
    "reference",
    "cuda",
    pytest.param("triton", marks=pytest.mark.gpu),  # half a minute a step in the interpreter
]


def network(implementation: str, device: torch.device) -> FastResNet:
    torch.manual_seed(0)
    return FastResNet(8, implementation=implementation).to(device)


def pictures(device: torch.device, N: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 32, 32, generator=generator).to(device, torch.float16)


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, gradients and buffers after a forward and a backward pass."""
    logits = model(x)
    logits.square().sum().backward()
    made = {"logits": logits.detach()}
    made |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return made | dict(model.named_buffers())


def assert_same_bits(ours: dict, theirs: dict) -> None:
    for (name, value), other in zip(ours.items(), theirs.values(), strict=True):
        assert torch.equal(value, other), name


@pytest.fixture(params=HERE)
def model(request, kernels_run, device):
    if request.param != "reference":
        kernels_run(request.param)
    return network(request.param, device)


@pytest.fixture
def trunk_runs(monkeypatch):
    """How often the layers ran as one operation."""
    calls = []
    run = ops.trunk

    def counting(*arguments, **settings):
        calls.append(settings["implementation"])
        return run(*arguments, **settings)

    monkeypatch.setattr(ops, "trunk", counting)
    return calls


def test_half_the_bits_and_float32_weights(model, device):
    """Without autocast: activations have the pictures' dtype, parameters and logits float32."""
    made = step(model, pictures(device))
    assert {value.dtype for value in made.values()} == {torch.float32, torch.int64}
    counters = [v for name, v in made.items() if name.endswith("num_batches_tracked")]
    assert [int(counter) for counter in counters] == [1] * 7


def test_autocast_is_the_same(model, device):
    """But for the last layer, which autocast runs in 16 bits, too."""
    twin = copy.deepcopy(model)
    logits = model(pictures(device))
    with torch.autocast(device.type, torch.float16):
        same = twin(pictures(device).float())
    assert same.dtype == torch.float16
    torch.testing.assert_close(same.float(), logits, rtol=2e-3, atol=2e-3)
    assert_same_bits(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_copies_and_state_dicts(model, device):
    x = pictures(device)
    twin = copy.deepcopy(model)
    first = {name: value.clone() for name, value in step(model, x).items()}
    assert_same_bits(first, step(twin, x))
    other = network(model.implementation, device)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_evaluation_and_training_take_turns(model, device):
    x = pictures(device)
    with torch.no_grad():
        trained = model(x)
        before = copy.deepcopy(model.state_dict())
        evaluated = model.eval()(x)
    assert_same_bits(before, model.state_dict())
    assert not torch.equal(trained, evaluated)
    with torch.no_grad():
        assert torch.equal(model.train()(x), trained)  # by the batch's statistics, as before
    assert not torch.equal(before["bn1.running_mean"], model.bn1.running_mean)


def test_distributed_data_parallel(model, device, tmp_path):
    expected = step(copy.deepcopy(model), pictures(device))
    alone = {"rank": 0, "world_size": 1, "init_method": f"file://{tmp_path}/rendezvous"}
    dist.init_process_group("gloo", **alone)
    try:
        made = step(DistributedDataParallel(model), pictures(device))
    finally:
        dist.destroy_process_group()
    assert_same_bits(made, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [56, 1202])
def test_memory_of_a_step(depth, device):
    """What trunk_autograd.py says is kept, the kernels' working set, and nothing else."""
    N, blocks = 128, (depth - 2) // 6
    model = FastResNet(depth, implementation="cuda").to(device)
    x = pictures(device, N)
    parameters = sum(p.numel() for p in model.parameters())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x).square().sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    kept = N * (168 * blocks + 65) * 1024
    # prepared weights forward and backward, gradients; dz and its successor; two sets of slabs
    weights = parameters * (2 + 2 + 4)
    working = 3 * N * 32 * 1024 + 2 * 200 * 9 * 64 * 64 * 4
    assert kept <= taken <= 1.02 * (kept + weights + working)
    assert taken < 10e9


# --- where layers go one by one ----------------------------------------------------------------


def with_hook(model):
    model.layer2[0].register_forward_hook(lambda *_: model.seen.append("layer2.0"))


def with_gradient_hook(model):
    model.layer1.register_full_backward_hook(lambda *_: model.seen.append("layer1"))


def with_frozen_statistics(model):
    model.layer3.eval()


def with_parametrization(model):
    parametrizations.weight_norm(model.layer1[0].conv1)


def with_another_block(model):
    model.layer3.append(nn.Identity())


ONE_BY_ONE = {
    "hook": (with_hook, "layer2.0 has hooks"),
    "backward-hook": (with_gradient_hook, "layer1 has hooks"),
    "frozen": (with_frozen_statistics, "layer3.0.bn1 and bn1 are not both in training"),
    "parametrized": (with_parametrization, "layer1.0.conv1 is a ParametrizedConv2d"),
    "other-block": (with_another_block, "layer3.1 is a Identity"),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_layers_go_one_by_one(name, device, trunk_runs):
    change, reason = ONE_BY_ONE[name]
    # in float64, where every layer runs in plain PyTorch: on a GPU, too, only the way differs
    changed, plain = (network(name, device).double() for name in ("auto", "reference"))
    changed.seen = []
    change(changed)
    x = pictures(device).double()
    made = changed(x)
    made.square().sum().backward()
    assert trunk_runs == []
    expected = plain(x)
    assert trunk_runs == ["reference"]
    if name != "frozen":
        torch.testing.assert_close(made, expected)
    if "hook" in name:
        assert changed.seen == [reason.split()[0]]

    model = network("cuda", device)
    change(model)
    with pytest.raises(RuntimeError, match=f"'cuda' runs all layers as one .* if {reason}"):
        model(x)


def test_gradients_of_the_pictures(device, trunk_runs):
    x = pictures(device).float().requires_grad_()
    network("auto", device)(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert trunk_runs == []
    with pytest.raises(RuntimeError, match="is impossible if x requires a gradient"):
        network("cuda", device)(x)


def test_gradients_in_evaluation(device, trunk_runs):
    model = network("auto", device).eval()
    model(pictures(device)).sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0
    assert trunk_runs == []
    with torch.no_grad():
        model(pictures(device))
    model.requires_grad_(False)(pictures(device))
    assert trunk_runs == ["auto", "auto"]


def test_hooks_on_the_network_and_its_last_layer_need_no_detour(device, trunk_runs):
    model, seen = network("auto", device), []
    model.register_forward_hook(lambda *_: seen.append("network"))
    model.linear.register_forward_hook(lambda *_: seen.append("linear"))
    model(pictures(device))
    assert seen == ["linear", "network"]
    assert trunk_runs == ["auto"]
