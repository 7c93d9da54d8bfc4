"""Questions about an image whose annotations outline every instance of known categories: is it there, how many, where.

For training they are `Turn`s with the category's word grounded, for evaluation `Question`s. `label_maps` does the same for
images with one class a pixel.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..errors import UserError, one_of
from .masks import MaskRLE, decode_mask, mask_share, union
from .plurals import indefinite, is_countable, is_plural, plural
from .questions import NUMBER_WORDS, POPE_MODES, KindStatistics, Question, pope_choice


ASKED = ("presence", "count", "where")
"""Kinds of questions, by what they are about."""

_POSITIONS = (
    ("In the top left", "At the top", "In the top right"),
    ("On the left", "In the center", "On the right"),
    ("In the bottom left", "At the bottom", "In the bottom right"),
)


@dataclass(frozen=True)
class Shown:
    """What an image shows of the categories that were looked for in all of it.

    Attributes:
        id: identifies the image; choices depend on it, and not on the other images there are.
        candidates: all categories that were looked for.
        instances: category -> a mask for each instance.
        crowds: category -> a mask for each group that nobody counted.
        unclear: categories of which something is annotated that cannot be used: they may be there.
        min_area: share of the image from which on a category counts as present, and an instance as visible. Below it, it
            is as unclear whether one should say it is there as whether one should say it is not.
    """

    id: str
    candidates: Collection[str]
    instances: Mapping[str, Sequence[MaskRLE]] = field(default_factory=dict)
    crowds: Mapping[str, Sequence[MaskRLE]] = field(default_factory=dict)
    unclear: Collection[str] = ()
    min_area: float = 0.005

    @cached_property
    def present(self) -> dict[str, MaskRLE]:
        """Category that is clearly there -> mask of all of it, sorted by name."""
        there = {
            name: union([*self.instances.get(name, ()), *self.crowds.get(name, ())])
            for name in sorted({*self.instances, *self.crowds})
            if name not in self.unclear
        }
        return {name: mask for name, mask in there.items() if mask_share(mask) >= self.min_area}

    @cached_property
    def absent(self) -> list[str]:
        """Categories of which nothing at all is there, sorted."""
        return sorted({*self.candidates} - {*self.instances, *self.crowds, *self.unclear})

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of instances of each category that can be counted: one to nine, all visible, and no crowd."""
        return {
            name: len(self.instances[name])
            for name in self.present
            if is_countable(name)
            and name not in self.crowds
            and len(self.instances[name]) < len(NUMBER_WORDS)
            and all(mask_share(mask) >= self.min_area for mask in self.instances[name])
        }

    @cached_property
    def single(self) -> list[str]:
        """Categories with exactly one instance, a visible one: "the dog" is no other."""
        return [name for name in self.present if name not in self.crowds and len(self.instances[name]) == 1]


@dataclass(frozen=True)
class Turn:
    """A question about a category, and its answer.

    Attributes:
        name: the category.
        question, answer: texts, written as a language model would write them.
        span: characters [start, end) of the category's word in the question.
        mask: all that is there of the category, None where nothing is.
    """

    name: str
    question: str
    answer: str
    span: tuple[int, int]
    mask: MaskRLE | None


def _turn(shown: Shown, name: str, before: str, noun: str, after: str, answer: str) -> Turn:
    span = len(before), len(before) + len(noun)
    return Turn(name, f"{before}{noun}{after}", answer, span, shown.present.get(name))


def _presence(shown: Shown, name: str) -> Turn:
    article = indefinite(name).removesuffix(name)
    verb = "Are" if is_plural(name) else "Is"
    return _turn(
        shown, name, f"{verb} there {article}", name, " in the image?", "Yes" if name in shown.present else "No"
    )


def _count(shown: Shown, name: str) -> Turn:
    return _turn(
        shown, name, "How many ", plural(name), " are in the image?", NUMBER_WORDS[shown.counts[name]].capitalize()
    )


def _where(shown: Shown, name: str) -> Turn:
    verb = "are" if is_plural(name) else "is"
    return _turn(shown, name, f"Where {verb} the ", name, "?", position_of(shown.present[name]))


def position_of(mask: MaskRLE) -> str:
    """Which ninth of the image the centroid of a mask lies in, in words: "On the left", "In the center", "At the top".

    The image is cut in three of equal width and three of equal height.
    """
    pixels = decode_mask(mask)
    row, column = (
        int(3 * (2 * np.average(np.arange(side), weights=pixels.sum(1 - axis)) + 1) / (2 * side))
        for axis, side in enumerate(pixels.shape)
    )
    return _POSITIONS[row][column]


def _generator(seed: int, shown: Shown, kind: str) -> np.random.Generator:
    # By kind, too: what is asked of one kind does not depend on which others are asked.
    return np.random.default_rng([seed, zlib.crc32(shown.id.encode()), ASKED.index(kind)])


