"""The trunk on the kernels of each implementation, against the plain network in float64.

Without a GPU the CUDA kernels run in the emulation, behind the operations and bindings that torch
calls on a GPU too; the Triton ones in Triton's interpreter.
"""

import copy

import emulation
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cifar_resnet_fast import FastResNet, ops, reference
from cifar_resnet_fast.ops._trunk import autograd as trunk_autograd
from cifar_resnet_fast.ops._trunk import cuda as trunk_cuda
from cifar_resnet_fast.ops._trunk import plain as plain_kernels
from cifar_resnet_fast.ops._trunk import schedule
from cifar_resnet_fast.ops._trunk.schedule import Kept
from cifar_resnet_fast.reference import Unit
from cifar_resnet_fast.verification.budget import assert_within_budget

half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
gpu = pytest.mark.gpu
# the interpreter takes half a minute for a ResNet-8, and gets bfloat16 wrong
STEPS = [  # implementation, dtype, depth, batch
    pytest.param("cuda", half, 14, 3, id="cuda-fp16-two-blocks-a-stage"),
    pytest.param("cuda", bf16, 14, 3, id="cuda-bf16-two-blocks-a-stage"),
    pytest.param("cuda", half, 8, 11, id="cuda-fp16-prime-batch"),
    pytest.param("cuda", bf16, 8, 1, id="cuda-bf16-one-picture"),
    pytest.param("triton", half, 8, 2, id="triton-fp16"),
    pytest.param("triton", half, 14, 129, id="triton-fp16-large", marks=gpu),
    pytest.param("triton", bf16, 14, 33, id="triton-bf16", marks=gpu),
    pytest.param("triton", fp32, 14, 33, id="triton-fp32", marks=gpu),
    pytest.param("cuda", half, 14, 400, id="cuda-fp16-large", marks=gpu),
    pytest.param("cuda", bf16, 20, 257, id="cuda-bf16-large", marks=gpu),
]
SHORT = [
    pytest.param("cuda", half, 8, 3, id="cuda"),
    pytest.param("triton", half, 8, 2, id="triton", marks=gpu),
]


class MaskedReLU:
    """ReLU whose gradient goes by given masks, one a call, or by its own; keeps those it used.

    ReLU's gradient is a discontinuity: where rounding decides a sign, a reference has to follow.
    """

    def __init__(self, masks: list[Tensor] | None = None):
        self.given, self.used = masks, []

    def __call__(self, z: Tensor) -> Tensor:
        mask = z > 0 if self.given is None else self.given[len(self.used)]
        self.used.append(mask)
        through = z * mask
        return through + (torch.relu(z) - through).detach()


