"""The loader: draws that depend on (seed, epoch) alone, batches made from them, the window."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cifar_resnet_fast import ops, reference
from cifar_resnet_fast.data.loader import (
    CROP_PADDING,
    Loader,
    draw_epoch,
    draw_mix,
    draw_trivial,
)
from cifar_resnet_fast.data.trivial_augment import TrivialAugment

STATISTICS = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
# seed 3, epoch 7: weight; top, bottom, left and right; share of 4 steps
MIX = [
    [1.0, 1.0, 1.0, 0.7135651],
    [4.0, 1.0, 13.0, 0.0],
    [32.0, 15.0, 32.0, 0.0],
    [0.0, 5.0, 2.0, 0.0],
    [21.0, 19.0, 32.0, 0.0],
    [0.4257812, 0.8085938, 0.4433594, 0.7135651],
]


def pictures(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)


def make_loader(n=50, batch_size=8, device="cpu", **settings):
    return Loader(
        pictures(n),
        torch.arange(n),
        *STATISTICS,
        batch_size=batch_size,
        device=torch.device(device),
        **settings,
    )


def batch_of(loader, step, seed=0):
    loader.prepare(step, seed)
    return loader.batch(torch.tensor(step, device=loader._images.device))


# --- draws ---------------------------------------------------------------------------------------


def test_draws_never_change():
    """Written down once: a resume on another machine or version must find the same draws."""
    draws = draw_epoch(seed=3, epoch=7, size=6)
    assert draws.order.tolist() == [5, 0, 4, 2, 3, 1]
    assert draws.dy.tolist() == [8, 3, 8, 8, 2, 6]
    assert draws.dx.tolist() == [8, 0, 2, 3, 7, 6]
    assert draws.flip.tolist() == [False, True, False, False, False, False]
    assert draws.cy.tolist() == [26, 3, 24, 23, 14, 4]
    assert draws.cx.tolist() == [11, 18, 13, 13, 27, 19]


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
    centres = torch.bincount(draws.cy * 32 + draws.cx, minlength=1024)
    assert (centres - 90_000 / 1024).abs().max() < 5 * 9.4
    assert len(centres) == 1024


def test_corners_of_other_paddings():
    draws = draw_epoch(seed=0, epoch=0, size=50_000, padding=2)
    for offsets in (draws.dy, draws.dx):
        counts = torch.bincount(offsets)
        assert len(counts) == 5
        assert (counts - 10_000).abs().max() < 5 * 90  # binomial, deviation 89
    usual = draw_epoch(seed=0, epoch=0, size=50_000)
    assert torch.equal(draws.order, usual.order)
    assert not draw_epoch(seed=0, epoch=0, size=10, padding=0).dy.any()


def test_seeds_and_epochs_differ():
    orders = [draw_epoch(seed, epoch, 100).order for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_mix_draws_never_change():
    """A ratio is made by powers, whose last bit is the platform's; a pixel's border is not."""
    mix = draw_mix(3, 7, 4, 32, 1.0, 1.0)
    torch.testing.assert_close(mix, torch.tensor(MIX), rtol=1e-6, atol=0)
    assert torch.equal(mix[1:5], torch.tensor(MIX)[1:5])


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.2, 0.001])
def test_mix_ratios_are_of_the_beta_distribution(alpha):
    steps = 40_000
    ratio = draw_mix(0, 1, steps, 32, alpha, 0.0)[0].double()
    assert ratio.min() >= 0
    assert ratio.max() <= 1
    # mean 1/2 and variance 1/4 / (2 alpha + 1); the fourth central moment is at most variance / 4
    variance = 0.25 / (2 * alpha + 1)
    assert abs(ratio.mean() - 0.5) < 5 * (variance / steps) ** 0.5
    assert abs((ratio - 0.5).square().mean() - variance) < 5 * (variance / 4 / steps) ** 0.5


def test_cutmix_shares_are_what_the_boxes_leave():
    steps = 4000
    weight, top, bottom, left, right, share = draw_mix(0, 0, steps, 32, 0.0, 1.0).double()
    assert torch.equal(weight, torch.ones_like(weight))
    assert torch.equal(
        torch.stack((top, bottom, left, right)).round().clamp(0, 32),
        torch.stack((top, bottom, left, right)),
    )
    torch.testing.assert_close(share, 1 - (bottom - top) * (right - left) / 1024)
    kinds = draw_mix(0, 0, steps, 32, 1.0, 1.0)
    boxes = kinds[0] == 1
    # binomial, deviation 32
    assert abs(boxes.sum().item() - steps / 2) < 5 * 32
    assert torch.equal(kinds[0][~boxes], kinds[5][~boxes])
    assert not kinds[1:5, ~boxes].any()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("trivial_augment", [False, True])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_partners_are_the_reversed_batch_of_all_processes(kind, trivial_augment, processes):
    settings = {kind: 1.0, "trivial_augment": trivial_augment}
    whole = batch_of(make_loader(**settings), 13)
    parts = [
        batch_of(make_loader(**settings, rank=rank, processes=processes), 13)
        for rank in range(processes)
    ]
    for place in range(3):
        assert torch.equal(torch.cat([part[place] for part in parts]), whole[place])
    assert all(torch.equal(part[3], whole[3]) for part in parts)
    assert torch.equal(whole[2], whole[1].flip(0))
    assert not torch.equal(whole[0], batch_of(make_loader(), 13)[0])


def test_last_epochs_are_not_mixed():
    usual, mixed = make_loader(), make_loader(mixup=1.0, mixed_epochs=2)
    for step in (11, 12):
        images, labels, _, ratio = batch_of(mixed, step)
        assert torch.equal(labels, batch_of(usual, step)[1])
        assert torch.equal(images, batch_of(usual, step)[0]) == (step == 12) == (ratio == 1)


@pytest.mark.parametrize("trivial_augment", [False, True])
def test_mixing_through_the_window(trivial_augment):
    settings = {"mixup": 1.0, "cutmix": 1.0, "trivial_augment": trivial_augment}
    for step in (0, 5, 6, 13):
        ours = batch_of(make_loader(**settings, resident=False), step)
        theirs = batch_of(make_loader(**settings), step)
        for our, their in zip(ours, theirs, strict=True):
            assert torch.equal(our, their)
    with pytest.raises(ValueError, match="mixup and cutmix must be 0 with several processes"):
        make_loader(mixup=1.0, resident=False, processes=2)


def test_trivial_draws_never_change():
    codes = draw_trivial(seed=3, epoch=7, size=6)
    assert codes.tolist() == [812, 7, 858, 42, 670, 304]
    assert not torch.equal(codes, draw_trivial(3, 8, 6))
    assert not torch.equal(codes, draw_trivial(4, 7, 6))


@pytest.mark.parametrize("settings", [{}, {"mixup": 1.0}], ids=["plain", "mixed"])
def test_augmented_batches_are_those_of_augmented_images(settings):
    """Each image by its own code, then as ever; only the last epochs of a mixed run tell."""
    loader = make_loader(trivial_augment=True, mixed_epochs=2, **settings)
    draws, codes = draw_epoch(1, 2, 50), draw_trivial(1, 2, 50)
    augment = TrivialAugment(32, 32, torch.device("cpu"))
    unlike = 0
    for place in range(6):
        images, labels, *_ = batch_of(loader, 12 + place, seed=1)
        part = slice(8 * place, 8 * place + 8)
        assert torch.equal(labels, draws.order[part])
        raw = pictures(50)[draws.order[part]]
        corners = draws.dy[part], draws.dx[part], draws.flip[part]
        crops = reference.augment(augment(raw, codes[part]), *corners, CROP_PADDING)
        assert torch.equal(images, reference.normalize(crops, *STATISTICS, torch.float32))
        unlike += not torch.equal(images, batch_of(make_loader(), 12 + place, seed=1)[0])
    assert unlike == 6


def test_trivial_augment_leaves_evaluation_alone():
    usual = batch_of(make_loader(augmented=False), 3)
    given = batch_of(make_loader(augmented=False, trivial_augment=True), 3)
    assert torch.equal(usual[0], given[0])


@pytest.mark.parametrize("size", [1, 7, 2000])
def test_alternating_flips(size):
    """Two epochs in succession have each image once as it is and once mirrored."""
    mirrored = []
    for epoch in range(4):
        draws = draw_epoch(5, epoch, size, "alternating")
        usual = draw_epoch(5, epoch, size)
        for name in ("order", "dy", "dx", "cy", "cx"):
            assert torch.equal(getattr(draws, name), getattr(usual, name)), name
        of_image = torch.empty(size, dtype=torch.bool)
        of_image[draws.order] = draws.flip
        mirrored.append(of_image)
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3])


def test_alternating_flips_never_change_and_are_uniform():
    draws = draw_epoch(seed=3, epoch=7, size=6, flip="alternating")
    assert draws.flip.tolist() == [True, False, True, True, True, True]
    flips = [draw_epoch(seed, 0, 90_000, "alternating") for seed in (0, 1)]
    first, second = (d.flip[d.order.argsort()] for d in flips)
    # binomial with deviation 150; so is the number of images that two seeds treat alike
    assert abs(first.sum().item() - 45_000) < 5 * 150
    assert abs((first == second).sum().item() - 45_000) < 5 * 150


# --- one batch: the operation --------------------------------------------------------------------


def arguments(n=6, H=32, W=32, steps=2, batch_size=3, dtype=torch.float32, device="cpu"):
    """Draws at every border: corners of the padded picture, flips, squares over the edge."""
    generator = torch.Generator().manual_seed(n)
    rows = steps * batch_size
    table = {
        "index": torch.randint(0, n, (rows,), generator=generator),
        "dy": torch.tensor([0, 8, 4]).repeat(rows)[:rows],
        "dx": torch.tensor([8, 0, 4, 1]).repeat(rows)[:rows],
        "flip": torch.tensor([0, 1]).repeat(rows)[:rows],
        "cy": torch.tensor([0, H - 1, H // 2]).repeat(rows)[:rows],
        "cx": torch.tensor([W - 1, 0]).repeat(rows)[:rows],
    }
    table["index"][0], table["index"][-1] = n - 1, -1
    images = torch.randint(1, 256, (n, H, W, 3), dtype=torch.uint8, generator=generator)
    return {
        "images": images.to(device),
        "labels": torch.arange(10, 10 + n, device=device),
        "values": ops.normalized_bytes(*STATISTICS, dtype).to(device),
        "draws": torch.stack(list(table.values())).int().to(device),
        "step": torch.tensor(1, device=device),
        "batch_size": batch_size,
        "padding": CROP_PADDING,
    }


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("cutout", [0, 8, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_has_the_references_bits(dtype, cutout, device):
    given = arguments(dtype=dtype, device=device)
    for step in (0, 1, 5):  # 5 is the second step of the third epoch
        given["step"] = torch.tensor(step, device=device)
        ours, our_labels = ops.load_batch(**given, cutout=cutout, implementation="triton")
        images, labels = ops.load_batch(**given, cutout=cutout, implementation="reference")
        assert torch.equal(ours, images)
        assert torch.equal(our_labels, labels)
        whole = ours.as_strided((3, 4, 32, 32), ours.stride(), ours.storage_offset())
        assert not whole[:, 3].any(), "the fourth channel is zero"
        assert whole.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("H", "W", "padding"), [(32, 32, 4), (5, 7, 4), (33, 31, 30), (1, 1, 0)])
def test_reflected_borders(H, W, padding, device):
    """The kernel, its twin and torchvision's way: pad, crop, flip."""
    given = {**arguments(H=H, W=W, device=device), "padding": padding}
    generator = torch.Generator().manual_seed(2)
    corners = torch.randint(2 * padding + 1, given["draws"][1:3].shape, generator=generator)
    corners[:, 3:5] = torch.tensor([[0, 2 * padding], [2 * padding, 0]])
    given["draws"][1:3] = corners.int().to(device)
    found = {
        name: ops.load_batch(**given, padding_mode="reflect", implementation=name)[0]
        for name in ("triton", "reference")
    }
    assert torch.equal(found["triton"], found["reference"])
    around = F.pad(given["images"].permute(0, 3, 1, 2).double(), (padding,) * 4, mode="reflect")
    for image, (index, dy, dx, flip, _, _) in zip(
        found["reference"], given["draws"][:, 3:6].T.tolist(), strict=True
    ):
        if index < 0:
            continue
        crop = around[index, :, dy : dy + H, dx : dx + W].long()
        crop = crop.flip(2) if flip else crop
        expected = given["values"][crop.permute(1, 2, 0), torch.arange(3, device=device)]
        assert torch.equal(image.permute(1, 2, 0), expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("H", "W"), [(1, 1), (5, 7), (33, 31)], ids=["one-pixel", "smaller-than-padding", "ragged"]
)
def test_kernel_at_other_sizes(H, W, device):
    given = arguments(H=H, W=W, device=device)
    ours, _ = ops.load_batch(**given, cutout=2, implementation="triton")
    images, _ = ops.load_batch(**given, cutout=2, implementation="reference")
    assert torch.equal(ours, images)


