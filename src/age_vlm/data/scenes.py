"""Drawn scenes, the embedded default: endless images of coloured shapes with exact masks.

A scene is a function of (seed, split, index) and nothing else. Training scenes carry a language prior on purpose: some
kinds (colour and shape) are far more frequent than others, and some have a fixed partner that nearly always appears
with them. Validation and test scenes have neither: a model that answers from the prior, not from the image, is caught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..errors import UserError, one_of
from .questions import NUMBER_WORDS
from .scene_drawing import COLOURS, SHAPES, background, develop, paint_shape, shape_coverage


Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SIZES = ("small", "large")


# Separate random streams of one (seed, split, index): the text of a scene may change without its pixels.
PIXELS, TEXT, QUESTIONS, ICONS = range(4)

Kind = tuple[str, str]
"""(colour, shape)."""


@dataclass(frozen=True)
class SceneConfig:
    """How scenes are drawn.

    Attributes:
        size: side of the image in pixels, at least 32.
        shapes, colours: what objects may be, chosen from `SHAPES` and `COLOURS`.
        min_objects, max_objects: number of objects in a scene, 1 to 9.
        zipf_exponent: training frequency of the kind, or pair of partners, of rank r is proportional to
            r ** -zipf_exponent.
        partner_pairs: at most how many pairs of kinds are partners. Where all kinds are, most absent combinations of a
            present colour and a present shape are those of partners, and can be learned by heart instead of seen.
        partner_probability: share of the training scenes with a kind that has a partner that also have the partner.
        min_visible: share of an object's pixels that no other object may cover.
        min_pixels: number of an object's pixels that must be visible.
        noise: standard deviation of the pixel noise, in grey levels.
        bias_seed: chooses which kinds are partners and which are frequent. Apart from the seed of the scenes, so that
            runs with other seeds learn from other images but the same prior.

    Raises:
        UserError: a value is outside what is said above.
    """

    size: int = 64
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    min_objects: int = 2
    max_objects: int = 4
    zipf_exponent: float = 0.5
    partner_pairs: int = 6
    partner_probability: float = 0.8
    min_visible: float = 0.8
    min_pixels: int = 20
    noise: float = 9.0
    bias_seed: int = 0

    def __post_init__(self) -> None:
        # Recipes come from YAML, which has lists only; a tuple keeps the config hashable.
        object.__setattr__(self, "shapes", tuple(self.shapes))
        object.__setattr__(self, "colours", tuple(self.colours))
        for name, known in (("shapes", SHAPES), ("colours", tuple(COLOURS))):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
                raise UserError(f"{name}: got {chosen}, expected some of {known}, each once.")
        if self.size < 32:
            raise UserError(f"size: got {self.size}, expected at least 32 pixels.")
        most = min(len(NUMBER_WORDS) - 1, len(self.shapes) * len(self.colours))
        if not 1 <= self.min_objects <= self.max_objects <= most:
            raise UserError(
                f"min_objects is {self.min_objects} and max_objects {self.max_objects}, "
                f"expected 1 <= min_objects <= max_objects <= {most}."
            )
        if self.zipf_exponent < 0:
            raise UserError(f"zipf_exponent: got {self.zipf_exponent}, expected at least 0.")
        if self.partner_pairs < 0:
            raise UserError(f"partner_pairs: got {self.partner_pairs}, expected at least 0.")
        # At 1 a partner would never be missing, and no answer could tell the image from the prior.
        if not 0 <= self.partner_probability < 1:
            raise UserError(f"partner_probability: got {self.partner_probability}, expected at least 0 and below 1.")
        if not 0 <= self.min_visible <= 1:
            raise UserError(f"min_visible: got {self.min_visible}, expected a share from 0 to 1.")
        if self.min_pixels < 1:
            raise UserError(f"min_pixels: got {self.min_pixels}, expected at least 1.")
        if self.noise < 0:
            raise UserError(f"noise: got {self.noise}, expected at least 0.")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """All (colour, shape), shape by shape."""
        return tuple((colour, shape) for shape in self.shapes for colour in self.colours)


@dataclass(frozen=True, eq=False)
class SceneObject:
    """An object as drawn. `centre` is (x, y) in pixels; `mask`, bool (height, width), is where it is visible."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]
    mask: np.ndarray

    @property
    def kind(self) -> Kind:
        """(colour, shape), which no two objects of a scene share."""
        return self.colour, self.shape


