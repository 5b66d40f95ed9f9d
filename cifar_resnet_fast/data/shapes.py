"""``shapes``: a ten-class data set that is drawn, not downloaded (layer 2).

Each image shows one figure: coloured, striped, turned, moved and scaled at random, on a striped
background with a gradient of light, partly hidden by a bar, with noise. No single pixel determines
the class, so a linear classifier stays low, while a small ResNet reaches more than 90 %.

The bytes are the same on every machine: the randomness is numpy's Philox generator, whose stream
is fixed by (split, chunk), and the drawing uses only IEEE float32 operations that round the same
everywhere (+ - * / sqrt, comparisons; no sin, no exp, no matrix product).

====  =================================================================
u, v  coordinates of a pixel in the figure's own frame, the figure's radius being 1
d     signed distance to the figure's edge in that frame, negative inside
====  =================================================================
"""

from collections.abc import Callable

import numpy as np

CLASSES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "star",
    "crescent",
    "bars",
    "elbow",
)
SIZES = {"train": 50_000, "test": 10_000}

_SIDE = 32
_CHUNK = 250  # images drawn at a time, each chunk from its own random stream
_SEEDS = {"train": 2015, "test": 2016}

_SQRT3_HALF = 0.8660254
# (cos, sin) of 90 + 72 k degrees: the normals of a five-pointed star's sides
_STAR_NORMALS = (
    (0.0, 1.0),
    (-0.95105652, 0.30901699),
    (-0.58778525, -0.80901699),
    (0.58778525, -0.80901699),
    (0.95105652, 0.30901699),
)


