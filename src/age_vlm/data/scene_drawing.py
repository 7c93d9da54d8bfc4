"""Pixels of drawn scenes: shapes, their paint, and what is behind them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw


COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "green": (38, 168, 56),
    "blue": (40, 100, 255),
    "yellow": (240, 216, 44),
    "purple": (190, 50, 200),
    "cyan": (64, 212, 224),
}


# Radius as a share of the image's side. Stars and triangles get more, so that all shapes cover similar areas.
_RADIUS = {"small": 0.12, "large": 0.18}


_STRETCH = {"circle": 0.95, "square": 0.86, "triangle": 1.2, "star": 1.3, "cross": 1.05, "ring": 1.08}


def _polygon(corners: int, *radii: float) -> list[tuple[float, float]]:
    """Corners at equal angles around the origin, the first one up, whose radii repeat the given ones."""
    turn = 2 * math.pi / corners
    around = [(radii[i % len(radii)], i * turn - math.pi / 2) for i in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in around]


# Thin arms and sharp points: small crosses, stars and triangles are to be told apart at a glance.
_ARM = 0.28


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": _polygon(3, 1.0, 1.0),
    "star": _polygon(10, 1.0, 0.4),
    "cross": [
        *[(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)],
        *[(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
    ],
}


SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")


def shape_coverage(shape: str, size: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """The share of each pixel that a shape covers, in an image of that side: float32 of shape (patch, patch), 0 to 1."""
    radius = _RADIUS[size] * _STRETCH[shape] * side * rng.uniform(0.94, 1.06)
    tilt = rng.uniform(-0.2, 0.2)
    patch = 2 * math.ceil(radius * 1.42) + 1
    scale = 4
    middle = patch * scale / 2
    drawing = Image.new("L", (patch * scale, patch * scale))
    pen = ImageDraw.Draw(drawing)
    reach = radius * scale

    def disc(share: float, fill: int) -> None:
        pen.ellipse([middle - share * reach] * 2 + [middle + share * reach] * 2, fill)

    if shape == "circle":
        disc(1.0, 255)
    elif shape == "ring":
        disc(1.0, 255)
        disc(0.52, 0)
    else:
        cos, sin = math.cos(tilt) * reach, math.sin(tilt) * reach
        pen.polygon([(middle + x * cos - y * sin, middle + x * sin + y * cos) for x, y in _CORNERS[shape]], fill=255)
    covered = np.asarray(drawing.reduce(scale), dtype=np.float32) / 255
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    return covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def background(side: int, rng: np.random.Generator) -> np.ndarray:
    """A greyish texture, float32 of shape (side, side, 3) in grey levels: clouds, a gradient, stripes or a weave."""
    tint = rng.uniform(-14, 14, size=3)
    canvas = np.empty((side, side, 3), dtype=np.float32)
    level = rng.uniform(70, 185)
    across, down = np.meshgrid(np.arange(side) / side, np.arange(side) / side)
    angle = rng.uniform(0, math.pi)
    along = across * math.cos(angle) + down * math.sin(angle)
    style = rng.integers(4)
    if style == 0:
        pattern = np.zeros((side, side))
    elif style == 1:
        pattern = (along - along.mean()) * rng.uniform(30, 70)
    elif style == 2:
        pattern = np.sin(along * rng.uniform(20, 70)) * rng.uniform(6, 16)
    else:
        pitch = rng.uniform(20, 50)
        pattern = np.sign(np.sin(across * pitch) * np.sin(down * pitch)) * rng.uniform(5, 12)
    cells = int(rng.integers(3, 9))
    clouds = Image.fromarray(rng.normal(0, 1, size=(cells, cells)).astype(np.float32))
    pattern = pattern + np.asarray(clouds.resize((side, side), Image.Resampling.BICUBIC)) * rng.uniform(6, 16)
    canvas[:] = (level + pattern)[..., None] + tint
    return canvas


def paint_shape(
    canvas: np.ndarray, coverage: np.ndarray, corner: tuple[int, int], colour: str, rng: np.random.Generator
) -> None:
    height, width = coverage.shape
    x, y = corner
    paint = np.array(COLOURS[colour]) + rng.uniform(-10, 10, size=3)
    # A faint fall of light, so that an object is not one flat colour.
    shade = 1 + rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    region = canvas[y : y + height, x : x + width]
    region += coverage[..., None] * (paint.astype(np.float32) * shade - region)


def develop(canvas: np.ndarray, noise: float, rng: np.random.Generator) -> Image.Image:
    noisy = canvas + rng.standard_normal(canvas.shape, dtype=np.float32) * noise
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