class Problem:
    """Units with parameters that bite, pictures, and the gradient that comes back."""

    def __init__(self, depth: int, N: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(depth + N)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        blocks = (depth - 2) // 6
        channels = [(16, 3), *[(16, 16)] * (2 * blocks)]
        for K in (32, 64):
            channels += [(K, K // 2), *[(K, K)] * (2 * blocks - 1)]
        self.units = []
        for i, (K, C) in enumerate(channels):
            weight = randn(K, C, 3, 3) / (2 * C**0.5)
            if i % 3 == 2:  # either layout
                weight = weight.to(memory_format=torch.channels_last)
            vectors = (1 + 0.3 * randn(K), 0.3 * randn(K), randn(K), 1 + randn(K).abs())
            tensors = [tensor.to(device) for tensor in (weight, *vectors)]
            self.units.append(Unit(*tensors, momentum=0.1 + 0.01 * i, eps=1e-5 * (i + 1)))
        # four channels, as the loader leaves them, of which the fourth is none of the picture's
        pixels = 0.5 * randn(N, 4, 32, 32) - 2.3
        pixels[:, 3] = float("nan")
        pixels = pixels.to(device, dtype).to(memory_format=torch.channels_last)
        self.pictures = pixels[:, :3]
        self.dpooled = randn(N, 64).to(device)

    def copies(self, dtype: torch.dtype = fp32) -> list[Unit]:
        """The units anew, their parameters to be differentiated."""
        made = []
        for unit in self.units:
            tensors = [tensor.to(dtype).clone() for tensor in unit[:5]]
            for parameter in tensors[:3]:
                parameter.requires_grad_()
            made.append(Unit(*tensors, unit.momentum, unit.eps))
        return made

    def plain(self, dtype: torch.dtype, relu: MaskedReLU, monkeypatch) -> dict[str, Tensor]:
        """What autograd makes of the reference, with ``relu``."""
        units = self.copies(torch.float64 if dtype == torch.float64 else fp32)
        with monkeypatch.context() as patch:
            patch.setattr(F, "relu", relu)
            pooled = reference.trunk(self.pictures.to(dtype), units, training=True)
        (pooled * self.dpooled.to(pooled.dtype)).sum().backward()
        return results(pooled, units)

    def kernels(self, implementation: str) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What the kernels make of it, and the masks of their ReLUs in the reference's order."""
        units = [Unit(*[t.detach() for t in unit[:5]], *unit[5:]) for unit in self.copies()]
        *columns, momenta, eps = (list(column) for column in zip(*units, strict=True))
        module = trunk_autograd.kernels_of(implementation)
        pictures = module.pictures_for_kernels(self.pictures, self.pictures.dtype)
        pooled, *flat = trunk_autograd.trunk_fwd(
            implementation, pictures, *columns, momenta, eps, True
        )
        gradients = trunk_autograd.trunk_bwd(
            implementation, self.dpooled, pictures, flat, *columns[:2]
        )
        count = len(units)
        for i, unit in enumerate(units):
            for tensor, gradient in zip(unit[:3], gradients[i::count], strict=True):
                assert gradient.stride() == tensor.stride()
                tensor.grad = gradient
        return results(pooled, units), masks(Kept.of(flat, count))


def results(pooled: Tensor, units: list[Unit]) -> dict[str, Tensor]:
    made = {"pooled": pooled.detach()}
    for i, unit in enumerate(units):
        made |= {f"d{name} {i}": getattr(unit, name).grad for name in Unit._fields[:3]}
        made |= {f"{name} {i}": getattr(unit, name) for name in Unit._fields[3:5]}
    return made


def masks(kept: Kept) -> list[Tensor]:
    found = []
    for x, y1, norm1 in zip(kept.x, kept.y[1::2], kept.norm[1::2], strict=True):
        scale, shift = norm1[2:].double()[:, :, None, None]
        found += [x > 0, y1.double() * scale + shift > 0]
    return [*found, plain_kernels.positive(kept.mask)]


@pytest.mark.parametrize(("implementation", "dtype", "depth", "batch"), SHORT)
def test_gradients_go_where_they_are_to(implementation, dtype, depth, batch, kernels_run, device):
    """Into given memory, by the first trunk that has the weight, with the usual bits."""
    kernels_run(implementation)
    problem = Problem(depth, batch, dtype, device)
    units = problem.copies()
    weights = [unit.weight for unit in units]
    given = weights[:-1]  # the last has no place
    places = [torch.full_like(weight, float("nan")) for weight in given]

    def differentiate(times):
        with ops.gradients_into(list(zip(given, places, strict=True))):
            pooled = [
                ops.trunk(problem.pictures, units, training=True, implementation=implementation)
                for _ in range(times)
            ]
        return torch.autograd.grad(sum(pooled), weights, problem.dpooled)

    pooled = ops.trunk(problem.pictures, units, training=True, implementation=implementation)
    usual = torch.autograd.grad(pooled, weights, problem.dpooled)
    once = differentiate(1)
    for place, gradient, same in zip(places, once, usual, strict=False):
        assert gradient.data_ptr() == place.data_ptr()
        assert torch.equal(place, same)
    assert torch.equal(once[-1], usual[-1])
    for gradient, same in zip(differentiate(2), usual, strict=True):
        assert torch.equal(gradient, same + same), "two trunks' gradients are added up"


def test_the_schedule_is_the_network(device, monkeypatch):
    """Apart from any kernel: on plain PyTorch's, in float64, it gives autograd's own results."""
    problem = Problem(14, 2, torch.float64, device)
    units = [Unit(*[t.detach() for t in u[:5]], *u[5:]) for u in problem.copies(torch.float64)]
    kernels = plain_kernels.Kernels(units, problem.pictures)
    pooled, kept = schedule.forward(kernels, problem.pictures, len(units), keep=True)
    kernels = plain_kernels.Kernels(units, problem.pictures, kept)
    schedule.backward(kernels, problem.dpooled.double(), problem.pictures, kept)
    for unit, gradients in zip(units, kernels.gradients, strict=True):
        for tensor, gradient in zip(unit[:3], gradients, strict=True):
            tensor.grad = gradient
    ours, exact = results(pooled, units), problem.plain(torch.float64, MaskedReLU(), monkeypatch)
    for name, value in exact.items():
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error < 1e-10, f"{name}: {error:.3g}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("implementation", "dtype", "depth", "N"), STEPS)
def test_training_step(implementation, dtype, depth, N, kernels_run, device, monkeypatch):
    kernels_run(implementation)
    problem = Problem(depth, N, dtype, device)
    ours, our_masks = problem.kernels(implementation)
    relu = MaskedReLU()
    eager = problem.plain(dtype, relu, monkeypatch)
    exact = problem.plain(torch.float64, MaskedReLU(relu.used), monkeypatch)
    own_exact = problem.plain(torch.float64, MaskedReLU(our_masks), monkeypatch)
    for name, value in ours.items():
        four = (value, eager[name], exact[name], own_exact[name])
        assert_within_budget(name, *four, measures=["norm"])
    # a maximum over one unit's few channels is a matter of luck; over those of all units it is not
    for kind in {name.split()[0] for name in ours}:
        names = [name for name in ours if name.split()[0] == kind]
        four = (
            torch.cat([(v[name] / exact[name].abs().max()).flatten() for name in names])
            for v in (ours, eager, exact, own_exact)
        )
        ours_of_kind, eager_of_kind, *exact_of_kind = four
        assert_within_budget(
            kind,
            ours_of_kind.float(),
            eager_of_kind.float(),
            *exact_of_kind,
            measures=["maximum"],
        )


@pytest.mark.parametrize(("implementation", "dtype", "depth", "N"), SHORT)
def test_same_bits_every_time(implementation, dtype, depth, N, kernels_run, device):
    kernels_run(implementation)
    problem = Problem(depth, N, dtype, device)
    first, _ = problem.kernels(implementation)
    if device.type == "cpu":  # whatever the order in which warps advance
        emulation.load().set_order("first_warp_first")
    again, _ = problem.kernels(implementation)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("implementation", "dtype", "depth", "N"), [*STEPS[:2], *STEPS[4:6]])
def test_evaluation(implementation, dtype, depth, N, kernels_run, device):
    kernels_run(implementation)
    problem = Problem(depth, N, dtype, device)
    wide = [Unit(*[t.double() for t in unit[:5]], *unit[5:]) for unit in problem.units]
    exact = reference.trunk(problem.pictures.double(), wide, training=False)
    eager = reference.trunk(problem.pictures, problem.units, training=False)
    ours = ops.trunk(
        problem.pictures, problem.units, training=False, implementation=implementation
    )
    assert_within_budget("pooled", ours, eager, exact)


# --- as an operation of torch ------------------------------------------------------------------


@pytest.mark.parametrize(("implementation", "dtype", "depth", "N"), SHORT)
def test_autograd(implementation, dtype, depth, N, kernels_run, device):
    kernels_run(implementation)
    problem = Problem(depth, N, dtype, device)
    expected, _ = problem.kernels(implementation)

    units = problem.copies()
    units[3].weight.requires_grad_(False)
    pooled = ops.trunk(problem.pictures, units, training=True, implementation=implementation)
    pooled.backward(problem.dpooled)
    assert units[3].weight.grad is None
    for name, value in results(pooled, units).items():
        if name != "dweight 3":
            assert torch.equal(value, expected[name]), name

    # without gradients the same is computed, and less kept
    units = problem.copies()
    with torch.no_grad():
        pooled = ops.trunk(problem.pictures, units, training=True, implementation=implementation)
    assert torch.equal(pooled, expected["pooled"])
    assert torch.equal(units[0].running_mean, expected["running_mean 0"])


OFFLOADED = [SHORT[0], pytest.param("triton", half, 8, 2, id="triton")]


@pytest.mark.parametrize(("implementation", "dtype", "depth", "N"), OFFLOADED)
def test_activations_that_come_back_in_another_layout(
    implementation, dtype, depth, N, kernels_run, device
):
    """As from ``save_on_cpu(pin_memory=True)``, which does not keep strides."""
    kernels_run(implementation)
    problem = Problem(depth, N, dtype, device)
    expected, _ = problem.kernels(implementation)
    units = problem.copies()
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda t: t):
        pooled = ops.trunk(problem.pictures, units, training=True, implementation=implementation)
    pooled.backward(problem.dpooled)
    for name, value in results(pooled, units).items():
        assert torch.equal(value, expected[name]), name
    for unit in units:
        assert unit.weight.grad.stride() == unit.weight.stride()


@pytest.mark.parametrize("layout", ["contiguous", "three-channels-last", "wider-strides"])
def test_pictures_of_any_layout(layout, kernels_run, device):
    kernels_run("cuda")
    problem = Problem(8, 3, half, device)
    run = {"training": False, "implementation": "cuda"}
    expected = ops.trunk(problem.pictures, problem.units, **run)
    pictures = problem.pictures.contiguous()
    if layout == "three-channels-last":
        pictures = pictures.to(memory_format=torch.channels_last)
    if layout == "wider-strides":
        pictures = F.pad(pictures, (0, 5, 0, 1))[:, :, :32, :32]
    assert torch.equal(ops.trunk(pictures, problem.units, **run), expected)


def test_the_loaders_pictures_are_taken_as_they_lie(kernels_run, device):
    kernels_run("triton")
    N = 4
    images = torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8).to(device)
    draws = torch.zeros((6, N), dtype=torch.int32, device=device)
    values = torch.randn(256, 3).to(device, half)
    arguments = (images, torch.arange(N, device=device), values, draws)
    batch, _ = ops.load_batch(
        *arguments,
        torch.zeros((), dtype=torch.int64, device=device),
        batch_size=N,
        padding=4,
        implementation="triton",
    )
    assert trunk_cuda.pictures_for_kernels(batch, half).data_ptr() == batch.data_ptr()