def check_asked(questions: Sequence[str]) -> None:
    """Raises UserError, one sentence, where `questions` is not some of `ASKED`, each once."""
    if isinstance(questions, str) or not isinstance(questions, Collection):
        raise UserError(f"questions: got {questions!r}, expected a list of some of {', '.join(ASKED)}.")
    for kind in questions:
        if kind not in ASKED:
            raise UserError(f"questions: got {kind!r}, expected {one_of(kind, ASKED)}.")
    if len(set(questions)) < len(questions):
        raise UserError(f"questions must name each kind once, got {list(questions)!r}.")


def training_turns(
    shown: Shown,
    statistics: KindStatistics[str],
    questions: Collection[str] = ASKED,
    *,
    per_kind: int = 3,
    seed: int = 0,
) -> list[Turn]:
    """Questions about an image for training, in random order.

    Presence: as many categories that are there as that are not; of the latter half are any that are absent, and half the
    popular and adversarial ones of POPE, so that neither what is frequent, nor what is rare, nor what goes together is a
    safe guess. Count: numbers that differ, as far as there are such, because most things are there once. There may be
    nothing to ask.

    Args:
        statistics: of the training images.
        questions: some of `ASKED`.
        per_kind: at most so many questions of a kind; of presence, so many with yes and so many with no.
    """
    turns: list[Turn] = []
    if "presence" in questions:
        rng = _generator(seed, shown, "presence")
        positives, chosen = pope_choice(
            list(shown.present), shown.absent, statistics, rng=rng, count=per_kind, pool=per_kind
        )
        # Half from all that is absent: drawn by POPE's other modes alone, a rare category would nearly always mean yes.
        hard = rng.permutation(["popular", "adversarial"])
        kinds = [chosen["random"], [name for names in zip(*(chosen[mode] for mode in hard)) for name in names]]
        # Begun all with one kind, images of a single category would ask by no other.
        in_turn = zip(*(kinds if rng.random() < 0.5 else reversed(kinds)))
        # The modes choose independently: the same category may come from several.
        negatives = list(dict.fromkeys(name for names in in_turn for name in names))[: len(positives)]
        turns += [_presence(shown, name) for name in positives + negatives]
    if "count" in questions:
        names = _numbers_apart(shown.counts, _generator(seed, shown, "count"))
        turns += [_count(shown, name) for name in names[:per_kind]]
    if "where" in questions:
        order = _generator(seed, shown, "where").permutation(len(shown.single))
        turns += [_where(shown, shown.single[number]) for number in order[:per_kind]]

    # Generators by kind begin with 0, 1, 2: this one is none of them.
    order = np.random.default_rng([seed, zlib.crc32(shown.id.encode()), len(ASKED)]).permutation(len(turns))
    return [turns[number] for number in order]


def _numbers_apart(counts: Mapping[str, int], rng: np.random.Generator) -> list[str]:
    """All categories in random order, but each number once before any comes again."""
    names = list(counts)
    seen: dict[int, int] = {}
    rounds = {}
    for name in (names[number] for number in rng.permutation(len(names))):
        rounds[name] = seen[counts[name]] = seen.get(counts[name], -1) + 1
    return sorted(rounds, key=rounds.__getitem__)


def evaluation_questions(
    shown: Shown,
    statistics: KindStatistics[str] | None = None,
    *,
    per_mode: int = 3,
    seed: int = 0,
) -> tuple[Question, ...]:
    """All there is to ask about an image for evaluation.

    Presence of every category that is clearly there or clearly not, without a mode (for AUC); every count and every place
    that can be told; and, given `statistics` of the training images, for each of POPE's modes up to `per_mode` categories
    that are there and as many that are not. POPE itself asks three and three of images with more than three objects;
    where there are fewer, popular negatives are drawn from the first `per_mode`, so that not all images ask the same.
    Answers are labels, in lower case where they are yes and no.
    """

    def asked(kind: str, key: str, turn: Turn, mode: str | None = None) -> Question:
        answer = turn.answer.lower() if kind == "existence" else turn.answer
        return Question(
            f"{shown.id}:{key}:{turn.name}", shown.id, turn.question, answer, kind, mode, turn.span, turn.mask
        )

    def existence() -> Iterator[Question]:
        for name in (*shown.present, *shown.absent):
            yield asked("existence", "existence", _presence(shown, name))
        if statistics is None:
            return
        rng = _generator(seed, shown, "presence")
        positives, chosen = pope_choice(
            list(shown.present), shown.absent, statistics, rng=rng, count=per_mode, pool=per_mode
        )
        for mode in POPE_MODES:
            for name in positives + chosen[mode]:
                yield asked("existence", mode, _presence(shown, name), mode)

    return (
        *existence(),
        *(asked("count", "count", _count(shown, name)) for name in shown.counts),
        *(asked("where", "where", _where(shown, name)) for name in shown.single),
    )
