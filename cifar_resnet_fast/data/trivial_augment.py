"""TrivialAugment in its wide space, over a batch of bytes at once (layer 2).

Each image has one of 14 operations at one of 31 strengths, all with equal chances. The results
have the bits of the source's, which calls Pillow for one image after the other, on any device: all
arithmetic is of integers, except for two products, each rounded in the precision of Pillow's.

No size depends on the values of a tensor, so a CUDA graph can capture it. It is plain PyTorch on
every device: on a GPU some dozens of small kernels a step.

Symbols: B images; a code is ``(operation * 31 + strength) * 2 + sign``.
"""

import math

import numpy as np
import torch
from torch import Tensor

OPERATIONS = (
    "identity",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
STRENGTHS = 31
CODES = len(OPERATIONS) * STRENGTHS * 2
_ENHANCEMENTS = OPERATIONS[6:10]
_ONE = 1 << 16  # of the fixed-point numbers in which Pillow walks through an image


def codes_of(bits: np.ndarray) -> np.ndarray:
    """[n] int64. Codes with equal chances, out of [n] uint64 of random bits."""
    # 31 bits each, whose remainders are uniform to 2e-8
    operation = (bits & np.uint64(0x7FFFFFFF)) % np.uint64(len(OPERATIONS))
    strength = ((bits >> np.uint64(31)) & np.uint64(0x7FFFFFFF)) % np.uint64(STRENGTHS)
    code = (operation * np.uint64(STRENGTHS) + strength) * np.uint64(2) + (bits >> np.uint64(63))
    return code.astype(np.int64)


def strength_of(operation: str, strength: int, sign: int) -> float:
    """What a strength of 0 .. 30 means: a shear, pixels, degrees, what is added to a factor of 1,
    bits that stay, or a threshold. With a sign of 1 it is negative, if it can be.

    Source: Müller and Hutter 2021, table 6 (wide), with the values of torchvision's
    TrivialAugmentWide, which are float32 numbers.
    """
    if operation == "posterize":
        return 8 - round(strength / 5)
    if operation == "solarize":
        return float(torch.linspace(255.0, 0.0, STRENGTHS)[strength])
    most = {"rotate": 135.0, "translate-x": 32.0, "translate-y": 32.0}.get(operation, 0.99)
    return float(torch.linspace(0.0, most, STRENGTHS)[strength]) * (-1 if sign else 1)


class TrivialAugment:
    """Augments batches by the codes of their images.

    Args:
        height, width: of the images, pixels
        device: of the batches

    Source: Müller and Hutter 2021, algorithm 1. Shears, translations and rotations take the
    nearest pixel and are black outside the image, as in torchvision's TrivialAugmentWide.
    """

    def __init__(self, height: int, width: int, device: torch.device):
        places, factors, levels = [], [], []
        for operation in OPERATIONS:
            for strength in range(STRENGTHS):
                for sign in (0, 1):
                    value = strength_of(operation, strength, sign)
                    places.append(_place(operation, value, height, width))
                    factors.append(1 + value if operation in _ENHANCEMENTS else 1.0)
                    mask = -1 << (8 - int(value)) if operation == "posterize" else -1
                    threshold = math.ceil(value) if operation == "solarize" else 256
                    levels.append((mask, threshold))
        # a row a code: six fixed-point numbers, see _place; a factor; a mask and a threshold
        self._places = torch.tensor(places, dtype=torch.int64, device=device)
        self._factors = torch.tensor(factors, dtype=torch.float32, device=device)
        self._levels = torch.tensor(levels, dtype=torch.int32, device=device)

    def __call__(self, images: Tensor, codes: Tensor) -> Tensor:
        """The augmented images.

        Args:
            images: [B, H, W, 3] uint8
            codes: [B] int64, each in 0 .. CODES - 1

        Returns:
            [B, H, W, 3] uint8
        """
        operation = codes // (2 * STRENGTHS)

        def of(name: str) -> Tensor:
            return (operation == OPERATIONS.index(name))[:, None, None, None]

        images = _moved(images, self._places.index_select(0, codes)).int()

        red, green, blue = images.split(1, 3)
        grey = (19595 * red + 38470 * green + 7471 * blue + _ONE // 2) >> 16  # ITU-R 601-2
        pixels = grey[0].numel()
        mean = (2 * grey.sum((1, 2, 3), dtype=torch.int32) + pixels) // (2 * pixels)
        other = torch.where(of("brightness"), 0, images)
        other = torch.where(of("color"), grey, other)
        other = torch.where(of("contrast"), mean[:, None, None, None], other)
        other = torch.where(of("sharpness"), _smooth(images), other)
        factor = self._factors.index_select(0, codes)[:, None, None, None]
        # cut off at 255 and rounded down, as Pillow blends
        blended = other.float() + factor * (images - other).float()
        images = blended.clamp(0, 255).int()

        mask, threshold = self._levels.index_select(0, codes).T[..., None, None]
        level = torch.arange(256, dtype=torch.int32, device=images.device)
        table = torch.where(level < threshold, level, 255 - level) & mask
        channels = images.permute(0, 3, 1, 2).flatten(2).long()
        stretched, equalized = _stretched(channels, level), _equalized(channels, level)
        table = torch.where(of("autocontrast")[..., 0], stretched, table)
        table = torch.where(of("equalize")[..., 0], equalized, table)
        channels = table.expand(len(images), 3, 256).gather(2, channels)
        return channels.byte().unflatten(2, images.shape[1:3]).permute(0, 2, 3, 1).contiguous()


def _place(operation: str, value: float, height: int, width: int) -> list[int]:
    """Where the pixel at column x and row y comes from: ``(a x + b y + c) >> 16`` and
    ``(d x + e y + f) >> 16``, in this order."""
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if operation == "shear-x":
        b = value
    elif operation == "shear-y":
        d = value
    elif operation == "translate-x":
        c = -int(value)
    elif operation == "translate-y":
        f = -int(value)
    elif operation == "rotate":
        angle = -math.radians(value % 360)
        a = e = round(math.cos(angle), 15)
        b, d = round(math.sin(angle), 15), round(-math.sin(angle), 15)
        c = width / 2 - a * width / 2 - b * height / 2
        f = height / 2 - d * width / 2 - e * height / 2
    # from the middle of a pixel
    c, f = c + a / 2 + b / 2, f + d / 2 + e / 2
    return [math.floor(number * _ONE + 0.5) for number in (a, b, c, d, e, f)]


def _moved(images: Tensor, places: Tensor) -> Tensor:
    """[B, H, W, 3]. Pixels from where ``places``, [B, 6], says, black outside the image."""
    _, H, W, _ = images.shape
    x = torch.arange(W, device=images.device)
    y = torch.arange(H, device=images.device)[:, None]
    a, b, c, d, e, f = places.T[..., None, None]
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    place = row.clamp(0, H - 1) * W + column.clamp(0, W - 1)
    pixels = images.flatten(1, 2).gather(1, place.flatten(1)[..., None].expand(-1, -1, 3))
    return pixels.reshape(images.shape) * inside[..., None]


def _smooth(images: Tensor) -> Tensor:
    """[B, H, W, 3] int32. Means over 3x3 pixels, in which the middle one counts five times; the
    border stays as it is."""
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    squares = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = images.clone()
    smooth[:, 1:-1, 1:-1] = (2 * (squares + 4 * images[:, 1:-1, 1:-1]) + 13) // 26
    return smooth


def _stretched(channels: Tensor, level: Tensor) -> Tensor:
    """[B, 3, 256] int32. What each level becomes if those of a channel, [B, 3, P], are stretched
    to 0 .. 255."""
    low, high = (bound[..., None].double() for bound in torch.aminmax(channels, dim=2))
    scale = 255.0 / (high - low)
    stretched = (level * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, level).int()


def _equalized(channels: Tensor, level: Tensor) -> Tensor:
    """[B, 3, 256] int32. What each level becomes if all are to be as frequent in a channel."""
    counts = channels.new_zeros((*channels.shape[:2], 256)).int()
    counts.scatter_add_(2, channels, torch.ones_like(channels, dtype=torch.int32))
    brightest = counts.gather(2, channels.amax(2, keepdim=True))
    step = (channels.shape[2] - brightest) // 255
    darker = counts.cumsum(2, dtype=torch.int32) - counts
    equalized = ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, equalized, level)