def test_a_view_at_the_end_of_its_memory_is_copied(device):
    """The last pixel's fourth channel would lie outside."""
    N, size = 2, 4 * 32 * 32
    memory = torch.zeros(N * size - 1, dtype=half, device=device)
    pictures = memory.as_strided((N, 3, 32, 32), (size, 1, 4 * 32, 4))
    ours = trunk_cuda.pictures_for_kernels(pictures, half)
    assert ours.shape == (N, 4, 32, 32)
    assert ours.data_ptr() != pictures.data_ptr()


@pytest.mark.parametrize(("implementation", "dtype", "depth", "N"), SHORT)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_whole(training, implementation, dtype, depth, N, kernels_run, device):
    kernels_run(implementation)
    torch.compiler.reset()
    model = FastResNet(depth, implementation=implementation).to(device).train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(N, 3, 32, 32, device=device).to(dtype)
    with torch.set_grad_enabled(training):
        expected, got = model(x), compiled(x)
    assert torch.equal(expected, got)
    if training:
        for logits in (expected, got):
            logits.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not training), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c), name


@pytest.mark.parametrize("depth", [8, 1202])
def test_what_is_kept(depth):
    """The claim of trunk_autograd.py, and that ResNet-1202 fits 80 GB at batch 1024."""
    blocks = (depth - 2) // 6
    with torch.device("meta"):
        model = FastResNet(depth, implementation="cuda")
    weights = [p for p in model.parameters() if p.dim() == 4]
    with FakeTensorMode(allow_non_fake_inputs=True):
        pictures = torch.empty(1, 4, 32, 32, dtype=half)
        kept = trunk_autograd.fake_trunk_fwd(
            "cuda", pictures, [torch.empty(w.shape) for w in weights], keep=True
        )
    saved = Kept.of(kept[1:], len(weights))
    activations = [pictures, saved.mask, *saved.y, *saved.x]
    a_picture = sum(tensor.numel() * tensor.element_size() for tensor in activations)
    assert a_picture == (168 * blocks + 32 + 16 + 8 + 8 + 0.5) * 1024
    if depth == 1202:
        assert 1024 * a_picture < 36e9
        assert 128 * a_picture < 5e9


def test_what_is_kept_is_what_the_compiler_is_told(kernels_run, device):
    kernels_run("cuda")
    problem = Problem(8, 3, half, device)
    *columns, momenta, eps = (list(column) for column in zip(*problem.units, strict=True))
    pictures = trunk_cuda.pictures_for_kernels(problem.pictures, half)
    real = trunk_autograd.trunk_fwd("cuda", pictures, *columns, momenta, eps, True)
    told = trunk_autograd.fake_trunk_fwd("cuda", pictures, columns[0], keep=True)
    assert len(real) == len(told)
    for ours, fake in zip(real, told, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (fake.shape, fake.stride(), fake.dtype)
