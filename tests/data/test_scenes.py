import hashlib
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.masks import decode_mask
from age_vlm.data.questions import MODES
from age_vlm.data.scenes import (
    COLOURS,
    NUMBER_WORDS,
    SHAPES,
    SPLITS,
    IconsDataset,
    SceneConfig,
    ScenesDataset,
    draw_scene,
    partner,
    scene_items,
    scene_questions,
    scene_sample,
    to_dataset,
    training_frequency,
)
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
@given(st.sampled_from(SPLITS), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_scene_depends_on_its_key_alone(split, index, seed):
    scene = draw_scene(split, index, seed=seed)
    draw_scene(split, index + 1, seed=seed)
    assert same_scene(scene, draw_scene(split, index, seed=seed))
    assert digest(scene) != digest(draw_scene(split, index + 1, seed=seed))
    assert digest(scene) != digest(draw_scene(split, index, seed=seed + 1))


def test_splits_and_seeds_never_share_a_scene():
    keys = [(split, index, seed) for split in SPLITS for index in range(30) for seed in range(3)]
    scenes = [draw_scene(split, index, seed=seed) for split, index, seed in keys]
    assert len({digest(scene) for scene in scenes}) == len({scene.id for scene in scenes}) == len(keys)


@FEW
@given(SCENES)
def test_masks_are_disjoint_and_large_enough(scene):
    assert CONFIG.min_objects <= len(scene.objects) <= CONFIG.max_objects
    assert scene.image.size == (CONFIG.size, CONFIG.size) and scene.image.mode == "RGB"
    assert np.sum([o.mask for o in scene.objects], axis=0).max() == 1
    assert all(o.mask.sum() >= CONFIG.min_pixels for o in scene.objects)
    assert len({o.kind for o in scene.objects}) == len(scene.objects)


@FEW
@given(SCENES)
def test_masks_lie_on_pixels_of_their_colour(scene):
    pixels = np.asarray(scene.image, dtype=float)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    for item in scene.objects:
        mean = pixels[item.mask].mean(axis=0)
        assert names[np.abs(palette - mean).sum(axis=1).argmin()] == item.colour


@FEW
@given(SCENES)
def test_masks_hold_all_that_is_painted(scene):
    """Without noise and tint, saturated pixels are objects: none may lie outside the masks but for blended edges."""
    clean = draw_scene(scene.split, scene.index, replace(CONFIG, noise=0.0), scene.seed)
    pixels = np.asarray(clean.image, dtype=float)
    saturated = pixels.max(axis=2) - pixels.min(axis=2) > 70
    covered = np.logical_or.reduce([o.mask for o in clean.objects])
    rows, columns = covered.shape
    padded = np.pad(covered, 1)
    grown = np.logical_or.reduce([padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)])
    assert not (saturated & ~grown).any()
    assert saturated[covered].mean() > 0.8


@FEW
@given(SCENES)
def test_objects_of_one_colour_do_not_touch(scene):
    for colour in {o.colour for o in scene.objects}:
        alike = [np.pad(o.mask, 1) for o in scene.objects if o.colour == colour]
        for first, second in permutations(alike, 2):
            assert not (second & np.logical_or.reduce([np.roll(first, s, a) for a in (0, 1) for s in (-1, 1)])).any()


def test_objects_do_overlap_within_limits():
    """The largest visible area of a shape and size stands for the whole: sizes differ by 12 %, areas by a quarter."""
    whole = {}
    for item in (o for scene in train_scenes() for o in scene.objects):
        whole[item.shape, item.size] = max(item.mask.sum(), whole.get((item.shape, item.size), 0))
    shares = [o.mask.sum() / whole[o.shape, o.size] for scene in train_scenes() for o in scene.objects]
    assert CONFIG.min_visible * (0.94 / 1.06) ** 2 * 0.9 < min(shares) < (0.94 / 1.06) ** 2 * 0.9


def test_training_kinds_come_with_their_partner_but_not_always():
    seen, together = Counter(), Counter()
    for scene in train_scenes():
        kinds = {o.kind for o in scene.objects}
        seen.update(kinds)
        together.update(kind for kind in kinds if partner(kind) in kinds)
    assert set(seen) == set(CONFIG.kinds)
    assert all(0 < together[kind] < seen[kind] for kind in CONFIG.kinds)
    share = together.total() / seen.total()
    assert abs(share - CONFIG.partner_probability) < 0.04
    common = [kind for kind, times in seen.items() if times > 150]
    assert common and all(abs(together[k] / seen[k] - CONFIG.partner_probability) < 0.1 for k in common)


