"""Questions about instances, from what images show to texts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from age_vlm.data.instance_questions import ASKED, Shown, check_asked, evaluation_questions, position_of, training_turns
from age_vlm.data.masks import decode_mask, encode_mask
from age_vlm.data.questions import POPE_MODES, KindStatistics


SIDE = 20
NAMES = ["dog", "umbrella", "skis", "scissors", "sheep", "broccoli", "wine glass", "person"]
STATISTICS = KindStatistics.count([["dog", "person"], ["dog", "sheep"], ["dog"], ["umbrella", "person"]])


def box(x0, y0, x1, y1, side=SIDE):
    mask = np.zeros((side, side), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@st.composite
def instances(draw):
    """Category -> pixels of each of its instances, whose boxes may overlap."""
    corner, size = st.integers(0, SIDE - 5), st.integers(1, 5)
    one = st.tuples(corner, corner, size, size).map(lambda b: box(b[0], b[1], b[0] + b[2], b[1] + b[3]))
    return draw(st.dictionaries(st.sampled_from(NAMES), st.lists(one, min_size=1, max_size=4), max_size=5))


def encoded(masks):
    return {name: [encode_mask(mask) for mask in each] for name, each in masks.items()}


def kind_of(text):
    return "presence" if " there " in text else "count" if text.startswith("How many") else "where"


@given(instances(), instances(), st.sets(st.sampled_from(NAMES)), st.floats(0, 0.1), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_what_is_asked_is_clear_and_yes_as_frequent_as_no(things, crowds, unclear, min_area, seed):
    shown = Shown("1", NAMES, encoded(things), encoded(crowds), unclear, min_area)
    areas = {name: np.any([*things.get(name, []), *crowds.get(name, [])], axis=0) for name in {*things, *crowds}}
    turns = training_turns(shown, STATISTICS, seed=seed)
    assert len({turn.question for turn in turns}) == len(turns)
    assert max(Counter(kind_of(turn.question) for turn in turns).values(), default=0) <= 6
    yes_no = Counter(turn.answer for turn in turns if kind_of(turn.question) == "presence")
    clear = [name for name in areas if name not in unclear and areas[name].mean() >= min_area]
    absent = set(NAMES) - set(areas) - unclear
    assert yes_no["Yes"] == yes_no["No"] == min(3, len(clear), len(absent))
    for turn in turns:
        kind = kind_of(turn.question)
        assert turn.name not in unclear
        if turn.answer == "No":
            assert turn.name in absent and turn.mask is None and kind == "presence"
            continue
        assert areas[turn.name].mean() >= min_area
        assert np.array_equal(decode_mask(turn.mask), areas[turn.name])
        if kind != "presence":
            assert turn.name not in crowds
        if kind == "count":
            assert turn.answer == ["One", "Two", "Three", "Four"][len(things[turn.name]) - 1]
            assert all(mask.mean() >= min_area for mask in things[turn.name])
        if kind == "where":
            assert len(things[turn.name]) == 1


@given(instances(), st.integers(0, 9), st.data())
@settings(max_examples=30, deadline=None)
def test_the_order_of_annotations_and_other_kinds_change_nothing(things, seed, data):
    turns = training_turns(Shown("1", NAMES, encoded(things)), STATISTICS, seed=seed)
    mixed = {name: data.draw(st.permutations(things[name])) for name in data.draw(st.permutations(list(things)))}
    again = Shown("1", data.draw(st.permutations(NAMES)), encoded(mixed))
    assert training_turns(again, STATISTICS, seed=seed) == turns
    assert evaluation_questions(again, STATISTICS) == evaluation_questions(
        Shown("1", NAMES, encoded(things)), STATISTICS
    )
    for kind in ASKED:
        alone = training_turns(again, STATISTICS, [kind], seed=seed)
        assert sorted(t.question for t in alone) == sorted(t.question for t in turns if kind_of(t.question) == kind)


@pytest.mark.parametrize("pixels", [19, 20, 21])
def test_the_area_of_a_category_is_that_of_all_its_instances(pixels):
    # 20 pixels of 4000 are .5 %; each instance alone is below.
    whole = np.zeros((40, 100), bool)
    halves = [whole.copy(), whole.copy()]
    halves[0][0, :10] = True
    halves[1][1, : pixels - 10] = True
    shown = Shown("1", ["dog", "cat"], {"dog": [encode_mask(half) for half in halves]})
    assert ("dog" in shown.present) == (pixels >= 20)
    assert shown.absent == ["cat"] and not shown.counts and not shown.single


WHOLE = encode_mask(np.ones((SIDE, SIDE), bool))


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("dog", 1, {"Is there a dog in the image?", "How many dogs are in the image?", "Where is the dog?"}),
        ("dog", 9, {"Is there a dog in the image?", "How many dogs are in the image?"}),
        ("dog", 10, {"Is there a dog in the image?"}),
        ("umbrella", 2, {"Is there an umbrella in the image?", "How many umbrellas are in the image?"}),
        ("person", 2, {"Is there a person in the image?", "How many people are in the image?"}),
        ("sheep", 2, {"Is there a sheep in the image?", "How many sheep are in the image?"}),
        ("skis", 1, {"Are there skis in the image?", "Where are the skis?"}),
        ("scissors", 2, {"Are there scissors in the image?"}),
        ("broccoli", 1, {"Is there broccoli in the image?", "Where is the broccoli?"}),
    ],
)
def test_questions_are_english_and_point_at_the_word(name, number, expected):
    turns = training_turns(Shown("1", [name, "cup"], {name: [WHOLE] * number}), STATISTICS)
    about = [turn for turn in turns if turn.name == name]
    assert {turn.question for turn in about} == expected
    for turn in about:
        word = turn.question[slice(*turn.span)]
        assert turn.question.endswith(f" {word}{' are' * turn.question.startswith('How')} in the image?") or (
            turn.question.endswith(f"the {word}?")
        )
        assert word[:2] == name[:2]
    assert all(turn.answer[0].isupper() and turn.answer[1:].islower() for turn in turns)


@pytest.mark.parametrize(
    ("corner", "words"),
    [
        ((0, 0), "In the top left"),
        ((10, 0), "At the top"),
        ((20, 0), "In the top right"),
        ((0, 10), "On the left"),
        ((10, 10), "In the center"),
        ((20, 10), "On the right"),
        ((0, 20), "In the bottom left"),
        ((10, 20), "At the bottom"),
        ((20, 20), "In the bottom right"),
    ],
)
def test_places_are_ninths_by_the_centroid(corner, words):
    x, y = corner
    for dx, dy in ((0, 0), (9, 9), (0, 9)):
        assert position_of(encode_mask(box(x + dx, y + dy, x + dx + 1, y + dy + 1, 30))) == words


def test_the_centroid_lies_on_the_side_with_more_of_it():
    assert position_of(encode_mask(box(0, 0, 30, 30, 30))) == "In the center"
    # Columns 0 to 18 have the centroid 9.5 pixels from the left, columns 0 to 19 exactly a third from it.
    assert position_of(encode_mask(box(0, 0, 19, 30, 30))) == "On the left"
    assert position_of(encode_mask(box(0, 0, 20, 30, 30))) == "In the center"


KINDS = [f"thing{letter}" for letter in "abcdefgh"]


@given(
    st.lists(st.lists(st.sampled_from(KINDS), max_size=4), max_size=8),
    st.sets(st.sampled_from(KINDS), min_size=1, max_size=7),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_pope_asks_what_its_modes_say(images, there, seed):
    statistics = KindStatistics.count(images)
    questions = evaluation_questions(Shown("7", KINDS, {name: [WHOLE] for name in there}), statistics, seed=seed)
    frequency = Counter(kind for image in map(set, images) for kind in image)
    absent = set(KINDS) - there
    count = min(3, len(there), len(absent))
    asked = [q for q in questions if q.kind == "existence"]
    assert {q.subject: q.answer for q in asked if q.mode is None} == {
        kind: "yes" if kind in there else "no" for kind in KINDS
    }
    assert len({q.id for q in questions}) == len(questions) and {q.image_id for q in questions} == {"7"}
    for mode in POPE_MODES:
        named = {answer: [q.subject for q in asked if (q.mode, q.answer) == (mode, answer)] for answer in ("yes", "no")}
        assert len(set(named["yes"])) == len(set(named["no"])) == count
        assert set(named["yes"]) <= there and set(named["no"]) <= absent
        if mode != "random":
            pairs = {kind: sum({kind, other} <= set(image) for image in images for other in there) for kind in absent}
            scores, size = (frequency, 3) if mode == "popular" else (pairs, count)
            limit = sorted((scores[kind] for kind in absent), reverse=True)[:size]
            assert all(scores[kind] >= limit[-1] for kind in named["no"])
    assert not any(q.mode for q in evaluation_questions(Shown("7", KINDS, {"thinga": [WHOLE]})))


def test_training_asks_by_all_modes_and_counts_more_than_one():
    frequent = KindStatistics.count([["thinga", "thingb"], ["thingc"], ["thingc"]])
    negatives = Counter()
    for number in range(300):
        turns = training_turns(Shown(str(number), KINDS, {"thinga": [WHOLE]}), frequent, ["presence"], per_kind=1)
        negatives.update(turn.name for turn in turns if turn.answer == "No")
    # The adversarial one is b, the popular one c: half of all; the other half is spread over all that is absent.
    assert set(negatives) == set(KINDS[1:])
    uniform = 150 / len(KINDS[1:])
    assert all(60 <= negatives[kind] - uniform <= 95 for kind in ("thingb", "thingc"))
    assert all(uniform / 3 <= negatives[kind] <= 2 * uniform for kind in KINDS[3:])
    shown = Shown("1", KINDS, {kind: [WHOLE] * (1 + (kind == "thingh")) for kind in KINDS})
    for seed in range(10):
        answers = [turn.answer for turn in training_turns(shown, frequent, ["count"], per_kind=2, seed=seed)]
        assert sorted(answers) == ["One", "Two"]


@given(st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_choices_depend_on_seed_and_image(seed, other):
    assume(seed != other)

    def turns(id, seed):
        return [training_turns(Shown(f"{id}{n}", KINDS, {"thinga": [WHOLE]}), STATISTICS, seed=seed) for n in range(9)]

    assert turns("a", seed) == turns("a", seed)
    assert turns("a", seed) != turns("a", other) and turns("a", seed) != turns("b", seed)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("presence", "questions: got 'presence', expected a list of some of presence, count, where"),
        (3, "questions: got 3, expected a list of some"),
        (["presense"], r"questions: got 'presense', expected one of .* \(nearest: 'presence'\)"),
        (["count", "count"], "each kind once"),
    ],
)
def test_kinds_that_are_none_are_named(questions, message):
    with pytest.raises(ValueError, match=message):
        check_asked(questions)