def mixed_arguments(mix, **settings):
    given = arguments(**settings)
    given["draws"] = torch.cat((given["draws"], given["draws"].flip(1))).contiguous()
    given["mix"] = torch.tensor(mix, device=given["draws"].device).T.contiguous()
    return given


BOXES = {
    "blended": [0.3, 0.0, 0.0, 0.0, 0.0, 0.3],
    "box": [1.0, 3.0, 20.0, 5.0, 32.0, 0.5],
    "as-it-is": [1.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    "partner": [1.0, 0.0, 32.0, 0.0, 32.0, 0.0],
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        # the interpreter's conversion to bfloat16 does not round
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_mixing_kernel_has_the_references_bits(dtype, box, device):
    given = mixed_arguments([BOXES["as-it-is"], BOXES[box]], dtype=dtype, device=device)
    ours = ops.load_batch(**given, cutout=8, implementation="triton")
    twins = ops.load_batch(**given, cutout=8, implementation="reference")
    assert len(ours) == 4
    for our, twin in zip(ours, twins, strict=True):
        assert torch.equal(our, twin)
    parts = []
    for draws in given["draws"].split(6):
        plain = {**given, "draws": draws.contiguous(), "mix": None}
        parts.append(ops.load_batch(**plain, cutout=8, implementation="reference"))
    assert torch.equal(ours[1], parts[0][1])
    assert torch.equal(ours[2], parts[1][1])
    own, partner = parts[0][0], parts[1][0]
    assert not torch.equal(own, partner)
    weight, top, bottom, left, right, ratio = BOXES[box]
    right_one = (weight * own.double() + (1 - weight) * partner.double()).to(dtype)
    place = (..., slice(int(top), int(bottom)), slice(int(left), int(right)))
    right_one[place] = partner[place]
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0], right_one, rtol=spacing, atol=4 * spacing)
    assert ours[3] == torch.tensor(ratio)


