import copy

import numpy as np
import pytest
from datasets import Dataset, Features, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.masks import decode_mask
from age_vlm.data.schema import (
    FEATURES,
    assistant_message,
    grounding,
    message_text,
    user_message,
    validate_sample,
)


def make_sample():
    mask = np.zeros((6, 8), bool)
    mask[1:3, 2:7] = True
    return {
        "id": "one",
        "images": [Image.new("RGB", (8, 6), "red")],
        "messages": [user_message("is there a dog?", images=1), assistant_message("yes")],
        "groundings": [grounding(0, 11, 14, 0, mask)],
    }


@given(st.lists(st.one_of(st.none(), st.text(max_size=8)), max_size=6))
def test_message_text_joins_the_text_parts_only(parts):
    content = [{"type": "image", "text": None} if p is None else {"type": "text", "text": p} for p in parts]
    assert message_text({"role": "user", "content": content}) == "".join(p for p in parts if p is not None)


def test_image_parts_are_separate_and_come_first():
    content = user_message("hi", images=2)["content"]
    assert [part["type"] for part in content] == ["image", "image", "text"]
    assert content[0] is not content[1]


def test_a_sample_survives_storage(tmp_path):
    sample = make_sample()
    Dataset.from_list([sample], features=FEATURES).to_parquet(tmp_path / "data.parquet")
    loaded = Dataset.from_parquet(str(tmp_path / "data.parquet"), cache_dir=str(tmp_path))[0]
    validate_sample(loaded)
    assert loaded["messages"] == sample["messages"]
    assert loaded["groundings"] == sample["groundings"]
    assert np.array_equal(np.asarray(loaded["images"][0]), np.asarray(sample["images"][0]))


def test_a_sample_from_before_there_were_boxes_is_one_still(tmp_path):
    sample = make_sample()
    for item in sample["groundings"]:
        del item["box"]
    validate_sample(sample)
    grounded = FEATURES["groundings"].feature
    features = Features({**FEATURES, "groundings": [{key: grounded[key] for key in grounded if key != "box"}]})
    Dataset.from_list([sample], features=features).to_parquet(tmp_path / "old.parquet")
    old = Dataset.from_parquet(str(tmp_path / "old.parquet"), cache_dir=str(tmp_path))
    assert "box" not in old[0]["groundings"][0]
    validate_sample(old[0])
    both = concatenate_datasets([old.cast(FEATURES), Dataset.from_list([make_sample()], features=FEATURES)])
    assert both[0]["groundings"] == both[1]["groundings"] == make_sample()["groundings"]


@pytest.mark.parametrize("box", [None, [2, 1, 7, 3.5]])
def test_a_phrase_without_a_mask_survives_storage(tmp_path, box):
    sample = make_sample()
    sample["groundings"] = [grounding(0, 11, 14, 0, None, box)]
    validate_sample(sample)
    Dataset.from_list([sample], features=FEATURES).to_parquet(tmp_path / "data.parquet")
    loaded = Dataset.from_parquet(str(tmp_path / "data.parquet"), cache_dir=str(tmp_path))[0]
    validate_sample(loaded)
    assert loaded["groundings"] == sample["groundings"]


def test_a_grounding_accepts_an_array_or_an_encoding():
    item = make_sample()["groundings"][0]
    assert grounding(0, 11, 14, 0, decode_mask(item["mask"])) == grounding(0, 11, 14, 0, item["mask"]) == item


def test_a_good_sample_is_accepted():
    validate_sample(make_sample())
    text_only = {"id": "t", "images": [], "messages": [user_message("hi"), assistant_message("yes")], "groundings": []}
    validate_sample(text_only)


def test_an_image_that_exif_turns_is_measured_upright():
    sample = make_sample()
    turned = Image.new("RGB", (6, 8))
    turned.getexif()[0x0112] = 6
    sample["images"] = [turned]
    validate_sample(sample)
    turned.getexif()[0x0112] = 3
    with pytest.raises(ValueError, match="mask of 8 x 6 pixels, expected 6 x 8"):
        validate_sample(sample)


def breakage(path, value):
    *parents, last = path
    sample = copy.deepcopy(make_sample())
    place = sample
    for key in parents:
        place = place[key]
    place[last] = value
    return sample


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["id"], 7, "id of type int"),
        (["images"], [], "0 images but 1 image parts"),
        (["images", 0], np.zeros((6, 8, 3)), "expected a PIL image"),
        (["images", 0], Image.new("RGB", (6, 8)), "mask of 8 x 6 pixels, expected 6 x 8"),
        (["messages"], [], "no messages"),
        (["messages", 0, "role"], "dog", "role 'dog'"),
        (["messages", 1, "content"], "yes", "content of type str"),
        (["messages", 1, "content", 0, "type"], "video", "type 'video'"),
        (["messages", 1, "content", 0, "text"], None, "text is None"),
        (["groundings", 0, "end"], 16, r"span \[11, 16\).*15 characters"),
        (["groundings", 0, "end"], 11, "non-empty span"),
        (["groundings", 0, "start"], -1, "span"),
        (["groundings", 0, "message"], 2, "message 2, expected 0 to 1"),
        (["groundings", 0, "image"], 1, "image 1"),
        (["groundings", 0, "mask", "size"], [6], "size"),
        (["groundings", 0, "box"], [2, 1, 7], "expected .x0, y0, x1, y1. with 0 <= x0 < x1 <= 8 and 0 <= y0 < y1 <= 6"),
        (["groundings", 0, "box"], [2, 1, 9, 3], r"has the box \[2, 1, 9, 3\]"),
        (["groundings", 0, "box"], [2, 3, 7, 3], "box"),
        (["groundings", 0, "box"], [2, 1, float("nan"), 3], "box"),
        (["groundings", 0, "box"], "2173", "box"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(path, value, says):
    with pytest.raises(ValueError, match=says) as caught:
        validate_sample(breakage(path, value))
    assert "\n" not in str(caught.value)
    assert "'one'" in str(caught.value) or path == ["id"]


@pytest.mark.parametrize("key", sorted(FEATURES))
def test_a_missing_key_is_named(key):
    sample = make_sample()
    del sample[key]
    with pytest.raises(ValueError, match=key):
        validate_sample(sample)


@given(st.integers(-2, 20), st.integers(-2, 20))
def test_exactly_the_spans_inside_the_message_are_accepted(start, end):
    sample = make_sample()
    sample["groundings"][0].update(start=start, end=end)
    inside = message_text(sample["messages"][0])[max(start, 0) : max(end, 0)]
    if start >= 0 and inside and len(inside) == end - start:
        validate_sample(sample)
    else:
        with pytest.raises(ValueError, match="span"):
            validate_sample(sample)