@dataclass(frozen=True, eq=False)
class Scene:
    """An image (RGB) and its objects, the undermost first."""

    id: str
    split: Split
    index: int
    seed: int
    image: Image.Image
    objects: tuple[SceneObject, ...]


def draw_scene(split: Split, index: int, config: SceneConfig | None = None, seed: int = 0) -> Scene:
    """Draw scene number `index` of a split: always the same image for the same arguments, and no other split has it.

    Raises:
        UserError: unknown split, negative index or seed, or objects that do not fit into the image.
    """
    config = config or SceneConfig()
    rng = generator(split, index, seed, PIXELS)
    kinds = _biased_kinds(rng, config) if split == "train" else _uniform_kinds(rng, config)
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=len(kinds))]
    coverages = [shape_coverage(shape, size, config.size, rng) for (_, shape), size in zip(kinds, sizes, strict=True)]
    corners, masks = _place(coverages, [colour for colour, _ in kinds], config, rng)
    canvas = background(config.size, rng)
    for (colour, _), coverage, corner in zip(kinds, coverages, corners, strict=True):
        paint_shape(canvas, coverage, corner, colour, rng)
    objects = tuple(
        SceneObject(shape, colour, size, (x + coverage.shape[1] / 2, y + coverage.shape[0] / 2), mask)
        for (colour, shape), size, coverage, (x, y), mask in zip(kinds, sizes, coverages, corners, masks, strict=True)
    )
    return Scene(f"scenes-{split}-{seed}-{index}", split, index, seed, develop(canvas, config.noise, rng), objects)


def generator(split: str, index: int, seed: int, stream: int) -> np.random.Generator:
    if split not in SPLITS:
        raise UserError(f"split: got {split!r}, expected {one_of(split, SPLITS)}.")
    for name, value in (("index", index), ("seed", seed)):
        if value < 0:
            raise UserError(f"{name}: got {value}, expected at least 0.")
    # The spawn key is mixed in apart from the entropy, so no seed of one split can reach the stream of another.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), stream, index)))


@lru_cache(maxsize=16)
def _groups(config: SceneConfig) -> tuple[tuple[Kind, ...], ...]:
    """Pairs of partner kinds and kinds without a partner, the most frequent first.

    Partners differ in colour and in shape where the palette allows it: then a scene that holds both always has an
    adversarial negative, the colour of one with the shape of the other.
    """
    rng = np.random.default_rng(config.bias_seed)
    rest = [config.kinds[i] for i in rng.permutation(len(config.kinds))]
    groups: list[tuple[Kind, ...]] = []
    while len(groups) < config.partner_pairs and len(rest) > 1:
        kind = rest.pop()
        distinct = (other for other in rest if other[0] != kind[0] and other[1] != kind[1])
        groups.append((kind, next(distinct, rest[0])))
        rest.remove(groups[-1][1])
    groups += [(kind,) for kind in rest]
    return tuple(groups[i] for i in rng.permutation(len(groups)))


@lru_cache(maxsize=16)
def _group_probabilities(config: SceneConfig) -> np.ndarray:
    weights = np.arange(1, len(_groups(config)) + 1) ** -float(config.zipf_exponent)
    return weights / weights.sum()


def partner(kind: Kind, config: SceneConfig | None = None) -> Kind | None:
    """The kind that nearly always appears with this one in training scenes; None for a kind without one."""
    for group in _groups(config or SceneConfig()):
        if kind in group:
            return next((other for other in group if other != kind), None)
    raise UserError(f"kind: got {kind!r}, expected a (colour, shape) of the config.")


@lru_cache(maxsize=16)
def training_frequency(config: SceneConfig) -> Mapping[Kind, float]:
    """How often kinds appear in training scenes, relative to one another (the chance to be drawn first)."""
    probabilities = _group_probabilities(config)
    return {kind: float(p) for group, p in zip(_groups(config), probabilities, strict=True) for kind in group}


