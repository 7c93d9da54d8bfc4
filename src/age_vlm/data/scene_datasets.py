"""Drawn scenes as data sets: training samples, evaluation images, and icons to warm a vision encoder up."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from .byte_cache import MIB, ByteCache
from .questions import QUESTION_KINDS, EvaluationItem
from .scene_drawing import background, develop, paint_shape, shape_coverage
from .scene_questions import scene_questions, scene_sample
from .scenes import ICONS, PIXELS, SIZES, SceneConfig, Split, draw_scene, generator, pick
from .schema import FEATURES, Sample


if TYPE_CHECKING:
    import datasets


class ScenesDataset(torch.utils.data.Dataset[Sample]):
    """Training samples of the first `length` scenes of a split, drawn when asked for and kept in memory, up to 512 MiB.

    Item i is always the same image with the same text (`scene_sample`), so what is made of it may be cached by i. Where
    `texts` leaves a scene without any, one from beyond the first `length` takes its place.

    Raises:
        UserError: an unknown split, a length below 1, or texts of an unknown kind.
    """

    def __init__(
        self,
        split: Split,
        length: int,
        seed: int = 0,
        config: SceneConfig | None = None,
        texts: Collection[str] | None = None,
    ) -> None:
        generator(split, 0, seed, PIXELS)
        if length < 1:
            raise UserError(f"length: got {length}, expected at least 1.")
        if texts is not None and not {"caption", *QUESTION_KINDS} >= set(texts) > set():
            raise UserError(f"texts: got {texts}, expected some of caption, {', '.join(QUESTION_KINDS)}.")
        self.texts = texts
        self.split, self.length, self.seed, self.config = split, length, seed, config or SceneConfig()
        self.cache: ByteCache[Sample] = ByteCache(512 * MIB)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        index = _position(index, self.length)
        return self.cache.get(index, partial(self._drawn, index))

    def _drawn(self, index: int) -> Sample:
        for number in count(index, self.length):
            scene = draw_scene(self.split, number, self.config, self.seed)
            sample = scene_sample(scene, config=self.config, texts=self.texts)
            if sample["messages"]:
                return sample


class IconsDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """One object per image, with its kind as the label: warms up a vision encoder without any mask.

    Items are {"image": PIL RGB, "label": int}; `class_names[label]` is "<colour> <shape>". `jitter` is how far the
    object may be from the middle, as a share of the room there is: 0 is centred, 1 anywhere. `side` is that of the image
    in pixels, the scenes' own by default; objects keep the size they have in scenes, so a smaller one is mostly object
    and cheaper to learn from. Icons are drawn on every access and not kept.

    Raises:
        UserError: an unknown split, a length below 1, a jitter outside 0 to 1, or a side that is too small for an object.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        split: Split = "train",
        config: SceneConfig | None = None,
        jitter: float = 1.0,
        side: int | None = None,
    ) -> None:
        generator(split, 0, seed, ICONS)
        if length < 1:
            raise UserError(f"length: got {length}, expected at least 1.")
        if not 0 <= jitter <= 1:
            raise UserError(f"jitter: got {jitter}, expected a share from 0 to 1.")
        self.split, self.length, self.seed, self.config = split, length, seed, config or SceneConfig()
        self.jitter = jitter
        self.side = side or self.config.size
        if 2 * self.side < self.config.size:
            raise UserError(f"side: got {side}, expected at least {-(-self.config.size // 2)}, half of a scene's.")
        self.class_names = tuple(" ".join(kind) for kind in self.config.kinds)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = generator(self.split, _position(index, self.length), self.seed, ICONS)
        label = int(rng.integers(len(self.config.kinds)))
        colour, shape = self.config.kinds[label]
        coverage = shape_coverage(shape, pick(SIZES, rng), self.config.size, rng)
        room = [(self.side - extent) / 2 for extent in coverage.shape[::-1]]
        x, y = (round(free * (1 + self.jitter * rng.uniform(-1, 1))) for free in room)
        canvas = background(self.side, rng)
        paint_shape(canvas, coverage, (x, y), colour, rng)
        return {"image": develop(canvas, self.config.noise, rng), "label": label}


def _position(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"index: got {index}, expected one below {length}.")
    return int(index) % length


def scene_items(split: Split, n: int, seed: int = 0, config: SceneConfig | None = None) -> list[EvaluationItem]:
    """The first `n` scenes of a split with their evaluation questions."""
    scenes = (draw_scene(split, index, config, seed) for index in range(n))
    return [EvaluationItem(scene.id, scene.image, scene_questions(scene, config)) for scene in scenes]


def to_dataset(
    split: Split, n: int, seed: int = 0, config: SceneConfig | None = None, texts: Collection[str] | None = None
) -> datasets.Dataset:
    """The first `n` training samples of a split as a `datasets.Dataset` with the features of the schema."""
    from datasets import Dataset

    samples = ScenesDataset(split, n, seed, config, texts)
    return Dataset.from_list([samples[i] for i in range(n)], features=FEATURES)
