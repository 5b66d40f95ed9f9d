"""TrivialAugment over a batch against torchvision's, which calls Pillow for each image."""

import math

import numpy as np
import pytest
import torch

from cifar_resnet_fast.data.trivial_augment import (
    CODES,
    OPERATIONS,
    STRENGTHS,
    TrivialAugment,
    codes_of,
    strength_of,
)

NAMES = dict(
    zip(
        OPERATIONS,
        "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness "
        "Posterize Solarize AutoContrast Equalize".split(),
        strict=True,
    )
)


def images_that_bite(H=32, W=32):
    """Noise, few levels, a narrow band, one level, two levels, a gradient and its mirror image."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (H, W, 3), dtype=torch.uint8, generator=generator)
    gradient = torch.linspace(0, 255, H * W).reshape(H, W, 1).expand(H, W, 3).byte()
    one = torch.full((H, W, 3), 77, dtype=torch.uint8)
    two = one.clone()
    two[0, 0], two[-1, -1, 1] = 3, 200
    squares = noise[: -(-H // 4), : -(-W // 4)]
    squares = squares.repeat_interleave(4, 0).repeat_interleave(4, 1)[:H, :W]
    return torch.stack(
        [noise, noise // 64 * 64, noise // 9 + 100, one, two, gradient, gradient.flip(1), squares]
    )


def code_of(operation, strength, sign):
    return (OPERATIONS.index(operation) * STRENGTHS + strength) * 2 + sign


def by_torchvision(images, operation, strength, sign):
    """By Pillow, with the values of TrivialAugmentWide."""
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    values, signed = autoaugment.TrivialAugmentWide()._augmentation_space(STRENGTHS)[
        NAMES[operation]
    ]
    value = float(values[strength]) if values.dim() else 0.0
    if signed and sign:
        value = -value
    done = [
        autoaugment._apply_op(
            to_pil_image(image.permute(2, 0, 1)),
            NAMES[operation],
            value,
            interpolation=InterpolationMode.NEAREST,
            fill=None,
        )
        for image in images
    ]
    return torch.stack([pil_to_tensor(image).permute(1, 2, 0) for image in done])


@pytest.mark.parametrize(("H", "W"), [(32, 32), (17, 24)], ids=["cifar", "not-square"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bits_are_torchvisions(operation, H, W, device):
    images = images_that_bite(H, W)
    strengths = [(strength, sign) for strength in range(STRENGTHS) for sign in (0, 1)]
    codes = torch.tensor([code_of(operation, *strength) for strength in strengths])
    ours = TrivialAugment(H, W, device)(
        images.repeat(len(codes), 1, 1, 1).to(device),
        codes.repeat_interleave(len(images)).to(device),
    )
    assert ours.is_contiguous()
    for strength, our in zip(strengths, ours.cpu().split(len(images)), strict=True):
        assert torch.equal(our, by_torchvision(images, operation, *strength)), strength


def test_each_image_has_its_own_operation(device):
    """All codes at once, in any order, as one by one."""
    images = images_that_bite()[[0, 7]].to(device)
    augment = TrivialAugment(32, 32, device)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randperm(CODES, generator=generator).to(device)
    for image in images:
        together = augment(image.expand(CODES, -1, -1, -1), codes)
        for n in range(0, CODES, 31):
            assert torch.equal(together[n : n + 1], augment(image[None], codes[n : n + 1]))


def test_no_strength_is_no_change():
    images = images_that_bite()
    augment = TrivialAugment(32, 32, torch.device("cpu"))
    for operation in OPERATIONS[:11]:
        for sign in (0, 1):
            codes = torch.full((len(images),), code_of(operation, 0, sign))
            assert torch.equal(augment(images, codes), images), operation


def test_strengths_are_the_papers():
    """Table 6 of the paper, its wide space, at both ends."""
    ends = {
        "shear-x": (0, 0.99),
        "shear-y": (0, 0.99),
        "translate-x": (0, 32),
        "translate-y": (0, 32),
        "rotate": (0, 135),
        "brightness": (0, 0.99),
        "color": (0, 0.99),
        "contrast": (0, 0.99),
        "sharpness": (0, 0.99),
        "posterize": (8, 2),
        "solarize": (255, 0),
    }
    for operation, (weakest, strongest) in ends.items():
        assert strength_of(operation, 0, 0) == pytest.approx(weakest)
        assert strength_of(operation, STRENGTHS - 1, 0) == pytest.approx(strongest)
        has_sign = operation not in ("posterize", "solarize")
        negative = strength_of(operation, STRENGTHS - 1, 1)
        assert negative == pytest.approx(-strongest if has_sign else strongest)
        values = [strength_of(operation, strength, 0) for strength in range(STRENGTHS)]
        assert values in (sorted(values), sorted(values, reverse=True))


def test_codes_are_uniform():
    n = 300_000
    codes = torch.from_numpy(codes_of(np.random.Philox(key=3).random_raw(n)))
    counts = torch.bincount(codes, minlength=CODES)
    assert len(counts) == CODES == 14 * 31 * 2
    mean = n / CODES
    # each count is nearly a Poisson variable; of 868 the largest deviation is below 5 of one
    assert (counts - mean).abs().max() < 5 * math.sqrt(mean)
    chi_square = ((counts - mean) ** 2 / mean).sum()
    assert abs(chi_square - (CODES - 1)) < 5 * math.sqrt(2 * (CODES - 1))
