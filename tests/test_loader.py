"""The loader: draws that depend on (seed, epoch) alone, and batches made from them."""

import pytest
import torch

from cifar_resnet_fast import reference
from cifar_resnet_fast.loader import CROP_PADDING, Loader, draw_epoch


def make_loader(n=50, batch_size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    statistics = torch.full((3,), 0.5), torch.full((3,), 0.25)
    device = torch.device("cpu")
    return Loader(
        images, torch.arange(n), *statistics, batch_size=batch_size, device=device, dtype=dtype
    )


def test_draws_never_change():
    """Written down once: a resume on another machine or version must find the same draws."""
    draws = draw_epoch(seed=3, epoch=7, size=6)
    assert draws.order.tolist() == [5, 0, 4, 2, 3, 1]
    assert draws.dy.tolist() == [8, 3, 8, 8, 2, 6]
    assert draws.dx.tolist() == [8, 0, 2, 3, 7, 6]
    assert draws.flip.tolist() == [False, True, False, False, False, False]


def test_draws_are_uniform():
    draws = draw_epoch(seed=0, epoch=0, size=90_000)
    assert torch.equal(draws.order.sort().values, torch.arange(90_000))
    for offsets in (draws.dy, draws.dx):
        counts = torch.bincount(offsets, minlength=2 * CROP_PADDING + 1)
        # each count is binomial with mean 10,000 and deviation 94
        assert (counts - 10_000).abs().max() < 5 * 94
    assert abs(draws.flip.sum().item() - 45_000) < 5 * 150
    joint = torch.bincount(draws.dy * 18 + draws.dx * 2 + draws.flip, minlength=162)
    assert (joint - 90_000 / 162).abs().max() < 5 * 24, "dy, dx and flip are independent"


def test_seeds_and_epochs_differ():
    orders = [draw_epoch(seed, epoch, 100).order for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_any_batch_can_be_made_again():
    whole = list(make_loader().training_batches(seed=5, epoch=2))
    assert len(whole) == 6, "the two pictures left over are dropped"
    tail = list(make_loader().training_batches(seed=5, epoch=2, start=4))
    for (images, labels), (again, same) in zip(whole[4:], tail, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)


def test_batches_are_the_references():
    loader = make_loader()
    draws = draw_epoch(seed=1, epoch=0, size=50)
    for step, (images, labels) in enumerate(loader.training_batches(seed=1, epoch=0)):
        part = slice(8 * step, 8 * step + 8)
        assert torch.equal(labels, draws.order[part])
        raw = loader.images[draws.order[part]]
        crops = reference.augment(
            raw, draws.dy[part], draws.dx[part], draws.flip[part], CROP_PADDING
        )
        assert torch.equal(
            images, reference.normalize(crops, loader.mean, loader.std, torch.float32)
        )
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_sees_every_picture_once_unchanged():
    loader = make_loader(n=50, batch_size=16)
    batches = list(loader.evaluation_batches())
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(50))
    restored = (images * 0.25 + 0.5) * 255
    assert torch.equal(restored.round().byte().permute(0, 2, 3, 1), loader.images)


@pytest.mark.parametrize("batch_size", [0, -1, 51])
def test_batch_size_rule(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must be in 1 .. 50.*got {batch_size}$"):
        make_loader(batch_size=batch_size)
