"""The trunk's kernels one by one: the same schedule, checks and rows as on a GPU.

Without one the CUDA kernels run in the emulation, behind the operations that torch calls on a GPU
too; the Triton ones in Triton's interpreter, on smaller pictures.
"""

import dataclasses
import functools
import json
import types

import emulation
import pytest
import torch

from bench import prediction, roofline, trunk
from cifar_resnet_fast import ops
from cifar_resnet_fast.ops._trunk import cuda as trunk_cuda
from cifar_resnet_fast.ops._trunk import plain as plain_kernels
from cifar_resnet_fast.verification.budget import Unavailable, WrongResult
from cifar_resnet_fast.verification.trunk import RESULTS, moved_bytes

CPU = torch.device("cpu")
SCHEDULED = [place for place in trunk.places() if place.position is not None]
HAS_CUDA_KERNELS = ops.WHY_NOT_LOADED["_C"] is None and emulation.compiler() is not None


@pytest.fixture
def emulated(monkeypatch):
    if not HAS_CUDA_KERNELS:
        pytest.skip("needs the extension and a C++ compiler")
    emulation.load_operations()
    emulation.load().set_order("last_warp_first")
    monkeypatch.setattr(trunk_cuda, "multiprocessors", lambda _: 2)


@pytest.fixture(scope="module")
def plain_steps():
    return trunk.record(plain_kernels, trunk.draw(trunk.DEPTH, 2, torch.float32, CPU))


@pytest.fixture
def few_places(monkeypatch):
    """The weights, a forward and a backward kernel, of the smallest network."""
    monkeypatch.setattr(trunk, "DEPTH", 8)
    monkeypatch.setattr(trunk, "WEIGHTS_DEPTH", 8)
    names = [("weights", "ResNet-8"), ("F1, stride 2", "16x16x32"), ("B1", "32x32x16")]
    few = [place for place in trunk.places() if (place.kernel, place.place) in names]
    assert len(few) == 3
    monkeypatch.setattr(trunk, "places", lambda: few)
    return names


def rows_of(folder):
    (path,) = folder.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["suite"] == "trunk"]


# --- places -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [56, 110])
def test_places_are_those_of_deeper_networks(depth):
    forward, backward = roofline.trunk(depth, 1, "fp16")
    there = {(work.kernel, work.place) for work in forward + backward}
    assert [(p.kernel, p.place) for p in SCHEDULED] == list(
        dict.fromkeys((w.kernel, w.place) for w in trunk.launches(1, "fp16"))
    )
    assert {(place.kernel, place.place) for place in SCHEDULED} == there


METHODS = {
    "stem": "stem_forward",
    "F1": "f1",
    "F2": "f2",
    "head": "head_forward",
    "head backward": "head_backward",
    "B2": "b2",
    "B1": "b1",
    "stem backward": "stem_backward",
}


@pytest.mark.parametrize("place", SCHEDULED, ids=lambda p: f"{p.kernel} {p.place}")
def test_bytes_are_of_the_tensors_that_a_step_has(place, plain_steps):
    step = plain_steps[place.position]
    assert step.method == METHODS[place.kernel.partition(",")[0]]
    assert moved_bytes(step) == place.work(2, "fp32").activation_bytes


def test_bytes_of_the_weights():
    place = trunk.places()[0]
    units = trunk.draw(56, 1, torch.float32, CPU).units
    numbers = sum(unit.weight.numel() for unit in units)
    assert (place.kernel, place.place, place.position) == ("weights", "ResNet-56", None)
    assert place.work(None, "bf16").bytes == 6 * numbers


def test_prototypes_are_of_places_and_above_their_floors():
    works = {(w.kernel, w.place): w for w in trunk.launches(prediction.BATCH, prediction.DTYPE)}
    for name, us in prediction.PROTOTYPE_US.items():
        assert us > 1e6 * works[name].floor(prediction.MEASURED, prediction.DTYPE), name


