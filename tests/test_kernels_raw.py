"""The kernels in the dataflow where activations travel raw: normalised on load, sums left behind.

A residual block between two others, forward and backward, against float64 and eager autograd.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from cifar_resnet_fast.verification.budget import assert_within_budget

pytest.importorskip("triton")

from cifar_resnet_fast.kernels import bn, launch
from cifar_resnet_fast.kernels.conv3x3_bwd import conv3x3_bwd
from cifar_resnet_fast.kernels.conv3x3_fwd import conv3x3_fwd

EPS = 1e-5


class Block:
    """x = relu(bn0(raw) + below); y1 = conv1(x); y2 = conv2(relu(bn1(y1))); a = relu(bn2(y2) + s)

    where s is x, or at stride 2 a tensor of its own (the option-A shortcut's part is elsewhere).
    """

    def __init__(self, N, C, K, H, W, stride, dtype, device, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape, dtype=torch.float32):
            value = torch.randn(shape, generator=generator).to(device, dtype)
            return (
                value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value
            )

        self.stride = stride
        out = (N, K, -(-H // stride), -(-W // stride))
        self.leaves = {
            "raw": 0.5 * randn(N, C, H, W, dtype=dtype) - 2.3,
            "below": randn(N, C, H, W, dtype=dtype),
            "weight1": randn(K, C, 3, 3, dtype=dtype) * (2 / (9 * C)) ** 0.5,
            "weight2": randn(K, K, 3, 3, dtype=dtype) * (2 / (9 * K)) ** 0.5,
        }
        for i, channels in enumerate((C, K, K)):
            self.leaves[f"bn_weight{i}"] = randn(channels).abs() + 0.5
            self.leaves[f"bn_bias{i}"] = 0.3 * randn(channels)
        if stride == 2:
            self.leaves["shortcut"] = randn(*out, dtype=dtype)
        self.da = randn(*out, dtype=dtype)

    def eager(self, dtype=None, masks=None):
        """Activations and gradients by autograd; ``masks`` replace the three ReLUs."""
        leaves = {
            k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in self.leaves.items()
        }
        activations = []

        def relu(z):
            a = F.relu(z) if masks is None else z * masks[len(activations)]
            activations.append(a)
            return a

        def normalised(y, i):
            return F.batch_norm(
                y, None, None, leaves[f"bn_weight{i}"], leaves[f"bn_bias{i}"], True, 0.1, EPS
            )

        x = relu(normalised(leaves["raw"], 0) + leaves["below"])
        a1 = relu(normalised(F.conv2d(x, leaves["weight1"], None, self.stride, 1), 1))
        shortcut = leaves.get("shortcut", x)
        out = relu(normalised(F.conv2d(a1, leaves["weight2"], None, 1, 1), 2) + shortcut)
        gradients = torch.autograd.grad(out, list(leaves.values()), self.da.to(out.dtype))
        made = {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}
        made["x"], made["out"] = x.detach(), out.detach()
        return made, [(a > 0) for a in activations]

    def statistics(self, partials, i):
        ones = torch.ones_like(self.leaves[f"bn_bias{i}"])
        return bn.bn_merge_fwd(
            partials,
            self.leaves[f"bn_weight{i}"],
            self.leaves[f"bn_bias{i}"],
            torch.zeros_like(ones),
            ones.clone(),
            0.1,
            EPS,
        )

    def kernels(self):
        """The same from the kernels, as a network would chain them."""
        v = self.leaves
        made = {}
        # the convolution before this block is not here: its statistics come from an exact copy
        identity = torch.zeros_like(v["raw"][:1, :, :1, :1]).expand(v["raw"].shape[1], -1, 3, 3)
        identity = identity.contiguous(memory_format=torch.channels_last)
        identity[:, :, 1, 1] = torch.eye(v["raw"].shape[1])
        copied, partials, _ = conv3x3_fwd(v["raw"], identity, stride=1, sums=True)
        assert torch.equal(copied, v["raw"])
        affine0 = self.statistics(partials, 0)

        y1, partials, x = conv3x3_fwd(
            v["raw"],
            v["weight1"],
            stride=self.stride,
            sums=True,
            x_affine=affine0,
            x_shortcut=v["below"],
            keep=True,
        )
        affine1 = self.statistics(partials, 1)
        y2, partials, _ = conv3x3_fwd(y1, v["weight2"], stride=1, sums=True, x_affine=affine1)
        affine2 = self.statistics(partials, 2)
        shortcut = v.get("shortcut", x)
        out = bn.bn_apply_fwd(y2, affine2, shortcut, relu=True)
        made["x"], made["out"] = x, out

        pixels = y2.numel() // y2.shape[1]
        dz2, partials = bn.bn_reduce_bwd(self.da, y2, affine2, out, relu=True, write_dz=True)
        settings = {"training": True, "dtype": torch.float32}
        coef2, *made_bn2 = bn.bn_merge_bwd(partials, affine2, pixels, **settings)
        made["dbn_weight2"], made["dbn_bias2"] = made_bn2
        made["dweight2"] = torch.empty_like(v["weight2"])
        dz1, partials = conv3x3_bwd(
            dz2,
            y2,
            coef2,
            y1,
            v["weight2"],
            stride=1,
            relu=False,
            dx=True,
            dweight=made["dweight2"],
            x_affine=affine1,
            raw=y1,
            raw_affine=affine1,
        )
        coef1, *made_bn1 = bn.bn_merge_bwd(partials, affine1, pixels, **settings)
        made["dbn_weight1"], made["dbn_bias1"] = made_bn1
        made["dweight1"] = torch.empty_like(v["weight1"])
        dz0, partials = conv3x3_bwd(
            dz1,
            y1,
            coef1,
            x,
            v["weight1"],
            stride=self.stride,
            relu=False,
            dx=True,
            dweight=made["dweight1"],
            raw=v["raw"],
            raw_affine=affine0,
            residual=dz2 if self.stride == 1 else None,
        )
        below = dz0.numel() // dz0.shape[1]
        _, *made_bn0 = bn.bn_merge_bwd(partials, affine0, below, **settings)
        made["dbn_weight0"], made["dbn_bias0"] = made_bn0
        made["dbelow"] = dz0
        a1 = y1.float() * affine1[2, :, None, None] + affine1[3, :, None, None]
        return made, [x > 0, a1 > 0, out > 0]


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize(
    "sizes",
    [(2, 16, 16, 13, 11, 1), (2, 16, 16, 5, 7, 2)],
    ids=["ragged-tiles", "stride-2-from-odd-sizes"],
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused-backward", "two-launches"])
def test_residual_block(fused, sizes, dtype, device, monkeypatch):
    if not fused:
        monkeypatch.setattr(launch, "fused_config", lambda *_: None)
    elif launch.fused_config(16, 16, torch.empty(0, dtype=dtype, device=device)) is None:
        pytest.skip("this dtype has no fused backward on this card")
    block = Block(*sizes, dtype, device)
    ours, our_masks = block.kernels()
    eager, eager_masks = block.eager()
    exact, _ = block.eager(torch.float64, eager_masks)
    own_exact, _ = block.eager(torch.float64, our_masks)
    assert set(ours) == set(eager) - {"draw", "dshortcut"}
    for name in ours:
        assert_within_budget(name, ours[name], eager[name], exact[name], own_exact[name])


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_is_on_the_tensors_device(current, monkeypatch):
    """Triton launches on the current device: tensors on another one make that the current one."""
    entered, launched = [], []

    @contextlib.contextmanager
    def device(chosen):
        entered.append(chosen)
        yield
        entered.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append((grid, list(entered)))

    class OnTheSecond(torch.Tensor):
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    launch.launch(Kernel(), (3,), count=2, x=torch.ones(1).as_subclass(OnTheSecond))
    within = [] if current == 1 else [torch.device("cuda", 1)]
    assert launched == [((3,), within)]
    assert entered == (within and [*within, "left"])


@pytest.mark.gpu
def test_a_second_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    made = []
    for device in ("cuda:0", "cuda:1"):
        block = Block(2, 16, 16, 13, 11, 1, torch.float16, torch.device(device))
        made.append(block.kernels()[0])
        assert torch.cuda.current_device() == 0
    for name, value in made[0].items():
        assert torch.equal(value.cpu(), made[1][name].cpu()), name