def _biased_kinds(rng: np.random.Generator, config: SceneConfig) -> list[Kind]:
    """Kinds of a training scene: groups by Zipf's law; of a pair, both, or one only, enter the scene.

    With c the partner probability, both enter with probability c / (2 - c) and each alone with (1 - c) / (2 - c): then
    the share of scenes with one that also have the other is c for either of them.
    """
    groups, probabilities = _groups(config), _group_probabilities(config)
    both = config.partner_probability / (2 - config.partner_probability)
    target = int(rng.integers(config.min_objects, config.max_objects + 1))
    kinds: list[Kind] = []
    for number in rng.choice(len(groups), size=len(groups), replace=False, p=probabilities):
        group = groups[number]
        # A pair for which there is no room stays out whole: cut, it would be one without its partner too often.
        if len(kinds) + len(group) > target:
            continue
        if rng.random() >= both:
            group = (group[int(rng.integers(len(group)))],)
        kinds.extend(group)
        if len(kinds) == target:
            return kinds
    # Where nearly all kinds are asked for, or all are partners, those that stayed out fill the scene.
    rest = [kind for kind in config.kinds if kind not in kinds]
    return kinds + [rest[i] for i in rng.permutation(len(rest))[: target - len(kinds)]]


def _uniform_kinds(rng: np.random.Generator, config: SceneConfig) -> list[Kind]:
    """Kinds of an evaluation scene: uniform among the choices that leave an adversarial negative."""
    number = int(rng.integers(config.min_objects, config.max_objects + 1))
    kinds: list[Kind] = []
    # With few kinds in the palette there may be no such choice: then any will do, see `_affinity`.
    for _ in range(100):
        kinds = [config.kinds[i] for i in rng.choice(len(config.kinds), size=number, replace=False)]
        crossed = {(colour, shape) for colour, _ in kinds for _, shape in kinds}
        if len(crossed) > len(kinds):
            break
    return kinds


def _place(
    coverages: Sequence[np.ndarray], colours: Sequence[str], config: SceneConfig, rng: np.random.Generator
) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """Upper left corners (x, y) and visible masks of objects stacked in order, wholly inside the image.

    Objects of one colour keep apart: where they overlap, nobody could tell their shapes.
    """
    side = config.size
    solid = [coverage >= 0.5 for coverage in coverages]
    needed = [max(config.min_visible * mask.sum(), min(config.min_pixels, mask.sum())) for mask in solid]
    for _ in range(100):
        corners: list[tuple[int, int]] = []
        visible: list[np.ndarray] = []
        for number, patch in enumerate(solid):
            height, width = patch.shape
            for _ in range(20):
                x, y = (int(rng.integers(side - extent + 1)) for extent in (width, height))
                alike = [i for i in range(number) if colours[i] == colours[number]]
                if any(_touch((x, y), patch, corners[i], solid[i]) for i in alike):
                    continue
                mask = np.zeros((side, side), dtype=bool)
                mask[y : y + height, x : x + width] = patch
                under = [below & ~mask for below in visible]
                if all(below.sum() >= least for below, least in zip(under, needed[:number], strict=True)):
                    corners.append((x, y))
                    visible = [*under, mask]
                    break
            else:
                break
        # A pair that is apart sideways lets every scene ask about left and right.
        if len(corners) == len(solid) and (len(solid) == 1 or beside(_centres_x(corners, solid), side)):
            return corners, visible
    raise UserError(
        f"max_objects is {config.max_objects}, but that many do not fit into {side} pixels with "
        f"min_visible {config.min_visible}; expected fewer objects or a larger size."
    )


def _touch(corner: tuple[int, int], patch: np.ndarray, other: tuple[int, int], other_patch: np.ndarray) -> bool:
    """Whether the boxes of two patches overlap or have no pixel between them."""
    spans = zip(corner, patch.shape[::-1], other, other_patch.shape[::-1], strict=True)
    return all(start <= begin + extent and begin <= start + length for start, length, begin, extent in spans)


def _centres_x(corners: Sequence[tuple[int, int]], patches: Sequence[np.ndarray]) -> list[float]:
    return [x + patch.shape[1] / 2 for (x, _), patch in zip(corners, patches, strict=True)]


def beside(centres: Sequence[float], side: int) -> list[tuple[int, int]]:
    """Pairs (i, j) of which i is clearly left of j."""
    margin = side / 8
    return [(i, j) for i, a in enumerate(centres) for j, b in enumerate(centres) if b - a >= margin]


def pick(options: Sequence[Any], rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]