# --- checks -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("emulated", "poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "N"),
    [
        pytest.param(torch.float16, 1, id="fp16-one-picture"),
        pytest.param(torch.bfloat16, 3, id="bf16-odd-batch"),
    ],
)
def test_cuda_kernels_pass_the_check(dtype, N):
    steps = trunk.record(trunk_cuda, trunk.draw(trunk.DEPTH, N, dtype, CPU))
    for place in SCHEDULED:
        trunk.verify(steps, place.position)


@pytest.mark.skipif(
    ops.why_not("triton", CPU, "trunk") is not None, reason="needs Triton's interpreter"
)
def test_triton_kernels_pass_the_check():
    from cifar_resnet_fast.ops._trunk import triton as trunk_triton

    problem = trunk.draw(8, 2, torch.float16, CPU)
    small = dataclasses.replace(problem, pictures=problem.pictures[:, :, :8, :8])
    steps = trunk.record(trunk_triton, small)
    kernels = [work.kernel for works in roofline.trunk(8, 2, "fp16") for work in works]
    for kernel in dict.fromkeys(kernels):  # the interpreter takes its time: one of each
        trunk.verify(steps, kernels.index(kernel))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kernel", ["F2", "B1"])
def test_what_is_timed_is_the_step(kernel, few_places):
    """Each time it is called it leaves what the training step went on with."""
    position = next(i for i, w in enumerate(trunk.launches(1, "fp16")) if w.kernel == kernel)
    place = trunk.Place(kernel, "", position)
    prepare = trunk.preparer(trunk_cuda, place, 2, torch.float16, CPU)
    for seed in (0, 1):
        steps = trunk.record(trunk_cuda, trunk.draw(8, 2, torch.float16, CPU, seed=seed))
        step, following = steps[position : position + 2]
        call = prepare(seed)
        made = (call(), call())
        if seed == 0:  # the others have the weights of this
            compared = 0
            for name, *tensors in zip(RESULTS[step.method], *made, strict=True):
                if name in following.arguments:
                    compared += 1
                    assert all(torch.equal(t, following.arguments[name]) for t in tensors), name
            assert compared == 2
        assert all(t.isfinite().all() for t in made[1])


def spoiled(method, spoil):
    """Plain PyTorch's kernels, of which one method's results go through ``spoil``."""
    right = getattr(plain_kernels.Kernels, method)

    @functools.wraps(right)
    def wrong(self, *arguments, **named):
        return spoil(self, right(self, *arguments, **named))

    kernels = type("Kernels", (plain_kernels.Kernels,), {method: wrong})
    prepare = plain_kernels.pictures_for_kernels
    return types.SimpleNamespace(Kernels=kernels, pictures_for_kernels=prepare)


POSITIONS = {  # of a ResNet-8's calls
    "stem_forward": 0,
    "f1": 3,
    "f2": 4,
    "head_forward": 7,
    "head_backward": 8,
    "b2": 9,
    "b1": 10,
    "stem_backward": 15,
}
LEFT = [(method, name) for method, names in RESULTS.items() for name in names]


@pytest.mark.parametrize(("method", "name"), LEFT)
def test_a_wrong_result_is_seen(method, name):
    """Half a percent off, or a mask by a row; wrong sums in what the next step makes of them."""

    def spoil(_, made):
        left = dict(zip(RESULTS[method], made, strict=True))
        left[name] = left[name].roll(1, 2) if name == "mask" else left[name] * 1.005
        return tuple(left.values())

    steps = trunk.record(spoiled(method, spoil), trunk.draw(8, 2, torch.float32, CPU))
    at = POSITIONS[method] + (name == "sums")
    words = "norm of the error" if name == "sums" else f"{name}: norm of the error"
    with pytest.raises(WrongResult, match=words):
        trunk.verify(steps, at)


