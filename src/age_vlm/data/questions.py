"""Evaluation questions about images, and the choice of absent objects to ask about (POPE, arXiv:2305.10355)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np

from ..errors import UserError
from .masks import MaskRLE


if TYPE_CHECKING:
    from PIL import Image

Kind = TypeVar("Kind", bound=Hashable)

Mode = Literal["random", "popular", "adversarial"]
POPE_MODES: tuple[Mode, ...] = ("random", "popular", "adversarial")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION_KINDS = ("existence", "count", "colour", "relation")


@dataclass(frozen=True)
class Question:
    """One question with its expected answer.

    `phrase` is the character span [start, end) in `text` of the object asked about; `mask` its RLE at the resolution of
    the image, or None when the object is not there. `mode` is set for existence questions only.
    """

    id: str
    image_id: str
    text: str
    answer: str
    kind: Literal["existence", "count", "colour", "relation", "where"]
    mode: Mode | None = None
    phrase: tuple[int, int] | None = None
    mask: MaskRLE | None = None

    @property
    def subject(self) -> str:
        """The words of `phrase`."""
        return self.text[slice(*self.phrase)]


@dataclass(frozen=True)
class EvaluationItem:
    """An image and the questions asked about it."""

    image_id: str
    image: Image.Image
    questions: tuple[Question, ...]


@dataclass
class KindStatistics(Generic[Kind]):
    """How often kinds of object appear in training images, alone and together: what POPE draws negatives by."""

    frequency: Counter[Kind] = field(default_factory=Counter)
    cooccurrence: dict[Kind, Counter[Kind]] = field(default_factory=dict)

    @classmethod
    def count(cls, images: Iterable[Iterable[Kind]]) -> KindStatistics[Kind]:
        """Count over images, each given as the kinds it shows; a kind counts once an image."""
        statistics = cls()
        for kinds_there in images:
            # A dict rather than a set keeps the order of the counters, and so of ties, the same in every process.
            kinds = list(dict.fromkeys(kinds_there))
            statistics.frequency.update(kinds)
            for kind in kinds:
                statistics.cooccurrence.setdefault(kind, Counter()).update(other for other in kinds if other != kind)
        return statistics

    def affinity(self, present: Iterable[Kind]) -> Counter[Kind]:
        """For every kind, how often it was seen together with any of the present ones."""
        total: Counter[Kind] = Counter()
        for kind in present:
            total.update(self.cooccurrence.get(kind, {}))
        return total


def existence_negatives(
    present: Iterable[Kind],
    candidates: Sequence[Kind],
    *,
    frequency: Mapping[Kind, float],
    affinity: Mapping[Kind, float],
    rng: np.random.Generator,
    count: int = 1,
    pool: int | None = None,
) -> dict[Mode, list[Kind]]:
    """Choose absent kinds to ask about, for each of POPE's three modes.

    random: uniform over the absent kinds; popular: those of highest `frequency` in training; adversarial: those of
    highest `affinity` to what is present (for POPE how often they appear together with it, `KindStatistics.affinity`).
    Equal scores are in random order. The modes choose independently, so a kind may come up in several.

    Args:
        present: kinds the image shows, or that for another reason must not count as absent (too small to judge).
        candidates: all kinds that may be asked about, without duplicates.
        frequency, affinity: scores by kind; a missing kind scores 0.
        rng: source of all choices.
        count: negatives per mode; fewer are returned where fewer kinds are absent.
        pool: popular negatives are drawn at random from this many top kinds, so that not all images ask about the
            same one; by default exactly the top `count`.

    Raises:
        UserError: `count` is below 1 or `pool` below `count`.
    """
    if count < 1:
        raise UserError(f"count: got {count}, expected at least 1.")
    if pool is not None and pool < count:
        raise UserError(f"pool: got {pool}, expected at least count, which is {count}.")
    present = set(present)
    absent = [kind for kind in candidates if kind not in present]

    def shuffled(kinds: Sequence[Kind]) -> list[Kind]:
        return [kinds[i] for i in rng.permutation(len(kinds))]

    def ranked(score: Mapping[Kind, float]) -> list[Kind]:
        return sorted(shuffled(absent), key=lambda kind: -score.get(kind, 0))

    return {
        "random": shuffled(absent)[:count],
        "popular": shuffled(ranked(frequency)[: pool or count])[:count],
        "adversarial": ranked(affinity)[:count],
    }


def pope_choice(
    present: Sequence[Kind],
    absent: Sequence[Kind],
    statistics: KindStatistics[Kind],
    *,
    rng: np.random.Generator,
    count: int,
    pool: int | None = None,
) -> tuple[list[Kind], dict[Mode, list[Kind]]]:
    """What to ask about one image: kinds it shows, chosen at random, and for each mode as many that it does not.

    `count` of each, or as many as there are present and absent ones, so that yes and no stay balanced; see
    `existence_negatives` for the modes, for `pool`, and for what it raises.

    Args:
        present, absent: kinds that are clearly there and clearly not; what cannot be told is in neither.
        statistics: of the training images.
    """
    count = min(count, len(present), len(absent))
    if count < 1:
        return [], {mode: [] for mode in POPE_MODES}
    positives = [present[i] for i in rng.permutation(len(present))[:count]]
    negatives = existence_negatives(
        (),
        absent,
        frequency=statistics.frequency,
        affinity=statistics.affinity(present),
        rng=rng,
        count=count,
        pool=None if pool is None else max(pool, count),
    )
    return positives, negatives
