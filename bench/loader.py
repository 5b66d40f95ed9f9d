"""Augmented batches on the device, beside other loaders: ``python -m bench.loader``.

The package's loader; torchvision's transforms under PyTorch's DataLoader with its workers, copied
to the device; and airbench's loader where that package is installed and there is a GPU (it pads by
reflection, the others with zeros). A sample is one epoch, divided by its batches. Before it is
timed, pictures of a loader's first batch must be crops of what they are made from.
"""

import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench import traffic
from bench.suite import Suite, flags, rates, timed
from bench.traffic import Sizes
from cifar_resnet_fast.data.loader import CROP_PADDING, Loader
from cifar_resnet_fast.training.engine import DTYPES
from cifar_resnet_fast.verification.budget import Unavailable, WrongResult
from cifar_resnet_fast.verification.measure import Call, Timing, quantiles, time_calls

# CIFAR-10's, which airbench's loader has built in
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
CHECKED_PICTURES = 16
Batches = Iterable[tuple[Tensor, Tensor]]
Epochs = Callable[[int], Batches]  # the batches of epoch n


def package_loader(suite: Suite, pictures: Tensor, batch: int, dtype: str) -> Loader:
    """Of the pictures, each with its number as its label."""
    return Loader(
        pictures,
        torch.arange(len(pictures)),
        MEAN,
        STD,
        batch_size=batch,
        device=suite.device,
        dtype=DTYPES[dtype],
    )


def package(suite: Suite, pictures: Tensor, batch: int, dtype: str) -> Epochs:
    """The package's loader: everything on the device."""
    loader = package_loader(suite, pictures, batch, dtype)
    counter = torch.zeros((), dtype=torch.int64, device=suite.device)

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(number * loader.steps, (number + 1) * loader.steps):
            loader.prepare(step)
            counter.fill_(step)
            yield loader.batch(counter)

    return epoch


def torchvision(suite: Suite, pictures: Tensor, batch: int, dtype: str) -> Epochs:
    """torchvision's transforms on PIL pictures, in as many processes as there are cores."""
    from torch.utils.data import DataLoader
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.RandomCrop(32, padding=CROP_PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN.tolist(), STD.tolist()),
        ]
    )
    workers = len(os.sched_getaffinity(0)) if suite.on_gpu else 0
    batches = DataLoader(
        Pictures(pictures.permute(0, 3, 1, 2), transform),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=suite.on_gpu,
    )

    def epoch(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches:
            images = images.to(suite.device, DTYPES[dtype], non_blocking=True)
            yield (
                images.contiguous(memory_format=torch.channels_last),
                labels.to(suite.device, non_blocking=True),
            )

    return epoch


class Pictures(torch.utils.data.Dataset):
    """Pictures [N, 3, 32, 32] uint8 through a transform; the label is the picture's number."""

    def __init__(self, pictures: Tensor, transform: Callable[[Tensor], Tensor]):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[i]), i


def airbench(suite: Suite, pictures: Tensor, batch: int, dtype: str) -> Epochs:
    """airbench's CifarLoader, which is float16 and on the GPU, on these pictures.

    Raises:
        Unavailable: no GPU, no airbench, or another dtype
    """
    if importlib.util.find_spec("airbench") is None:
        raise Unavailable("the package airbench is not installed")
    if not suite.on_gpu or dtype != "fp16":
        raise Unavailable("airbench's loader makes fp16 batches on a GPU")
    from airbench import CifarLoader

    with tempfile.TemporaryDirectory() as folder:  # where it looks before it downloads
        labels, classes = torch.arange(len(pictures)), list(map(str, range(10)))
        content = {"images": pictures, "labels": labels, "classes": classes}
        torch.save(content, Path(folder) / "train.pt")
        loader = CifarLoader(
            folder, train=True, batch_size=batch, aug={"flip": True, "translate": CROP_PADDING}
        )
    return lambda epoch: loader


# the package's batch is one launch of the step's graph: timed like that, too, on a GPU
IN_GRAPH = "package in a graph"
LOADERS = {"package": package, IN_GRAPH: package, "torchvision": torchvision, "airbench": airbench}