def test_mix_must_fit_the_draws():
    given = mixed_arguments([BOXES["box"]])
    with pytest.raises(ValueError, match="mix must have 2 columns, got 1"):
        ops.load_batch(**given)
    with pytest.raises(ValueError, match="draws must be contiguous with shape"):
        ops.load_batch(**{**given, "draws": given["draws"][:6]})


def test_reference_pixel_by_pixel():
    """The specification itself, against loops."""
    given = arguments()
    images, labels = reference.load_batch(**given, cutout=5)
    mean, std = (part.double() for part in STATISTICS)
    for n in range(3):
        index, dy, dx, flip, cy, cx = given["draws"][:, 3 + n].tolist()
        assert labels[n] == (given["labels"][index] if index >= 0 else -1)
        for h in range(32):
            for w in (0, 1, 3, 4, 15, 16, 27, 28, 30, 31):
                y, x = h + dy - 4, (31 - w if flip else w) + dx - 4
                byte = torch.zeros(3).double()
                if index >= 0 and 0 <= y < 32 and 0 <= x < 32:
                    byte = given["images"][index, y, x].double()
                right = (byte / 255 - mean) / std
                if cy - 2 <= h < cy + 3 and cx - 2 <= w < cx + 3:
                    right = torch.zeros(3).double()
                torch.testing.assert_close(images[n, :, h, w].double(), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(6, 32, 32, 3)}, TypeError, "images must be torch.uint8"),
        ({"images": pictures(6).transpose(1, 2)}, ValueError, "images must be contiguous"),
        ({"labels": torch.arange(5)}, ValueError, r"labels must be contiguous with shape \[6\]"),
        ({"values": torch.zeros(255, 3)}, ValueError, r"values must .* shape \[256, 3\]"),
        ({"draws": torch.zeros(6, 5, dtype=torch.int32)}, ValueError, "multiple of the batch"),
        ({"step": torch.zeros(1).long()}, ValueError, r"step must be .* shape \[\]"),
        ({"step": torch.tensor(1, device="meta")}, ValueError, "step must be on the device"),
        ({"batch_size": 0}, ValueError, "multiple of the batch size 0"),
        ({"cutout": -1}, ValueError, "cutout must be 0 or more"),
        (
            {"padding_mode": "edge"},
            ValueError,
            "padding_mode must be zeros or reflect, got 'edge'",
        ),
        (
            {"padding_mode": "reflect", "padding": 32},
            ValueError,
            "padding must be less than 32 pixels to be reflected, got 32",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.load_batch(**{**arguments(), **change})


# --- the loader ----------------------------------------------------------------------------------


def test_any_batch_can_be_made_again():
    whole = [batch_of(loader, step, seed=5) for loader in [make_loader()] for step in range(18)]
    for step in (16, 3, 4, 0):  # in any order, over epochs of 6 steps
        images, labels = batch_of(make_loader(), step, seed=5)
        assert torch.equal(images, whole[step][0])
        assert torch.equal(labels, whole[step][1])
    for epoch in range(3):
        seen = torch.cat([labels for _, labels in whole[6 * epoch : 6 * epoch + 6]])
        assert len(seen.unique()) == 48, "the two pictures left over are dropped"


@pytest.mark.parametrize(("cutout", "flip"), [(0, "random"), (8, "random"), (0, "alternating")])
def test_batches_are_the_references(cutout, flip):
    loader = make_loader(cutout=cutout, flip=flip)
    draws = draw_epoch(1, 2, 50, flip)
    for place in range(6):
        images, labels = batch_of(loader, 12 + place, seed=1)
        part = slice(8 * place, 8 * place + 8)
        assert torch.equal(labels, draws.order[part])
        raw = pictures(50)[draws.order[part]]
        crops = reference.augment(
            raw, draws.dy[part], draws.dx[part], draws.flip[part], CROP_PADDING
        )
        right = reference.normalize(crops, *STATISTICS, torch.float32)
        inside = torch.ones(8, 1, 32, 32, dtype=torch.bool)
        for n, (cy, cx) in enumerate(zip(draws.cy[part], draws.cx[part], strict=True)):
            top, left = max(cy - cutout // 2, 0), max(cx - cutout // 2, 0)
            inside[n, :, top : cy + cutout // 2, left : cx + cutout // 2] = False
        assert torch.equal(images, right * inside)
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [{"augmented": True}, {"augmented": False}, {"trivial_augment": True}],
    ids=["augmented", "as-they-are", "trivial-augment"],
)
def test_processes_share_the_batch(processes, settings):
    alone = make_loader(**settings)
    parts = [make_loader(**settings, rank=rank, processes=processes) for rank in range(processes)]
    for step in (0, 5, 6, 11):
        images, labels = batch_of(alone, step)
        shared = [batch_of(part, step) for part in parts]
        assert torch.equal(images, torch.cat([images for images, _ in shared]))
        assert torch.equal(labels, torch.cat([labels for _, labels in shared]))


def test_evaluation_sees_every_picture_once_unchanged():
    loader = make_loader(n=50, batch_size=16, augmented=False)
    assert loader.steps == 4
    batches = [batch_of(loader, step) for step in range(4)]
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == [*range(50), *[-1] * 14]
    restored = (images[:50] * STATISTICS[1][:, None, None] + STATISTICS[0][:, None, None]) * 255
    assert torch.equal(restored.round().byte().permute(0, 2, 3, 1), pictures(50))


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 25], ids=lambda size: f"batch-{size}")
def test_window_gives_the_same_batches(batch_size, augmented):
    """Chunks of 16 steps: 50, 25, 16 or 17, and 2 steps an epoch, so odd and even numbers."""
    settings = {"n": 50, "batch_size": batch_size, "augmented": augmented}
    resident, moving = make_loader(**settings), make_loader(**settings, resident=False)
    steps = list(range(2 * resident.steps + 3))
    for step in [*steps, 1, 2 * resident.steps + 1, *steps[:3]]:
        images, labels = batch_of(moving, step, seed=4)
        right, right_labels = batch_of(resident, step, seed=4)
        assert torch.equal(images, right), step
        assert torch.equal(labels, right_labels), step
    assert len(moving._images) <= 2 * 16 * batch_size


