import io

import numpy as np
import pytest
from PIL import Image

from age_vlm.data.masks import encode_mask
from age_vlm.data.rejects import Unusable
from age_vlm.data.scene_datasets import ScenesDataset, to_dataset
from age_vlm.data.schema import FEATURES, message_text
from age_vlm.grounding.inputs import Source, make_unit


def jpeg(width=40, height=24, orientation=None):
    picture = Image.new("RGB", (width, height), "red")
    exif = picture.getexif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def row(**changes):
    return {"image": {"bytes": jpeg(), "path": "/data/a.jpg"}, "phrases": ["dog", "cat"], "boxes": None, **changes}


def reasons(unit):
    return {refused.number: refused.reason for refused in unit.refused}


# Source


def test_a_data_set_is_read_without_decoding():
    source = Source(to_dataset("train", 5))
    assert len(source) == 5
    (first, second) = source.rows(1, 3)
    assert first["id"] != second["id"] and isinstance(first["images"][0]["bytes"], bytes)
    assert source.fingerprint == Source(to_dataset("train", 5)).fingerprint
    assert source.fingerprint != Source(to_dataset("train", 5, seed=1)).fingerprint


def test_sequences_and_streams_give_the_same_rows():
    samples = ScenesDataset("train", 7)
    rows = [samples[place] for place in range(7)]

    class Stream:
        def __iter__(self):
            return iter(rows)

    sources = [Source(samples), Source(rows), Source(Stream())]
    for source in sources:
        assert len(source) == 7
        got = [source.rows(*part) for part in ((0, 3), (3, 5), (5, 7), (2, 4))]
        assert [own["id"] for part in got for own in part] == [rows[i]["id"] for i in (0, 1, 2, 3, 4, 5, 6, 2, 3)]
    assert len({source.fingerprint for source in sources}) == 1
    other = [dict(own) for own in rows]
    other[3]["images"] = [Image.new("RGB", rows[3]["images"][0].size)]
    assert Source(other).fingerprint != sources[0].fingerprint
    assert Source(rows, "mine").fingerprint == "mine"


def test_a_stream_of_datasets():
    data = to_dataset("train", 3)
    source = Source(data.to_iterable_dataset())
    assert len(source) == 3 and source.rows(0, 1)[0]["images"][0]["bytes"]


@pytest.mark.parametrize(
    "data, words",
    [
        ([], "data: got no rows"),
        (7, "data: got a int"),
        (iter([row()]), "data: got a list_iterator, which can be read only once"),
        ([{"image": 1}], "data: got the columns image, expected those of the schema .groundings, id"),
    ],
)
def test_data_that_cannot_be_read(data, words):
    with pytest.raises(ValueError, match=words):
        Source(data)


# make_unit


def test_rows_of_the_schema_keep_their_text_and_the_file_of_their_image():
    stored = Source(to_dataset("train", 1)).rows(0, 1)[0]
    unit = make_unit(stored, "0")
    assert set(unit.sample) == set(FEATURES) and unit.sample["groundings"] == []
    assert unit.sample["messages"] == stored["messages"]
    assert unit.sample["images"][0]["bytes"] == stored["images"][0]["bytes"]
    for phrase, item in zip(unit.phrases, stored["groundings"], strict=True):
        text = message_text(stored["messages"][item["message"]])
        assert phrase.prompt.phrase == text[item["start"] : item["end"]]
        assert phrase.prompt.mask == item["mask"] and phrase.item["mask"] is None
        # Where the data has no box, its mask tells the place.
        x0, y0, x1, y1 = map(int, phrase.prompt.box)
        assert phrase.item["box"] is None and 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64


def test_phrases_without_a_chat():
    unit = make_unit(row(boxes=[[1, 2, 30.5, 20], None]), "7")
    assert unit.sample["id"] == "7" and message_text(unit.sample["messages"][1]) == "dog, cat"
    first, second = unit.phrases
    assert (first.prompt.phrase, first.prompt.box) == ("dog", (1.0, 2.0, 30.5, 20.0))
    assert (second.prompt.phrase, second.prompt.box) == ("cat", None)
    assert (second.item["message"], second.item["start"], second.item["end"]) == (1, 5, 8)
    assert unit.sample["images"] == [{"bytes": jpeg(), "path": "a.jpg"}]