def test_training_kinds_are_skewed_as_announced_and_test_kinds_are_even():
    frequency = training_frequency(CONFIG)
    seen = Counter(o.kind for scene in train_scenes() for o in scene.objects)
    top = sorted(CONFIG.kinds, key=lambda kind: -frequency[kind])
    assert min(seen[kind] for kind in top[:4]) > 3 * max(seen[kind] for kind in top[-12:])
    even = Counter(o.kind for scene in held_out() for o in scene.objects)
    assert max(even.values()) < 3 * min(even[kind] for kind in CONFIG.kinds)
    pairs = [partner(o.kind) in {other.kind for other in scene.objects} for scene in held_out() for o in scene.objects]
    assert np.mean(pairs) < 0.2


def test_partners_are_mutual_and_differ_in_colour_and_shape():
    for kind in CONFIG.kinds:
        other = partner(kind)
        assert partner(other) == kind
        assert kind[0] != other[0] and kind[1] != other[1]


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
    assert asked == {(mode, answer): 1 for mode in MODES for answer in ("yes", "no")}
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
    chosen = {mode: Counter() for mode in MODES}
    for scene in held_out():
        questions = scene_questions(scene)
        kinds = {o.kind for o in scene.objects}
        absent = [kind for kind in CONFIG.kinds if kind not in kinds]
        for mode in MODES:
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
        for mode in MODES:
            answers = Counter(q.answer for q in scene_questions(scene, config) if q.mode == mode)
            assert answers["yes"] == answers["no"]


@pytest.mark.parametrize(
    "change",
    [
        {"size": 16},
        {"shapes": ("blob",)},
        {"shapes": ()},
        {"colours": ("red", "red")},
        {"min_objects": 0},
        {"max_objects": 1},
        {"max_objects": 12},
        {"partner_probability": 1.0},
        {"zipf_exponent": -1.0},
        {"min_visible": 1.5},
        {"min_pixels": 0},
        {"noise": -1.0},
    ],
)
def test_a_bad_config_names_the_argument(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SceneConfig(**change)


def test_too_many_objects_say_so():
    with pytest.raises(ValueError, match="max_objects is 9"):
        draw_scene("test", 0, SceneConfig(min_objects=9, max_objects=9, min_visible=1.0))


@pytest.mark.parametrize(
    ("arguments", "names"), [(("dev", 0), "split"), (("train", -1), "index"), (("train", 0, CONFIG, -1), "seed")]
)
def test_a_bad_key_names_the_argument(arguments, names):
    with pytest.raises(ValueError, match=names):
        draw_scene(*arguments)


def test_the_dataset_holds_the_samples_of_its_scenes():
    data = ScenesDataset("train", 5, seed=3)
    assert len(data) == 5 and data[4] is data[-1] is data[4]
    fresh = ScenesDataset("train", 9, seed=3)
    for index in (4, 0):
        assert data[index]["messages"] == fresh[index]["messages"]
        assert data[index]["groundings"] == fresh[index]["groundings"]
        assert data[index]["images"][0].tobytes() == draw_scene("train", index, seed=3).image.tobytes()
    assert len(list(data)) == 5
    with pytest.raises(IndexError):
        data[5]
    with pytest.raises(ValueError, match="length"):
        ScenesDataset("train", 0)
    with pytest.raises(ValueError, match="split"):
        ScenesDataset("dev", 1)


def test_items_and_stored_samples_are_those_of_the_scenes():
    items = scene_items("validation", 3, seed=1)
    scenes = [draw_scene("validation", index, seed=1) for index in range(3)]
    assert [item.image_id for item in items] == [scene.id for scene in scenes]
    assert [item.questions for item in items] == [scene_questions(scene) for scene in scenes]
    stored = to_dataset("validation", 3, seed=1)
    for row, scene in zip(stored, scenes, strict=True):
        validate_sample(row)
        sample = scene_sample(scene)
        assert row["messages"] == sample["messages"] and row["groundings"] == sample["groundings"]
        assert row["images"][0].tobytes() == scene.image.tobytes()


def test_icons_show_the_colour_of_their_label_where_jitter_puts_them():
    anywhere, centred = IconsDataset(80), IconsDataset(80, jitter=0.0)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    assert len(anywhere.class_names) == len(SHAPES) * len(COLOURS)
    middle = slice(CONFIG.size // 2 - 1, CONFIG.size // 2 + 1)
    for index in range(80):
        item = centred[index]
        assert item["image"].size == (CONFIG.size, CONFIG.size)
        colour, shape = centred.class_names[item["label"]].split()
        assert SHAPES.index(shape) * len(COLOURS) + names.index(colour) == item["label"]
        if shape != "ring":
            seen = np.asarray(item["image"], dtype=float)[middle, middle].mean(axis=(0, 1))
            assert names[np.abs(palette - seen).sum(axis=1).argmin()] == colour
    assert anywhere[0]["image"].tobytes() == IconsDataset(80)[0]["image"].tobytes()
    assert {anywhere[i]["label"] for i in range(80)} > {anywhere[0]["label"]}
    with pytest.raises(ValueError, match="jitter"):
        IconsDataset(3, jitter=2.0)