def verify(batch: tuple[Tensor, Tensor], pictures: Tensor, size: int, *, reflect: bool) -> None:
    """Each of the first pictures is a crop, perhaps mirrored, of the one that its label names.

    Raises:
        WrongResult: one is not, or the batch has another size
    """
    images, labels = batch
    if tuple(images.shape) != (size, 3, 32, 32) or len(labels) != size:
        raise WrongResult(f"a batch must be [{size}, 3, 32, 32], got {list(images.shape)}")
    # a rounding of normalised values up to 3, and of bytes that were scaled in that dtype
    allowed = 8 * torch.finfo(images.dtype).eps
    for image, label in zip(
        images[:CHECKED_PICTURES].float().cpu(), labels.tolist(), strict=False
    ):
        source = pictures[label].permute(2, 0, 1)[None] / 255.0
        around = pad(source, (CROP_PADDING,) * 4, "reflect" if reflect else "constant")[0]
        around = (around - MEAN[:, None, None]) / STD[:, None, None]
        crops = around.unfold(1, 32, 1).unfold(2, 32, 1).flatten(1, 2)  # [3, 81, 32, 32]
        candidates = torch.cat([crops, crops.flip(-1)], 1)
        error = (candidates - image[:, None]).abs().amax((0, 2, 3)).min().item()
        if not error <= allowed:
            raise WrongResult(
                f"picture {label} must be a crop of its source within {allowed:.2g}, is off by "
                f"{error:.3g}"
            )


def time_epochs(suite: Suite, epochs: Epochs, count: int) -> Timing:
    """Seconds a batch over ``count`` epochs, each until the device is done; one more warms up."""
    samples = []
    for epoch in range(count + 1):
        began, batches = time.perf_counter(), 0
        for _ in epochs(epoch):
            batches += 1
        if suite.on_gpu:
            torch.cuda.synchronize(suite.device)
        samples.append((time.perf_counter() - began) / batches)
    low, high = quantiles(samples[1:])
    return Timing(statistics.median(samples[1:]), low, high, count, "clock", None)


def time_in_graph(suite: Suite, pictures: Tensor, batch: int, dtype: str) -> Timing:
    """Seconds a batch of the package's loader, many in one CUDA graph.

    Raises:
        Unavailable: no GPU
    """
    if not suite.on_gpu:
        raise Unavailable("CUDA graphs need a GPU")
    loader = package_loader(suite, pictures, batch, dtype)
    loader.prepare(0)

    def prepare(copy: int) -> Call:
        step = torch.full((), copy % loader.steps, dtype=torch.int64, device=suite.device)
        return lambda: loader.batch(step)

    moved = traffic.loader(Sizes(batch, dtype)).bytes
    return time_calls(prepare, suite.device, input_bytes=moved, seconds=suite.seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = flags("loader", __doc__.partition("\n\n")[2])
    parser.add_argument("--implementation", nargs="+", choices=LOADERS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--batch-size", type=int, nargs="+")
    options = parser.parse_args(arguments)
    suite = Suite("loader", options)
    count, epochs = (50_000, 10) if suite.on_gpu else (256, 2)
    if suite.quick:
        epochs = 2
    batches = options.batch_size or ((128, 1024) if suite.on_gpu else (64,))
    if not 1 <= min(batches) <= max(batches) <= count:
        parser.error(f"--batch-size must be in 1 .. {count}, got {batches}")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    card = suite.measured_card()
    dtypes = options.dtype or ("fp16" if suite.on_gpu else "fp32",)
    names = options.implementation or LOADERS
    for dtype, batch, name in suite.progress(list(itertools.product(dtypes, batches, names))):
        key = {"dtype": dtype, "batch": batch, "implementation": name}
        with suite.attempt([key]):
            loader = LOADERS[name](suite, pictures, batch, dtype)
            verify(next(iter(loader(0))), pictures, batch, reflect=name == "airbench")
            if name == IN_GRAPH:
                timing = time_in_graph(suite, pictures, batch, dtype)
            else:
                timing = time_epochs(suite, loader, epochs)
            work = traffic.loader(Sizes(batch, dtype))
            row = {
                **key,
                **timed(timing),
                **rates(timing, card, dtype, work.bytes, work.flops),
                "images_per_second": round(batch / timing.median, 1),
            }
            suite.add(
                row,
                f"{name:18} {dtype} {batch:5}  {row['us']:9.1f} us a batch ({row['us_20']:.1f} - "
                f"{row['us_80']:.1f})  {row['images_per_second']:10.0f} images/s  "
                f"floor {row['floor_us']:.1f} us",
            )
    return suite.finish()


if __name__ == "__main__":
    sys.exit(main())
