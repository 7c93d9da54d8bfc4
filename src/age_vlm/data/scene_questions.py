"""What is said of drawn scenes: training texts with grounded phrases, and evaluation questions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from .masks import MaskRLE, encode_mask
from .plurals import plural
from .questions import NUMBER_WORDS, POPE_MODES, Question, existence_negatives
from .scenes import QUESTIONS, SIZES, TEXT, Kind, Scene, SceneConfig, beside, generator, pick, training_frequency
from .schema import Grounding, Message, Sample, assistant_message, grounding, user_message


# Popular negatives come from this many of the most frequent absent kinds: POPE asks about three per image and mode.
POPULAR_POOL = 3

_CAPTION_PROMPTS = ("describe the picture.", "what is in the picture?", "what do you see?")
_EXISTENCE = ("is there a {} in the picture?", "is there a {}?", "do you see a {}?")
_COUNT = ("how many {} are there?", "how many {} are in the picture?")
_COLOUR = ("what colour is the {}?", "which colour has the {}?")
_RELATION = ("is the {} {} of the {}?",)
_SIDES = ("left", "right")


@dataclass(frozen=True)
class _Turn:
    """A question, its answer, the span asked about, and the grounded spans of either text as (start, end, mask)."""

    question: str
    answer: str
    about: tuple[int, int] | None = None
    in_question: tuple[tuple[int, int, np.ndarray], ...] = ()
    in_answer: tuple[tuple[int, int, np.ndarray], ...] = ()


def _fill(template: str, *words: str) -> tuple[str, list[tuple[int, int]]]:
    """Fill in a template; also the character span of each word put in."""
    pieces = template.split("{}")
    text, spans = pieces[0], []
    for word, piece in zip(words, pieces[1:], strict=True):
        spans.append((len(text), len(text) + len(word)))
        text += word + piece
    return text, spans


def _affinity(scene: Scene, config: SceneConfig) -> dict[Kind, float]:
    """Rank of kinds as adversarial negatives: colour and shape both in the scene, else one of them, else neither."""
    colours, shapes = {o.colour for o in scene.objects}, {o.shape for o in scene.objects}
    return {kind: (kind[0] in colours) + (kind[1] in shapes) for kind in config.kinds}


def _negatives(scene: Scene, config: SceneConfig, rng: np.random.Generator) -> dict[str, Kind]:
    chosen = existence_negatives(
        [o.kind for o in scene.objects],
        config.kinds,
        frequency=training_frequency(config),
        affinity=_affinity(scene, config),
        rng=rng,
        pool=POPULAR_POOL,
    )
    # A scene may show every kind of a tiny palette: then nothing is absent.
    return {mode: kinds[0] for mode, kinds in chosen.items() if kinds}


def _existence_turn(scene: Scene, kind: Kind, template: str) -> _Turn:
    text, (span,) = _fill(template, " ".join(kind))
    masks = [o.mask for o in scene.objects if o.kind == kind]
    return _Turn(text, "yes" if masks else "no", span, tuple((*span, mask) for mask in masks))


def _caption_turn(scene: Scene, rng: np.random.Generator) -> _Turn:
    text, spans = "", []
    for position, number in enumerate(rng.permutation(len(scene.objects))):
        item = scene.objects[number]
        if position:
            text += " and " if position == len(scene.objects) - 1 else ", "
        text += f"a {item.size} " if rng.random() < 0.5 else "a "
        phrase = " ".join(item.kind)
        spans.append((len(text), len(text) + len(phrase), item.mask))
        text += phrase
    return _Turn(pick(_CAPTION_PROMPTS, rng), text, in_answer=tuple(spans))


def _count_turn(scene: Scene, template: str, config: SceneConfig, rng: np.random.Generator) -> _Turn:
    groups = [(plural(shape), [o.mask for o in scene.objects if o.shape == shape]) for shape in config.shapes]
    groups += [(f"{name} objects", [o.mask for o in scene.objects if o.colour == name]) for name in config.colours]
    # The answer is chosen first, so that 'zero' is no better a guess than the others a scene allows.
    answer = pick(sorted({len(masks) for _, masks in groups}), rng)
    noun, masks = pick([group for group in groups if len(group[1]) == answer], rng)
    text, (span,) = _fill(template, noun)
    return _Turn(text, NUMBER_WORDS[answer], span, ((*span, np.logical_or.reduce(masks)),) if masks else ())


def _colour_turn(scene: Scene, template: str, rng: np.random.Generator) -> _Turn | None:
    """Ask the colour of the only object of its shape, or of its size and shape; None when there is no such object."""
    options = []
    for item in scene.objects:
        alike = [o for o in scene.objects if o.shape == item.shape]
        if len(alike) == 1:
            options.append((item.shape, item))
        elif sum(o.size == item.size for o in alike) == 1:
            options.append((f"{item.size} {item.shape}", item))
    if not options:
        return None
    noun, item = pick(options, rng)
    text, (span,) = _fill(template, noun)
    return _Turn(text, item.colour, span, ((*span, item.mask),))


def _relation_turn(scene: Scene, rng: np.random.Generator) -> _Turn | None:
    """Ask whether one object is left or right of another; None when no two are clearly apart sideways."""
    pairs = beside([o.centre[0] for o in scene.objects], scene.image.width)
    if not pairs:
        return None
    first, second = (scene.objects[i] for i in pick(pairs, rng))
    holds = "left"
    if rng.random() < 0.5:
        first, second, holds = second, first, "right"
    side = pick(_SIDES, rng)
    text, spans = _fill(_RELATION[0], " ".join(first.kind), side, " ".join(second.kind))
    grounded = ((*spans[0], first.mask), (*spans[2], second.mask))
    return _Turn(text, "yes" if side == holds else "no", spans[0], grounded)


def scene_sample(
    scene: Scene,
    rng: np.random.Generator | None = None,
    config: SceneConfig | None = None,
    texts: Collection[str] | None = None,
) -> Sample:
    """The training text of a scene: a sample of the schema whose user and assistant pairs are independent turns.

    One caption; up to four existence questions, half of them about absent objects (one adversarial negative, one random
    or popular); one question each of count, colour and left or right where the scene allows it. The turns are in random
    order. Every phrase that names something visible is grounded: its span ends with the shape (or the plural counted).

    Args:
        scene: a scene of any split.
        rng: chooses the text; by default a generator of the scene's own, so the text of a scene is always the same.
        config: the config the scene was drawn with.
        texts: kinds of turns to keep, `caption` or one of `QUESTION_KINDS`; all when left out. What is kept does not
            depend on what is not, and there may be nothing to keep.
    """
    config = config or SceneConfig()
    rng = rng or generator(scene.split, scene.index, scene.seed, TEXT)
    negatives = _negatives(scene, config, rng)
    modes = ("adversarial", pick(("random", "popular"), rng), "random", "popular")
    # The modes choose independently, and may choose the same kind.
    absent = list(dict.fromkeys(negatives[mode] for mode in modes if mode in negatives))[:2]
    present = [scene.objects[i].kind for i in rng.permutation(len(scene.objects))[:2]]
    pairs = min(len(present), len(absent))
    turns: list[tuple[str, _Turn | None]] = [("caption", _caption_turn(scene, rng))]
    for kind in present[:pairs] + absent[:pairs]:
        turns.append(("existence", _existence_turn(scene, kind, pick(_EXISTENCE, rng))))
    turns.append(("count", _count_turn(scene, pick(_COUNT, rng), config, rng)))
    turns.append(("colour", _colour_turn(scene, pick(_COLOUR, rng), rng)))
    turns.append(("relation", _relation_turn(scene, rng)))
    turns = [(kind, turn) for kind, turn in turns if turn is not None]

    messages: list[Message] = []
    groundings: list[Grounding] = []
    # An object is named in several turns; its mask is encoded once. The turns keep the arrays, and so their ids, alive.
    encoded: dict[int, MaskRLE] = {}
    for number in rng.permutation(len(turns)):
        kind, turn = turns[number]
        if texts is not None and kind not in texts:
            continue
        pair = (user_message(turn.question, images=0 if messages else 1), assistant_message(turn.answer))
        for message, spans in zip(pair, (turn.in_question, turn.in_answer), strict=True):
            for start, end, mask in spans:
                if id(mask) not in encoded:
                    encoded[id(mask)] = encode_mask(mask)
                groundings.append(grounding(len(messages), start, end, 0, encoded[id(mask)]))
            messages.append(message)
    return {"id": scene.id, "images": [scene.image], "messages": messages, "groundings": groundings}


def scene_questions(scene: Scene, config: SceneConfig | None = None) -> tuple[Question, ...]:
    """The evaluation questions of a scene, always the same ones for the same scene.

    Existence: in each of POPE's modes one object that is there and one that is not. The random negative is uniform; the
    popular one is among the three most frequent in training of those absent; the adversarial one has the colour of one
    object and the shape of another. Where a tiny palette leaves no such kind, it shares colour or shape with an object,
    and where even that is not to be had it is any absent kind; with nothing absent a mode asks nothing, so that yes and
    no stay balanced. Then one question each of count, colour and left or right where the scene allows it.
    """
    config = config or SceneConfig()
    rng = generator(scene.split, scene.index, scene.seed, QUESTIONS)
    questions: list[Question] = []

    def ask(turn: _Turn, name: str, kind: str, mode: str | None = None) -> None:
        start, end, mask = turn.in_question[0] if turn.in_question else (*turn.about, None)
        rle = None if mask is None else encode_mask(mask)
        questions.append(
            Question(f"{scene.id}/{name}", scene.id, turn.question, turn.answer, kind, mode, (start, end), rle)
        )

    negatives = _negatives(scene, config, rng)
    present = [scene.objects[i].kind for i in rng.permutation(len(scene.objects))]
    for number, mode in enumerate(mode for mode in POPE_MODES if mode in negatives):
        for answer, kind in (("yes", present[number % len(present)]), ("no", negatives[mode])):
            ask(_existence_turn(scene, kind, _EXISTENCE[0]), f"{mode}-{answer}", "existence", mode)
    ask(_count_turn(scene, _COUNT[0], config, rng), "count", "count")
    if turn := _colour_turn(scene, _COLOUR[0], rng):
        ask(turn, "colour", "colour")
    if turn := _relation_turn(scene, rng):
        ask(turn, "relation", "relation")
    return tuple(questions)


def scene_texts(config: SceneConfig | None = None) -> Iterator[str]:
    """Texts that together hold every word scenes of this config can say: what a closed vocabulary is built from."""
    config = config or SceneConfig()
    shapes, objects = [*config.shapes, *map(plural, config.shapes)], [f"{colour} objects" for colour in config.colours]
    yield from _CAPTION_PROMPTS
    yield from (_fill(template, "")[0] for template in (*_EXISTENCE, *_COUNT, *_COLOUR))
    yield from (_fill(template, "", side, "")[0] for template in _RELATION for side in _SIDES)
    yield from (*shapes, *objects, *SIZES, *NUMBER_WORDS, "yes", "no", "a, and")