def test_phrases_are_found_in_the_caption_from_left_to_right():
    unit = make_unit(row(phrases=["a man", "bird", "A  man", "a man"], caption="A man sees a man."), "0")
    assert [(phrase.number, phrase.item["start"]) for phrase in unit.phrases] == [(0, 0), (2, 11)]
    assert reasons(unit) == {1: "it is not in the caption", 3: "it is not in the caption"}


def test_boxes_count_pixels_of_the_upright_image_and_are_cut_at_its_border():
    turned = {"bytes": jpeg(orientation=6), "path": None}
    unit = make_unit(row(image=turned, boxes=[[-3, 10, 99, 39], [5, 5, 3, 3]]), "0")
    assert unit.images[0].size == (24, 40)
    assert [phrase.item["box"] for phrase in unit.phrases] == [[0.0, 10.0, 24.0, 39.0]]
    assert reasons(unit) == {1: "annotation covers nothing of the image"}


def test_points_and_damaged_groundings():
    def item(**changes):
        return {"message": 0, "start": 0, "end": 3, "image": 0, "mask": None, **changes}

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "dog"}]}]
    mask = encode_mask(np.ones((24, 40), bool))
    groundings = [
        item(points=[[1, 2], [3, 4]], labels=[1, 0]),
        item(mask=mask),
        item(points=[[1, 2]], labels=[7]),
        item(end=4),
        item(image=1),
        item(mask={"size": [24, 40], "counts": "1"}),
        item(mask=encode_mask(np.ones((40, 24), bool))),
        {"message": 0},
        item(mask={"size": None, "counts": None}),
    ]
    sample = {"id": "a", "images": [{"bytes": jpeg()}], "messages": messages, "groundings": groundings}
    unit = make_unit(sample, "0")
    assert [phrase.number for phrase in unit.phrases] == [0, 1, 8]
    assert unit.phrases[0].prompt.points == ((1.0, 2.0), (3.0, 4.0)) and unit.phrases[0].prompt.labels == (1, 0)
    assert unit.phrases[1].prompt.box == (0.0, 0.0, 40.0, 24.0)
    assert unit.phrases[2].prompt.mask is None
    assert set(reasons(unit).values()) == {"it does not follow the schema"} and set(reasons(unit)) == set(range(2, 8))
    assert "has 3 characters" in next(refused.detail for refused in unit.refused if refused.number == 3)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"image": {"bytes": b"no image", "path": None}}, "image cannot be read"),
        ({"image": {"bytes": jpeg()[:300], "path": None}}, "image cannot be read"),
        ({"image": {"bytes": None, "path": "/nowhere/a.png"}}, "image file is missing"),
        ({"image": {"bytes": None, "path": "/"}}, "image file cannot be read"),
        ({"image": {"bytes": None, "path": "nosuchstore://bucket/a.png"}}, "image file cannot be read"),
        (
            {"image": {"bytes": None, "path": "dropbox://a.png"}},
            "image path needs a package that is not installed",
        ),
        ({"image": None}, "image is missing"),
        ({"image": object()}, "image cannot be read"),
        ({"phrases": None}, "it has neither phrases nor a caption"),
        ({"phrases": [3]}, "it does not follow the schema"),
        ({"boxes": [[1, 2, 3, 4]]}, "it does not follow the schema"),
    ],
)
def test_rows_that_cannot_be_used(changes, reason):
    with pytest.raises(Unusable) as refused:
        make_unit(row(**changes), "0")
    assert str(refused.value) == reason


def test_images_in_every_form(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    for image in (tmp_path / "a.jpg", str(tmp_path / "a.jpg"), Image.open(tmp_path / "a.jpg")):
        assert make_unit(row(image=image), "0").sample["images"] == [{"bytes": jpeg(), "path": "a.jpg"}]
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for image in (pixels, Image.fromarray(pixels)):
        np.testing.assert_array_equal(np.asarray(make_unit(row(image=image), "0").images[0]), pixels)