def test_window_follows_the_seed():
    moving = make_loader(resident=False)
    for seed in (0, 1, 0):
        assert torch.equal(batch_of(moving, 2, seed)[0], batch_of(make_loader(), 2, seed)[0])


def test_a_window_waits_as_it_is_told(monkeypatch):
    """For the copy out of a half that is to be filled anew, on a stream that stands in."""
    waited = []
    loader = make_loader(400, 10, resident=False, wait=waited.append)
    stream = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    window = loader._window
    window._cuda, window._stream = True, stream
    window._filled = [SimpleNamespace(record=lambda: None) for _ in range(2)]
    for step in range(loader.steps):
        loader.prepare(step)
    first, second = window._filled
    assert waited == [first, second, first, second], "three chunks, and the next epoch's first"


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "window"])
def test_batches_on_a_gpu_are_those_of_the_cpu(resident, device):
    """Steps launched without waiting, so a window that moves too early shows."""
    loader = make_loader(2000, 16, device, dtype=torch.float16, resident=resident, cutout=8)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    made = []
    for step in range(300):
        loader.prepare(step)
        made.append(loader.batch(counter))
        counter += 1
    right = make_loader(2000, 16, dtype=torch.float16, cutout=8)
    for step, (images, labels) in enumerate(made):
        expected, expected_labels = batch_of(right, step)
        assert torch.equal(images.cpu(), expected), step
        assert torch.equal(labels.cpu(), expected_labels)


@pytest.mark.parametrize("batch_size", [0, -1, 51])
def test_batch_size_rule(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must be in 1 .. 50.*got {batch_size}$"):
        make_loader(batch_size=batch_size)


def test_batch_that_does_not_split():
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes"):
        make_loader(batch_size=8, processes=3)