def draw(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` images of a split.

    Args:
        split: "train" or "test"; their random streams have nothing in common
        count: at most ``SIZES[split]``

    Returns:
        images: [count, 32, 32, 3] uint8, RGB
        labels: [count] int64 in 0 .. 9, indices into ``CLASSES``
    """
    chunks = [_draw_chunk(split, number) for number in range(-(-count // _CHUNK))]
    images, labels = (np.concatenate(part)[:count] for part in zip(*chunks, strict=True))
    return images, labels


class _Draws:
    """Random numbers of one chunk, one row per image, in a fixed order of calls."""

    def __init__(self, split: str, number: int):
        self._bits = np.random.Philox(key=np.array([_SEEDS[split], number], dtype=np.uint64))

    def uniform(self, low: float, high: float, *axes: int) -> np.ndarray:
        """[_CHUNK, *axes, 1, 1] float32 in low .. high, to broadcast against [_CHUNK, H, W]."""
        raw = self._bits.random_raw(_CHUNK * int(np.prod(axes, initial=1)))
        unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
        scaled = np.float32(low) + unit * np.float32(high - low)
        return scaled.reshape(_CHUNK, *axes, 1, 1)

    def direction(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine of a random angle, by the rational parametrisation of the circle."""
        t = self.uniform(-1, 1)
        sign = np.where(self.uniform(-1, 1) < 0, np.float32(-1), np.float32(1))
        return sign * (1 - t * t) / (1 + t * t), sign * 2 * t / (1 + t * t)

    def noise(self) -> np.ndarray:
        """[_CHUNK, 3, H, W] float32 in -1 .. 1, the sum of four bytes: nearly normal."""
        raw = self._bits.random_raw(_CHUNK * 3 * _SIDE * _SIDE // 2)
        octets = raw.astype("<u8").view(np.uint8).reshape(_CHUNK, 3, _SIDE, _SIDE, 4)
        return octets.sum(-1, dtype=np.int32).astype(np.float32) / np.float32(510) - 1


def _draw_chunk(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """[_CHUNK, 32, 32, 3] uint8 images and [_CHUNK] int64 labels."""
    draws = _Draws(split, number)
    labels = (draws.uniform(0, len(CLASSES)).ravel()).astype(np.int64)

    axis = np.arange(_SIDE, dtype=np.float32) - np.float32((_SIDE - 1) / 2)
    x, y = axis[None, None, :], axis[None, :, None]

    background = draws.uniform(0, 1, 3)
    # the figure's channels differ from the background's by 0.25 to 0.75, around the circle 0 .. 1
    figure = background + draws.uniform(0.25, 0.75, 3)
    figure = np.where(figure >= 1, figure - 1, figure)
    picture = _striped(draws, x, y, background, contrast=0.2)
    inside = _striped(draws, x, y, figure, contrast=0.2)

    radius = draws.uniform(8, 13)
    cosine, sine = draws.direction()
    shifted_x, shifted_y = x - draws.uniform(-4, 4), y - draws.uniform(-4, 4)
    u = (cosine * shifted_x + sine * shifted_y) / radius
    v = (cosine * shifted_y - sine * shifted_x) / radius
    d = np.empty_like(u)
    for label, distance in enumerate(_DISTANCES):
        chosen = labels == label
        d[chosen] = distance(u[chosen], v[chosen])
    _paint(picture, inside, d * radius)

    # a bar of one colour across the figure, off its centre
    cosine, sine = draws.direction()
    off_centre = cosine * shifted_x + sine * shifted_y - draws.uniform(-0.9, 0.9) * radius
    bar = np.broadcast_to(draws.uniform(0, 1, 3), picture.shape)
    _paint(picture, bar, np.abs(off_centre) - draws.uniform(0.5, 2))

    # the light decreases across the image, and the camera adds noise
    cosine, sine = draws.direction()
    light = 1 + (cosine * x + sine * y) * draws.uniform(0, 0.02)
    picture = picture * light[:, None] + draws.noise() * draws.uniform(0.05, 0.3, 1)
    octets = np.clip(picture * 255 + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(octets.transpose(0, 2, 3, 1)), labels


def _striped(
    draws: _Draws, x: np.ndarray, y: np.ndarray, colour: np.ndarray, contrast: float
) -> np.ndarray:
    """[_CHUNK, 3, H, W]: ``colour`` [_CHUNK, 3, 1, 1] under stripes of random width and angle."""
    cosine, sine = draws.direction()
    phase = (cosine * x + sine * y) / draws.uniform(3, 10) + draws.uniform(0, 1)
    stripe = np.where(phase - np.floor(phase) < 0.5, np.float32(-0.5), np.float32(0.5))
    return colour + stripe[:, None] * draws.uniform(-contrast, contrast, 3)


def _paint(picture: np.ndarray, colour: np.ndarray, d: np.ndarray) -> None:
    """Blend ``colour`` into the pixels of ``picture`` with ``d`` < 0; edges are one pixel soft."""
    coverage = np.clip(np.float32(0.5) - d, 0, 1)[:, None]
    picture += coverage * (colour - picture)


# --- signed distances of the ten figures, in the order of CLASSES ------------------------------


def _length(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - np.float32(half_width), np.abs(v) - np.float32(half_height))


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    sides = np.abs(u) * np.float32(_SQRT3_HALF) + v * np.float32(0.5)
    return np.maximum(sides, -v) - np.float32(0.5)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # a point is in the star if it is on the inner side of at least four of the five lines
    sides = np.stack([u * np.float32(a) + v * np.float32(b) for a, b in _STAR_NORMALS])
    return np.sort(sides, axis=0)[-2] - np.float32(0.36)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(
        _length(u, v) - np.float32(0.95), np.float32(0.75) - _length(u - np.float32(0.5), v)
    )


def _elbow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    upright = _box(u + np.float32(0.5), v, 0.28, 0.8)
    foot = _box(u, v - np.float32(0.52), 0.78, 0.28)
    return np.minimum(upright, foot)


_DISTANCES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: _length(u, v) - np.float32(0.9),
    lambda u, v: np.abs(_length(u, v) - np.float32(0.72)) - np.float32(0.2),
    lambda u, v: _box(u, v, 0.75, 0.75),
    lambda u, v: np.abs(_box(u, v, 0.62, 0.62)) - np.float32(0.17),
    _triangle,
    lambda u, v: np.minimum(_box(u, v, 0.95, 0.27), _box(u, v, 0.27, 0.95)),
    _star,
    _crescent,
    lambda u, v: _box(u, np.abs(v) - np.float32(0.48), 0.85, 0.24),
    _elbow,
)