@pytest.mark.parametrize("method", ["b2", "b1", "stem_backward"])
@pytest.mark.parametrize("k", range(3), ids=["dweight", "dbn_weight", "dbn_bias"])
def test_a_wrong_gradient_is_seen(method, k):
    def spoil(kernels, made):
        factors = [1.005 if j == k else 1 for j in range(3)]
        kernels.gradients = [
            tuple(gradient * factor for gradient, factor in zip(of_unit, factors, strict=False))
            for of_unit in kernels.gradients
        ]
        return made

    steps = trunk.record(spoiled(method, spoil), trunk.draw(8, 2, torch.float32, CPU))
    name = ("dweight", "dbn_weight", "dbn_bias")[k]
    with pytest.raises(WrongResult, match=f"{name}: norm of the error"):
        trunk.verify(steps, POSITIONS[method])


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("method", ["f1", "f2", "head_forward"])
def test_wrong_running_statistics_are_seen(method, name):
    def spoil(kernels, made):
        for unit in kernels._units:
            getattr(unit, name).mul_(1.005)
        return made

    steps = trunk.record(spoiled(method, spoil), trunk.draw(8, 2, torch.float32, CPU))
    with pytest.raises(WrongResult, match=f"{name}: norm of the error"):
        trunk.verify(steps, POSITIONS[method])


# --- the suite ----------------------------------------------------------------------------------


def test_on_a_cpu(tmp_path, capsys):
    """Every place, eager."""
    assert trunk.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    places = trunk.places()
    assert [(r["kernel"], r["place"]) for r in rows] == [(p.kernel, p.place) for p in places]
    for row, place in zip(rows, places, strict=True):
        assert (row["implementation"], row["dtype"]) == ("eager", "fp32")
        assert row["batch"] == (None if place.position is None else 4)
        assert row["bytes"] == place.work(4, "fp32").bytes
        assert row["us_20"] <= row["us"] <= row["us_80"]
    assert capsys.readouterr().out.count(" us (") == len(places)


@pytest.mark.usefixtures("emulated")
def test_on_emulated_kernels(few_places, tmp_path, monkeypatch):
    """What runs on a GPU, but for the device and the CUDA graph."""
    monkeypatch.setattr(trunk, "module_of", lambda *_: trunk_cuda)
    arguments = "--device cpu --implementation cuda --dtype fp16 --batch-size 2 --out".split()
    assert trunk.main([*arguments, str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert [(row["kernel"], row["place"]) for row in rows] == few_places
    assert all(row["implementation"] == "cuda" and row["us"] > 0 for row in rows)


@pytest.mark.gpu
def test_on_a_gpu(few_places, tmp_path):
    """Every implementation that the GPU runs, right and timed in CUDA graphs."""
    arguments = "--quick --dtype fp16 bf16 --batch-size 33 --implementation".split()
    gpu = torch.device("cuda")
    names = [name for name in ("cuda", "triton") if ops.why_not(name, gpu, "trunk") is None]
    names.append("eager")
    assert trunk.main([*arguments, *names, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert len(rows) == 3 * 2 * len(names)
    assert all(row["method"] == "graph" for row in rows)


def test_a_wrong_kernel_has_no_time(few_places, tmp_path, monkeypatch, capsys):
    """The last weights off: seen where they are made, and nowhere else."""

    def spoil(kernels, made):
        kernels.weights[-1] = kernels.weights[-1] * 1.01
        return made

    monkeypatch.setattr(trunk, "module_of", lambda *_: spoiled("__init__", spoil))
    arguments = ["--device", "cpu", "--implementation", "eager", "--out", str(tmp_path)]
    assert trunk.main(arguments) == 1
    weights, *others = rows_of(tmp_path)
    assert weights["no_time"].startswith("wrong result: y: norm of the error")
    assert "us" not in weights
    assert all("us" in row for row in others)
    assert "NO TIME: wrong result" in capsys.readouterr().out


def test_what_cannot_run_is_said(few_places, tmp_path, capsys):
    arguments = ["--device", "cpu", "--implementation", "triton", "--out", str(tmp_path)]
    assert trunk.main(arguments) == 0
    assert capsys.readouterr().out.count("NO TIME: without a GPU only eager is measured") == 3


def test_cuda_has_no_fp32(monkeypatch):
    monkeypatch.setattr(ops, "why_not", lambda *_: None)
    suite = types.SimpleNamespace(on_gpu=True, device=torch.device("cuda"))
    assert trunk.module_of("cuda", suite, "bf16") is trunk_cuda
    with pytest.raises(Unavailable, match="take fp16 and bf16"):
        trunk.module_of("cuda", suite, "fp32")
