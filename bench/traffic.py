"""Bytes and operations of every kernel, counted from shapes.

Counted is what a kernel has to move at least: each of its tensors once, as named here. Batch
statistics and their partial sums and the loader's order and crops are left out (less than 1 % at
batch 1024), and so are the weight gradient's slabs, whose number is the kernel's choice. Weights
count once a kernel.

=======  ==========================================================================
A        bytes of one activation of a stage, N * H * W * C * size of the dtype
x        a block's input: a finished activation
y0       raw output of the stem; y1, y2: of a block's first and second convolution
dz1 dz2  gradients after the block's normalisations, masked by the ReLU behind each
=======  ==========================================================================
"""

from dataclasses import dataclass

from bench.cards import Card
from cifar_resnet_fast.resnet import STAGE_CHANNELS
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.verification.operations import SIDES

CONVOLUTIONS = (  # of the family: C, K, pixels a row of the input, stride
    (3, 16, 32, 1),
    (16, 16, 32, 1),
    (16, 32, 32, 2),
    (32, 32, 16, 1),
    (32, 64, 16, 2),
    (64, 64, 8, 1),
)
PADDED_CHANNELS = 4  # of a picture as the loader writes it
IN_CACHE = ("weight", "dweight")  # small, one set for the whole batch


@dataclass(frozen=True)
class Work:
    """What one launch must do. ``reads`` and ``writes``: (tensor, bytes); flops: 2 a product."""

    kernel: str
    place: str
    reads: tuple[tuple[str, int], ...]
    writes: tuple[tuple[str, int], ...]
    flops: int = 0

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.reads + self.writes)

    @property
    def activation_bytes(self) -> int:
        """Bytes that grow with the batch: all but the weights and their gradient."""
        return sum(size for name, size in self.reads + self.writes if name not in IN_CACHE)

    def floor(self, card: Card, dtype: str) -> float:
        """Seconds that the launch takes at least: traffic and arithmetic overlap fully."""
        return max(self.bytes / card.bandwidth, self.flops / card.arithmetic(dtype))


class Sizes:
    """Tensor sizes, in bytes, for one batch size and dtype.

    Args:
        batch: N, pictures
        dtype: of the activations: fp16, bf16 or fp32
    """

    def __init__(self, batch: int, dtype: str):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.batch, self.dtype = batch, dtype
        self.item = DTYPES[dtype].itemsize

    def activation(self, channels: int, side: int) -> int:
        return self.batch * side * side * channels * self.item

    def stage(self, stage: int) -> int:
        """A of a stage, counted from 0."""
        return self.activation(STAGE_CHANNELS[stage], SIDES[stage])

    def pictures(self) -> int:
        return self.activation(PADDED_CHANNELS, SIDES[0])

    def shortcut(self, source: int, stage: int) -> int:
        """What a block of ``stage`` with its input in ``source`` needs of it: all, or, for option
        A, every second pixel of every second row, which is A / 2. The same of dz2 backwards."""
        return self.stage(stage) if source == stage else self.stage(stage) // 2

    def pooled(self) -> int:
        """The average over the pixels, float32 in either direction."""
        return self.batch * STAGE_CHANNELS[-1] * 4

    def mask(self) -> int:
        """A bit for each element of the last activation."""
        return self.stage(2) // (8 * self.item)

    def weight(self, C: int, K: int) -> int:
        return 9 * C * K * self.item


def place(stage: int) -> str:
    return f"{SIDES[stage]}x{SIDES[stage]}x{STAGE_CHANNELS[stage]}"


def conv_flops(batch: int, C: int, K: int, side: int) -> int:
    """Of a 3x3 convolution to ``side`` x ``side`` pixels, padding included as if it were data."""
    return 2 * batch * side * side * 9 * C * K


def dweight_bytes(C: int, K: int) -> int:
    return 9 * C * K * 4  # float32


# --- the kernels of the raw dataflow ----------------------------------------------------------


def loader(s: Sizes) -> Work:
    """Gathers, crops, mirrors and normalises a batch of bytes."""
    reads = (("bytes", s.batch * SIDES[0] ** 2 * 3),)
    return Work("loader", "32x32x3", reads, (("pictures", s.pictures()),))


