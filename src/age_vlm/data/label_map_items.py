"""Evaluation questions about photographs with label maps, and what can be known about their classes without looking."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from .label_maps import Crop, LabelMaps, count_question, existence_question, random_box
from .masks import encode_mask
from .questions import NUMBER_WORDS, POPE_MODES, EvaluationItem, KindStatistics, Question, pope_choice


def _sampled_presence(
    maps: LabelMaps, crops: int, size: tuple[int, int], min_side: float, seed: int
) -> Iterator[dict[str, bool]]:
    rng = np.random.default_rng([seed, 2])
    for number in range(crops):
        labels = maps.frames[number % len(maps)].labels
        left, top, right, bottom = random_box(labels.shape, size, min_side, rng)
        yield maps.presence(labels[top:bottom, left:right])


def class_statistics(
    maps: LabelMaps, crops: int = 2000, size: tuple[int, int] = (256, 192), min_side: float = 0.45, seed: int = 0
) -> KindStatistics[str]:
    """How often classes are present, and present together, in random crops of the training frames."""
    sampled = _sampled_presence(maps, crops, size, min_side, seed)
    return KindStatistics.count([name for name, there in presence.items() if there] for presence in sampled)


def class_prior(
    maps: LabelMaps, crops: int = 2000, size: tuple[int, int] = (256, 192), min_side: float = 0.45, seed: int = 0
) -> dict[str, float]:
    """P(class is present) over random crops of the training frames in which it is clearly present or absent.

    This is all that a model can know without looking: report it beside any metric about presence.
    """
    there, asked = dict.fromkeys(maps.classes, 0), dict.fromkeys(maps.classes, 0)
    for presence in _sampled_presence(maps, crops, size, min_side, seed):
        for name, is_present in presence.items():
            asked[name] += 1
            there[name] += is_present
    return {name: there[name] / asked[name] if asked[name] else 0.0 for name in maps.classes}


def label_map_items(
    maps: LabelMaps,
    statistics: KindStatistics[str] | None = None,
    *,
    per_frame: int = 4,
    size: tuple[int, int] = (256, 192),
    min_side: float = 0.45,
    seed: int = 0,
    negatives: int = 2,
    pool: int | None = 4,
) -> list[EvaluationItem]:
    """Evaluation images with their questions: deterministic crops of every frame.

    Each has existence questions without a mode about every class that is clearly present or absent (for AUC), counting
    questions where there are instances, and, given `statistics` of the training frames, as many positive as negative
    existence questions (up to `negatives`) for each of POPE's three modes. A question's `phrase` spans the class name,
    its `mask` is None where the class is absent.

    Args:
        statistics: from `class_statistics` of the *training* part; without it there are no POPE questions.
        pool: popular negatives are drawn from this many of the most frequent absent classes, see `existence_negatives`.
    """
    items = []
    for crop in maps.evaluation_crops(per_frame, size, min_side, seed):
        presence = maps.presence(crop.labels)
        shown = [name for name, is_present in presence.items() if is_present]
        masks = {name: encode_mask(maps.mask(crop, name)) for name in shown}

        def ask(
            name: str, mode: str | None, crop: Crop = crop, presence: dict = presence, masks: dict = masks
        ) -> Question:
            text, span = existence_question(name)
            answer = "yes" if presence[name] else "no"
            key = f"{crop.id}:{mode or 'existence'}:{name}"
            return Question(key, crop.id, text, answer, "existence", mode, span, masks.get(name))

        questions = [ask(name, None) for name in presence]
        for name, number in maps.counts(crop).items():
            text, span = count_question(name)
            key = f"{crop.id}:count:{name}"
            questions.append(Question(key, crop.id, text, NUMBER_WORDS[number], "count", None, span, masks[name]))
        if statistics is not None:
            rng = np.random.default_rng([seed, 3, zlib.crc32(crop.id.encode())])
            absent = [name for name, is_present in presence.items() if not is_present]
            positives, chosen = pope_choice(shown, absent, statistics, rng=rng, count=negatives, pool=pool)
            questions += [ask(name, mode) for mode in POPE_MODES for name in positives + chosen[mode]]
        items.append(EvaluationItem(crop.id, crop.image, tuple(questions)))
    return items
