import hashlib
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.masks import decode_mask
from age_vlm.data.questions import NUMBER_WORDS, POPE_MODES
from age_vlm.data.scene_drawing import COLOURS, SHAPES
from age_vlm.data.scene_questions import scene_questions, scene_sample
from age_vlm.data.scenes import SPLITS, SceneConfig, draw_scene, training_frequency
from age_vlm.data.schema import message_text, validate_sample


CONFIG = SceneConfig()
FEW = settings(max_examples=50, deadline=None)
SCENES = st.builds(draw_scene, st.sampled_from(SPLITS), st.integers(0, 10**6), seed=st.integers(0, 10**6))


@lru_cache
def train_scenes():
    return [draw_scene("train", index) for index in range(1500)]


@lru_cache
def held_out():
    return [draw_scene("test", index) for index in range(400)]


def digest(scene):
    return hashlib.sha256(scene.image.tobytes()).digest()


def same_scene(first, second):
    masks = all(np.array_equal(a.mask, b.mask) for a, b in zip(first.objects, second.objects, strict=True))
    described = [[(o.kind, o.size, o.centre) for o in scene.objects] for scene in (first, second)]
    return digest(first) == digest(second) and masks and described[0] == described[1]


@FEW
@given(SCENES)
def test_training_text_follows_the_schema_and_is_always_the_same(scene):
    sample = scene_sample(scene)
    validate_sample(sample)
    assert sample == scene_sample(scene)
    assert [m["role"] for m in sample["messages"]] == ["user", "assistant"] * (len(sample["messages"]) // 2)
    assert all(part["type"] == "text" for m in sample["messages"][1:] for part in m["content"])


def truth(scene, text):
    """What the objects of a scene say to a question, read from its words alone."""
    words = text.rstrip("?.").split()
    match words:
        case ["is", "there", "a", colour, shape, *_] | ["do", "you", "see", "a", colour, shape]:
            return "yes" if (colour, shape) in {o.kind for o in scene.objects} else "no"
        case ["how", "many", colour, "objects", *_]:
            return NUMBER_WORDS[sum(o.colour == colour for o in scene.objects)]
        case ["how", "many", plural, *_]:
            return NUMBER_WORDS[sum(plural in (o.shape + "s", o.shape + "es") for o in scene.objects)]
        case [("what" | "which"), "colour", ("is" | "has"), "the", *noun]:
            found = {o.colour for o in scene.objects if noun in ([o.shape], [o.size, o.shape])}
            assert len(found) == 1
            return found.pop()
        case ["is", "the", colour, shape, side, "of", "the", other_colour, other_shape]:
            places = {o.kind: o.centre[0] for o in scene.objects}
            first, second = places[colour, shape], places[other_colour, other_shape]
            assert abs(first - second) >= scene.image.width / 8
            return "yes" if (side == "left") == (first < second) else "no"
    raise AssertionError(text)


def named_mask(scene, phrase):
    """Union of the masks of all objects a phrase means; one that is not a plural must mean exactly one."""
    plurals = {plural: shape for shape in SHAPES for plural in (f"{shape}s", f"{shape}es")}
    plural = phrase.split()[-1] in {"objects", *plurals}
    words = {plurals.get(word, word) for word in phrase.split()} - {"objects"}
    meant = [o.mask for o in scene.objects if words <= {o.colour, o.shape, o.size}]
    assert meant and (plural or len(meant) == 1)
    return np.logical_or.reduce(meant)


@FEW
@given(SCENES)
def test_training_answers_and_groundings_are_true(scene):
    sample = scene_sample(scene)
    messages = [message_text(message) for message in sample["messages"]]
    captions = 0
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        if " a " in f" {answer} ":
            captions += 1
            named = [tuple(part.split()[-2:]) for part in answer.replace(" and ", ", ").split(", ")]
            assert sorted(named) == sorted(o.kind for o in scene.objects)
            for part in answer.replace(" and ", ", ").split(", "):
                size = part.split()[1]
                item = next(o for o in scene.objects if o.kind == tuple(part.split()[-2:]))
                assert size not in ("small", "large") or size == item.size
        else:
            assert answer == truth(scene, question)
    assert captions == 1
    for item in sample["groundings"]:
        phrase = messages[item["message"]][item["start"] : item["end"]]
        assert np.array_equal(decode_mask(item["mask"]), named_mask(scene, phrase))


@FEW
@given(SCENES)
def test_every_named_visible_object_is_grounded(scene):
    sample = scene_sample(scene)
    spans = {(g["message"], g["start"], g["end"]) for g in sample["groundings"]}
    for number, message in enumerate(sample["messages"]):
        text = message_text(message)
        for item in scene.objects:
            phrase = " ".join(item.kind)
            start = text.find(phrase)
            assert start < 0 or (number, start, start + len(phrase)) in spans


@FEW
@given(SCENES)
def test_training_asks_about_present_and_absent_alike(scene):
    sample = scene_sample(scene)
    texts = [message_text(message) for message in sample["messages"]]
    asked = [(q, a) for q, a in zip(texts[::2], texts[1::2], strict=True) if q.startswith(("is there", "do you see a"))]
    assert Counter(answer for _, answer in asked) == {"yes": 2, "no": 2}
    colours, shapes = {o.colour for o in scene.objects}, {o.shape for o in scene.objects}
    # Few training scenes, all of one colour or all of one shape, have no adversarial negative.
    if len(colours) * len(shapes) > len(scene.objects):
        words = [set(question.rstrip("?").split()) for question, answer in asked if answer == "no"]
        assert any(colours & w and shapes & w for w in words)


@FEW
@given(SCENES)
def test_evaluation_asks_each_mode_once_about_present_and_once_about_absent(scene):
    questions = scene_questions(scene)
    assert questions == scene_questions(scene)
    assert len({q.id for q in questions}) == len(questions)
    asked = Counter((q.mode, q.answer) for q in questions if q.kind == "existence")
    assert asked == {(mode, answer): 1 for mode in POPE_MODES for answer in ("yes", "no")}
    assert {q.kind for q in questions} >= {"existence", "count", "relation"}
    for question in questions:
        assert question.image_id == scene.id
        assert question.answer == truth(scene, question.text)
        phrase = question.text[slice(*question.phrase)]
        assert phrase and phrase == phrase.strip()
        if question.answer in ("no", "zero") and question.kind in ("existence", "count"):
            assert question.mask is None
        else:
            assert np.array_equal(decode_mask(question.mask), named_mask(scene, phrase))


def negative(questions, mode):
    question = next(q for q in questions if q.mode == mode and q.answer == "no")
    return tuple(question.text[slice(*question.phrase)].split())


def test_evaluation_negatives_are_what_their_mode_says():
    frequency = training_frequency(CONFIG)
    chosen = {mode: Counter() for mode in POPE_MODES}
    for scene in held_out():
        questions = scene_questions(scene)
        kinds = {o.kind for o in scene.objects}
        absent = [kind for kind in CONFIG.kinds if kind not in kinds]
        for mode in POPE_MODES:
            chosen[mode][negative(questions, mode)] += 1
        popular = frequency[negative(questions, "popular")]
        assert popular >= sorted((frequency[kind] for kind in absent), reverse=True)[2]
        colour, shape = negative(questions, "adversarial")
        assert colour in {colour for colour, _ in kinds} and shape in {shape for _, shape in kinds}
    assert len(chosen["popular"]) < 12 < 30 < len(chosen["random"])


@pytest.mark.parametrize("kind", ["count", "relation"])
def test_no_single_answer_wins(kind):
    answers = Counter(q.answer for scene in held_out() for q in scene_questions(scene) if q.kind == kind)
    assert max(answers.values()) < 0.6 * answers.total()


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        SceneConfig,
        size=st.integers(48, 120),
        shapes=st.permutations(SHAPES).flatmap(lambda s: st.integers(1, 6).map(lambda n: tuple(s[:n]))),
        colours=st.permutations(list(COLOURS)).flatmap(lambda c: st.integers(2, 6).map(lambda n: tuple(c[:n]))),
        min_objects=st.just(1),
        max_objects=st.integers(1, 2),
        zipf_exponent=st.floats(0, 2),
        partner_probability=st.floats(0, 0.95),
    ),
    st.sampled_from(SPLITS),
)
def test_other_palettes_draw_and_speak_too(config, split):
    for index in range(4):
        scene = draw_scene(split, index, config)
        sample = scene_sample(scene, config=config)
        validate_sample(sample)
        assert {o.shape for o in scene.objects} <= set(config.shapes)
        assert {o.colour for o in scene.objects} <= set(config.colours)
        for mode in POPE_MODES:
            answers = Counter(q.answer for q in scene_questions(scene, config) if q.mode == mode)
            assert answers["yes"] == answers["no"]
