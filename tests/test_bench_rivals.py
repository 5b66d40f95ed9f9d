"""What others have for the same: cuDNN's graph of the second forward kernel, and TensorRT.

Stand-ins compute with PyTorch.
"""

import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from bench import rivals, step, trunk
from cifar_resnet_fast.verification import networks
from cifar_resnet_fast.verification.budget import Unavailable, WrongResult

CPU = torch.device("cpu")


class Node:
    """A tensor of the graph: an input, or what a function makes of others."""

    def __init__(self, compute=None, *inputs):
        self.compute, self.inputs, self.output, self.kind = compute, inputs, False, None

    def set_output(self, output):
        self.output = output
        return self

    def set_data_type(self, kind):
        self.kind = kind
        return self

    def value(self, given):
        if self.compute is None:
            return given[self]
        return self.compute(*(node.value(given) for node in self.inputs))


class Graph:
    """As much of ``cudnn.pygraph`` as is used; with ``off`` its scale is half a percent off."""

    def __init__(self, off, **settings):
        self.off, self.settings, self.steps, self.shapes = off, settings, [], {}

    def tensor(self, name, dim, stride, data_type):
        self.shapes[name] = (dim, stride, data_type)
        return Node()

    def scale(self, name, input, scale):
        return Node(lambda x, s: x * s * (1.005 if self.off else 1), input, scale)

    def bias(self, name, input, bias):
        return Node(torch.add, input, bias)

    def relu(self, name, input):
        return Node(torch.relu, input)

    def conv_fprop(self, image, weight, padding, stride, dilation):
        sizes = {"padding": padding, "stride": stride, "dilation": dilation}
        return Node(lambda x, w: F.conv2d(x, w, **sizes), image, weight)

    def genstats(self, name, input):
        return (
            Node(lambda y: y.float().sum((0, 2, 3)), input),
            Node(lambda y: y.float().square().sum((0, 2, 3)), input),
        )

    def get_workspace_size(self):
        return 16

    def execute(self, pack, workspace, handle):
        assert self.steps == [
            "validate",
            "build_operation_graph",
            "create_execution_plans",
            "check_support",
            "build_plans",
        ]
        assert (handle, workspace.numel()) == ("handle", 16)
        given = {node: tensor for node, tensor in pack.items() if node.compute is None}
        made = {node: node.value(given) for node in pack if node.output}
        for node, tensor in made.items():
            pack[node].copy_(tensor)

    def __getattr__(self, step):
        return lambda *_: self.steps.append(step)


class NotSupported(Exception):
    """As cuDNN's own, no RuntimeError."""


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("cudnn")
    module.data_type = types.SimpleNamespace(HALF="half", BFLOAT16="bfloat16", FLOAT="float")
    module.heur_mode = types.SimpleNamespace(A="a", FALLBACK="fallback")
    module.cudnnGraphNotSupportedError = NotSupported
    module.off, module.streams = False, []
    module.create_handle = lambda: "handle"
    module.set_stream = lambda handle, stream: module.streams.append(stream)
    module.pygraph = lambda **settings: Graph(module.off, **settings)
    monkeypatch.setitem(sys.modules, "cudnn", module)
    current = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    rivals._handle.cache_clear()
    yield module
    rivals._handle.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_graph_is_the_second_forward_kernel(dtype, stand_in):
    """Held against float64 by ``preparer``; then each copy has tensors of its own."""
    prepare = rivals.preparer(2, 16, 8, dtype, CPU)
    first, second = prepare(1)(), prepare(2)()
    assert first["out"].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(first["out"], second["out"])
    torch.testing.assert_close(first, rivals.eager(rivals.draw(2, 16, 8, dtype, CPU, 1)))
    assert set(stand_in.streams) == {7}  # the current one, which a capture changes


def test_a_wrong_graph_has_no_time(stand_in):
    stand_in.off = True
    with pytest.raises(WrongResult, match="norm of the error"):
        rivals.preparer(2, 16, 8, torch.float16, CPU)


def test_a_graph_without_a_kernel_is_unavailable(stand_in, monkeypatch):
    def refuse(self, *_):
        raise NotSupported("no engine\nat all")

    monkeypatch.setattr(Graph, "check_support", refuse, raising=False)
    with pytest.raises(Unavailable, match="^cuDNN has no kernel for this graph: no engine$"):
        rivals.preparer(2, 16, 8, torch.float16, CPU)


def test_the_real_frontend_takes_the_description():
    """All names and arguments, as far as that goes without a GPU."""
    cudnn = pytest.importorskip("cudnn")
    given = rivals.draw(2, 16, 8, torch.float16, CPU, 0)
    _, of = rivals.graph_of(cudnn, None, given)
    assert of.keys() == {*given, "out", "sums", "squares"}


def test_without_the_frontend_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    arguments = "--device cpu --implementation cudnn --dtype fp16 --batch-size 2 --out".split()
    assert trunk.main([*arguments, str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    reasons = {r["kernel"]: r["no_time"] for r in rows if r["suite"] == "trunk"}
    assert reasons["F2"].startswith("cudnn cannot be imported (")
    assert reasons["F2"].endswith("pip install nvidia-cudnn-frontend")
    assert reasons["F1"] == "cudnn is the second forward kernel, F2, in fp16 and bf16"


# --- TensorRT -----------------------------------------------------------------------------------


def test_without_tensorrt_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    problem = networks.Problem(8, 2, "fp16", CPU)
    with pytest.raises(Unavailable, match=r"^torch_tensorrt cannot be imported \("):
        step.make_inference(problem, "tensorrt")


def test_tensorrt_gets_the_network_and_may_not_fall_back(monkeypatch):
    modes, options = [], []
    runtime = types.SimpleNamespace(set_cudagraphs_mode=modes.append)
    module = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    monkeypatch.setattr(torch, "compile", lambda model, **given: options.append(given) or model)
    problem = networks.Problem(8, 2, "bf16", CPU)
    run, replays = step.make_inference(problem, "tensorrt")
    assert (replays, modes) == (True, [True])
    (given,) = options
    assert (given["backend"], given["fullgraph"]) == ("torch_tensorrt", True)
    assert given["options"]["pass_through_build_failures"]
    exact = networks.plain_inference(problem, networks.EXACT)[0]()
    assert run().dtype == torch.bfloat16
    torch.testing.assert_close(run().double(), exact, rtol=0.1, atol=0.1)
    with pytest.raises(Unavailable, match="^tensorrt is for inference$"):
        step.measured(None, None, problem, "training", "tensorrt")
