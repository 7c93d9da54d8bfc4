import hashlib
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from age_vlm.data.scene_datasets import IconsDataset, ScenesDataset, scene_items, to_dataset
from age_vlm.data.scene_drawing import COLOURS, SHAPES
from age_vlm.data.scene_questions import scene_questions, scene_sample
from age_vlm.data.scenes import SPLITS, SceneConfig, draw_scene
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


@pytest.mark.parametrize("texts", [["caption"], ["relation"], ["existence", "colour"]])
def test_some_kinds_of_texts_are_kept_as_they_are(texts):
    some, whole = ScenesDataset("train", 12, texts=texts), ScenesDataset("train", 12)
    fresh = ScenesDataset("train", 12, texts=texts)
    for index in range(12):
        sample, all_of_it = some[index], whole[index]
        validate_sample(sample)
        turns = [tuple(map(message_text, pair)) for pair in zip(sample["messages"][::2], sample["messages"][1::2])]
        assert turns and {kind_of(question) for question, _ in turns} <= set(texts)
        if sample["id"] == all_of_it["id"]:
            said = list(map(message_text, all_of_it["messages"]))
            expected = [pair for pair in zip(said[::2], said[1::2]) if kind_of(pair[0]) in texts]
            assert turns == expected
            grounded = {phrase(all_of_it, g) for g in all_of_it["groundings"]}
            assert {phrase(sample, g) for g in sample["groundings"]} <= grounded
        assert fresh[index]["messages"] == sample["messages"]
    if texts == ["caption"]:
        assert all(some[index]["id"] == whole[index]["id"] for index in range(12))


def kind_of(question):
    starts = {"is the ": "relation", "is there": "existence", "do you": "existence", "how many": "count"}
    starts |= {"what colour": "colour", "which colour": "colour"}
    return next((kind for start, kind in starts.items() if question.startswith(start)), "caption")


def phrase(sample, grounding):
    text = message_text(sample["messages"][grounding["message"]])
    return text[grounding["start"] : grounding["end"]], grounding["mask"]["counts"]


def test_texts_of_no_kind_are_refused():
    for texts in ([], ["captions"]):
        with pytest.raises(ValueError, match="^texts: got .*, expected some of caption, existence"):
            ScenesDataset("train", 3, texts=texts)


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
