"""What an expert would try in place of the package's kernels; each of them is optional.

``cudnn`` is the second forward kernel of a block as one graph of cuDNN, by its frontend for Python
(``pip install nvidia-cudnn-frontend``): scale, bias and ReLU, the convolution, and sums of the
result and of its squares. It lacks what F2 does besides: the merge of the sums that the kernel
before left, and the running statistics. Scale and bias are in the activations' dtype, as cuDNN's
own sample has them; ours are in float32.

Source: test/python/test_conv_genstats.py of NVIDIA's cudnn-frontend, which has the same graph.
"""

import functools
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_resnet_fast.errors import first_line
from cifar_resnet_fast.verification.budget import Unavailable, check, import_rival, without_tf32
from cifar_resnet_fast.verification.operations import Draw

CUDNN = "cudnn"
Tensors = dict[str, Tensor]


def import_cudnn() -> ModuleType:
    """cuDNN's frontend.

    Raises:
        Unavailable: it is not installed, or finds no cuDNN
    """
    return import_rival("cudnn", "nvidia-cudnn-frontend")


def draw(
    batch: int, C: int, side: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Tensors:
    """What F2 reads at a place: y, weight, and [1, C, 1, 1] scale and bias; all channels-last."""
    of = Draw(device, torch.Generator(device).manual_seed(seed))

    def last(tensor: Tensor) -> Tensor:
        return tensor.to(dtype, memory_format=torch.channels_last)

    return {
        "y": of.activation(batch, C, side, side, dtype=dtype),
        "scale": last(1 + 0.1 * of.vector(1, C, 1, 1)),
        "bias": last(0.1 * of.vector(1, C, 1, 1)),
        "weight": last((2 / (9 * C)) ** 0.5 * of.vector(C, C, 3, 3)),
    }


def eager(given: Tensors) -> Tensors:
    """The same in plain PyTorch."""
    a = (given["y"] * given["scale"] + given["bias"]).relu()
    out = F.conv2d(a, given["weight"], padding=1)
    wide = out if out.dtype == torch.double else out.float()
    sums, squares = wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))
    return {"out": out, "sums": sums, "squares": squares}


def graph_of(cudnn: ModuleType, handle: object, given: Tensors) -> tuple[object, Mapping]:
    """A graph that is described but not built, and its tensors by name."""
    kinds = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}
    kind, wide = kinds[given["y"].dtype], cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=kind, compute_data_type=wide, handle=handle
    )
    of = {
        name: graph.tensor(
            name=name, dim=list(value.shape), stride=list(value.stride()), data_type=kind
        )
        for name, value in given.items()
    }
    scaled = graph.scale(name="scaled", input=of["y"], scale=of["scale"])
    shifted = graph.bias(name="shifted", input=scaled, bias=of["bias"])
    a = graph.relu(name="a", input=shifted)
    ones = [1, 1]
    of["out"] = graph.conv_fprop(
        image=a, weight=of["weight"], padding=ones, stride=ones, dilation=ones
    )
    of["out"].set_output(True)
    of["sums"], of["squares"] = graph.genstats(name="statistics", input=of["out"])
    for name in ("sums", "squares"):
        of[name].set_output(True).set_data_type(wide)
    return graph, of


@functools.cache
def _handle():
    return import_cudnn().create_handle()


def second_forward(given: Tensors) -> Callable[[], Tensors]:
    """What runs the graph on these tensors, on the current stream, in memory of its own.

    Raises:
        Unavailable: there is no cuDNN here, or it has no kernel for the graph
    """
    cudnn = import_cudnn()
    graph, of = graph_of(cudnn, _handle(), given)
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except cudnn.cudnnGraphNotSupportedError as error:
        raise Unavailable(f"cuDNN has no kernel for this graph: {first_line(error)}") from None
    y = given["y"]
    sums = [torch.empty(y.shape[1], device=y.device) for _ in range(2)]
    made = {"out": torch.empty_like(y), "sums": sums[0], "squares": sums[1]}
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=y.device)
    pack = {of[name]: tensor for name, tensor in (given | made).items()}

    def run() -> Tensors:
        stream = torch.cuda.current_stream(y.device).cuda_stream
        cudnn.set_stream(handle=_handle(), stream=stream)
        graph.execute(pack, workspace, handle=_handle())
        return made

    return run


def preparer(
    batch: int, C: int, side: int, dtype: torch.dtype, device: torch.device
) -> Callable[[int], Callable[[], Tensors]]:
    """For ``time_calls``: the graph on tensors of its own.

    Raises:
        Unavailable: as ``second_forward``
        WrongResult: it is further from float64 than eager PyTorch may be
    """
    given = draw(batch, C, side, dtype, device, seed=0)
    with without_tf32():
        exact = eager({name: value.double() for name, value in given.items()})
        check(second_forward(given)(), eager(given), exact, maximum=True)
    return lambda seed: second_forward(draw(batch, C, side, dtype, device, seed))