def stem_forward(s: Sizes) -> Work:
    K = STAGE_CHANNELS[0]
    return Work(
        "stem",
        place(0),
        (("pictures", s.pictures()), ("weight", s.weight(3, K))),
        (("y0", s.stage(0)),),
        conv_flops(s.batch, 3, K, SIDES[0]),
    )


def forward_1(s: Sizes, source: int, stage: int, shortcut: int) -> Work:
    """F1: x = relu(norm(y2 of the block before) + shortcut), y1 = conv1(x).

    Args:
        source, stage: of x and of y1
        shortcut: bytes of the block before's input that are added; 0 for the first block
    """
    C, K = STAGE_CHANNELS[source], STAGE_CHANNELS[stage]
    reads = (("y2 before", s.stage(source)), ("weight", s.weight(C, K)))
    name = _name("F1", source, stage)
    if shortcut:
        reads += (("x before", shortcut),)
        name += ", option A" if shortcut < s.stage(source) else ""
    else:
        name += ", no shortcut"
    writes = (("x", s.stage(source)), ("y1", s.stage(stage)))
    return Work(
        name,
        place(stage),
        reads,
        writes,
        conv_flops(s.batch, C, K, SIDES[stage]),
    )


def forward_2(s: Sizes, stage: int) -> Work:
    """F2: y2 = conv2(relu(norm(y1)))."""
    C = STAGE_CHANNELS[stage]
    reads = (("y1", s.stage(stage)), ("weight", s.weight(C, C)))
    flops = conv_flops(s.batch, C, C, SIDES[stage])
    return Work("F2", place(stage), reads, (("y2", s.stage(stage)),), flops)


def head_forward(s: Sizes, shortcut: int) -> Work:
    """The last block's end and average pooling; a bit for each element tells where the ReLU let
    it through."""
    reads = (("y2", s.stage(2)), ("x", shortcut))
    writes = (("pooled", s.pooled()), ("mask", s.mask()))
    return Work("head", place(2), reads, writes)


def linear_forward(s: Sizes, num_classes: int) -> Work:
    """The last layer and the loss."""
    C = STAGE_CHANNELS[-1]
    reads = (("pooled", s.pooled()), ("weight", C * num_classes * s.item))
    flops = 2 * s.batch * C * num_classes
    return Work("linear", f"{C}", reads, (("logits", s.batch * num_classes * 4),), flops)


def linear_backward(s: Sizes, num_classes: int) -> Work:
    C = STAGE_CHANNELS[-1]
    reads = (
        ("logits", s.batch * num_classes * 4),
        ("pooled", s.pooled()),
        ("weight", C * num_classes * s.item),
    )
    writes = (("dpooled", s.pooled()), ("dweight", C * num_classes * 4))
    return Work("linear backward", f"{C}", reads, writes, 4 * s.batch * C * num_classes)


def head_backward(s: Sizes) -> Work:
    """dz2 of the last block, and its sums with y2."""
    reads = (("dpooled", s.pooled()), ("mask", s.mask()), ("y2", s.stage(2)))
    return Work("head backward", place(2), reads, (("dz2", s.stage(2)),))


def backward_2(s: Sizes, stage: int) -> Work:
    """B2: dz1 = conv2_T(dy2) where a1 > 0, and dweight2."""
    C, A = STAGE_CHANNELS[stage], s.stage(stage)
    reads = (("dz2", A), ("y2", A), ("y1", A), ("weight", s.weight(C, C)))
    writes = (("dz1", A), ("dweight", dweight_bytes(C, C)))
    flops = 2 * conv_flops(s.batch, C, C, SIDES[stage])
    return Work("B2", place(stage), reads, writes, flops)


def backward_1(s: Sizes, source: int, stage: int) -> Work:
    """B1: dz of the block before = (conv1_T(dy1) + shortcut's dz2) where x > 0, and dweight1."""
    C, K = STAGE_CHANNELS[source], STAGE_CHANNELS[stage]
    reads = (
        ("dz1", s.stage(stage)),
        ("y1", s.stage(stage)),
        ("x", s.stage(source)),
        ("dz2", s.shortcut(source, stage)),
        ("y2 before", s.stage(source)),
        ("weight", s.weight(C, K)),
    )
    writes = (("dz", s.stage(source)), ("dweight", dweight_bytes(C, K)))
    flops = 2 * conv_flops(s.batch, C, K, SIDES[stage])
    return Work(_name("B1", source, stage), place(stage), reads, writes, flops)


def stem_backward(s: Sizes) -> Work:
    """The stem's weight gradient; the pictures need none."""
    K = STAGE_CHANNELS[0]
    reads = (("dz0", s.stage(0)), ("y0", s.stage(0)), ("pictures", s.pictures()))
    writes = (("dweight", dweight_bytes(3, K)),)
    flops = conv_flops(s.batch, 3, K, SIDES[0])
    return Work("stem backward", place(0), reads, writes, flops)


def weights(s: Sizes, parameters: int) -> Work:
    """The convolutions' weights in the activations' dtype, each once; who has them in another
    order for the way back writes more."""
    reads, writes = (("master", 4 * parameters),), (("weights", s.item * parameters),)
    return Work("weights", "parameters", reads, writes)


def optimizer(s: Sizes, parameters: int) -> Work:
    """SGD with momentum in float32, and the weights' copy in the activations' dtype."""
    size = 4 * parameters
    reads = (("master", size), ("gradient", size), ("momentum", size))
    writes = (("master", size), ("momentum", size))
    if s.item != 4:
        writes += (("copy", s.item * parameters),)
    return Work("optimizer", "parameters", reads, writes)


def _name(kernel: str, source: int, stage: int) -> str:
    return kernel if source == stage else f"{kernel}, stride 2"


# --- the public operations, one at a time -----------------------------------------------------


def unit_forward(s: Sizes, C: int, K: int, side: int, stride: int, shortcut: bool) -> Work:
    """``conv_bn_relu`` in training: y goes to memory and back, for its statistics are of the whole
    batch. ``side``: of x."""
    out = s.activation(K, side // stride)
    reads = (("x", s.activation(C, side)), ("weight", s.weight(C, K)), ("y", out))
    if shortcut:
        reads += (("shortcut", out),)
    flops = conv_flops(s.batch, C, K, side // stride)
    return Work("conv_bn_relu", _unit(C, K, side), reads, (("y", out), ("a", out)), flops)


def unit_backward(
    s: Sizes, C: int, K: int, side: int, stride: int, shortcut: bool, dx: bool = True
) -> Work:
    """Its gradients: one pass for the sums of dz and dz * y, one for dx and dweight.

    Without a shortcut both passes make the ReLU's mask from y; with one the first writes dz, which
    is the shortcut's gradient.
    """
    x, out = s.activation(C, side), s.activation(K, side // stride)
    reads = (("da", out), ("y", out), ("y again", out), ("x", x))
    reads += (("a", out), ("dz", out)) if shortcut else (("da again", out),)
    writes = (("dweight", dweight_bytes(C, K)),)
    writes += (("dz", out),) if shortcut else ()
    flops = conv_flops(s.batch, C, K, side // stride)
    if dx:
        reads += (("weight", s.weight(C, K)),)
        writes += (("dx", x),)
        flops *= 2
    return Work("conv_bn_relu backward", _unit(C, K, side), reads, writes, flops)


def shortcut_a_forward(s: Sizes, C: int, K: int, side: int) -> Work:
    """Stride 2: a quarter of x in, zeros and all out."""
    out = s.activation(K, side // 2)
    reads = (("x", s.activation(C, side // 2)),)
    return Work("shortcut_a", _unit(C, K, side), reads, (("out", out),))


def shortcut_a_backward(s: Sizes, C: int, K: int, side: int) -> Work:
    reads = (("dout", s.activation(C, side // 2)),)
    writes = (("dx", s.activation(C, side)),)
    return Work("shortcut_a backward", _unit(C, K, side), reads, writes)


def _unit(C: int, K: int, side: int) -> str:
    return f"{side}x{side}x{C} to {K}"
