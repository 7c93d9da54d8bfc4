import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.byte_cache import ByteCache
from age_vlm.data.label_frames import Frame, Frames
from age_vlm.data.label_map_items import class_prior, class_statistics, label_map_items
from age_vlm.data.label_maps import (
    IGNORED,
    LabelMaps,
    LabelMapsDataset,
    caption,
    count_question,
    existence_question,
    label_map_sample,
)
from age_vlm.data.masks import decode_mask
from age_vlm.data.questions import POPE_MODES
from age_vlm.data.schema import message_text, validate_sample


CLASSES = ("sky", "road", "car", "animal")
COLOURS = np.array([[90, 150, 230], [90, 90, 90], [200, 20, 20], [20, 200, 20], [0, 0, 0]], np.uint8)
UNLABELLED = 4


def drawn(number: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and instances: sky over road, cars on the road, in even frames an animal, a strip without label."""
    labels, instances = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    labels[height // 2 :] = 1
    for car in range(1 + number % 3):
        box = np.s_[height // 2 + 4 : height // 2 + 14, 4 + 20 * car : 16 + 20 * car]
        labels[box], instances[box] = 2, car + 1
    if number % 2 == 0:
        labels[4:14, 30:44] = 3
    labels[:2] = UNLABELLED
    return labels, instances


def write(folder, n=10, size=(80, 60)):
    for part in ("images", "labels", "instances"):
        (folder / part).mkdir(parents=True)
    for number in range(n):
        labels, instances = drawn(number, *size)
        name = f"frame{number:02d}"
        Image.fromarray(COLOURS[labels]).save(folder / "images" / f"{name}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{name}.png")
        Image.fromarray(instances).save(folder / "instances" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("maps"))


@pytest.fixture(scope="module")
def maps(folder):
    return LabelMaps(folder / "images", folder / "labels", CLASSES, [UNLABELLED])


@pytest.fixture(scope="module")
def counted(folder):
    return LabelMaps(
        folder / "images", folder / "labels", CLASSES, [UNLABELLED], instances=folder / "instances", present=0.001
    )


def test_frames_are_read_as_stored(maps):
    assert [frame.name for frame in maps.frames] == [f"frame{i:02d}" for i in range(10)]
    labels, _ = drawn(4, 80, 60)
    assert np.array_equal(maps.frames[4].labels, np.where(labels == UNLABELLED, IGNORED, labels))
    assert np.array_equal(maps.frames[4].image, COLOURS[labels])


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 60), st.floats(0.01, 0.6), st.floats(0.01, 0.6))
def test_split_parts_are_ordered_and_share_nothing(n, fraction, validation):
    maps = object.__new__(LabelMaps)
    files = tuple((str(number), Path(), Path(), None) for number in range(n))
    maps.frames, maps.classes = (
        Frames(files, lambda name, *_: Frame(name, np.array(int(name)), None), ByteCache(0)),
        CLASSES,
    )
    try:
        parts = maps.split(fraction, validation)
    except ValueError:
        assert round(n * fraction) >= n - 2 or n < 6
        return
    assert parts.train.frames.files + parts.validation.frames.files + parts.test.frames.files == files
    assert all(len(part) for part in parts)
    assert abs(len(parts.test) - n * fraction) <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9), st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 90), st.floats(0.05, 1), st.booleans()
)
def test_labels_follow_the_image(maps, index, seed, width, height, min_side, augment):
    crop = maps.crop(index, np.random.default_rng(seed), (width, height), min_side, augment=augment)
    assert crop.image.size == (width, height) and crop.labels.shape == (height, width)
    assert set(np.unique(crop.labels)) <= set(np.unique(maps.frames[index].labels))


def test_flipped_and_plain_crops_keep_pixels_and_labels_together(maps):
    flips = 0
    for seed in range(30):
        crop = maps.crop(4, np.random.default_rng(seed), (80, 60), 1.0)
        pixels = np.asarray(crop.image).astype(int)
        # The animal is the only thing that is more green than anything else, whatever the jitter.
        green = pixels[..., 1] - np.maximum(pixels[..., 0], pixels[..., 2]) > 40
        assert np.array_equal(green, crop.labels == 3)
        flips += bool(green[:, 40:].sum() > green[:, :40].sum()) != bool(
            (maps.frames[4].labels == 3)[:, 40:].sum() > (maps.frames[4].labels == 3)[:, :40].sum()
        )
    assert 0 < flips < 30


def test_crop_sides_span_the_range_and_keep_proportions(folder, tmp_path):
    # An image whose pixels hold their own coordinates shows which box was cut.
    y, x = np.mgrid[:200, :240]
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "images/a.png")
    Image.fromarray(np.zeros((200, 240), np.uint8)).save(tmp_path / "labels/a.png")
    maps = LabelMaps(tmp_path / "images", tmp_path / "labels", ["floor"])
    sides = []
    for seed in range(100):
        pixels = np.asarray(maps.crop(0, np.random.default_rng(seed), (40, 20), 0.5, augment=False).image).astype(int)
        width = (pixels[0, -1, 0] - pixels[0, 0, 0]) * 40 / 39
        height = (pixels[-1, 0, 1] - pixels[0, 0, 1]) * 20 / 19
        assert width / height == pytest.approx(2, rel=0.1)
        sides.append(width / 240)
    assert 0.45 < min(sides) < 0.6 and 0.9 < max(sides) < 1.05


def test_evaluation_crops_depend_on_the_frame_alone(maps):
    part = maps.subset(maps.frames[3:5])
    crops = {crop.id: crop for crop in maps.evaluation_crops(2, (32, 24))}
    assert len(crops) == 20
    for crop in part.evaluation_crops(2, (32, 24)):
        assert np.array_equal(crop.labels, crops[crop.id].labels)
        assert np.array_equal(np.asarray(crop.image), np.asarray(crops[crop.id].image))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=4, max_size=4))
def test_presence_leaves_out_what_is_too_small_to_tell(maps, pixels):
    labels = np.full(10_000, IGNORED, np.uint8)
    labels[: sum(pixels)] = np.repeat(np.arange(4), pixels)
    presence = maps.presence(labels.reshape(100, 100))
    for name, n in zip(CLASSES, pixels):
        assert presence.get(name) == (True if n >= 40 else False if n <= 2 else None)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["all", 0, 1, 3]))
def test_sample_says_what_the_labels_say(counted, seed, questions):
    rng = np.random.default_rng(seed)
    crop = counted.crop(int(rng.integers(10)), rng, (64, 48), 0.3)
    sample = label_map_sample(counted, crop, rng, questions)
    validate_sample(sample)
    presence = counted.presence(crop.labels)
    shown = [name for name in presence if presence[name]]
    texts = [message_text(message) for message in sample["messages"]]
    assert all(text == text.lower() for text in texts)
    assert [name for name in CLASSES if name in texts[1]] == shown

    asked = {}
    for question, answer in zip(texts[2::2], texts[3::2]):
        (name,) = [name for name in CLASSES if name in question]
        if question.startswith("is there"):
            asked[name] = answer
    expected = {name: "yes" if presence[name] else "no" for name in presence}
    assert asked == expected if questions == "all" else asked.items() <= expected.items() and len(asked) <= questions

    for item in sample["groundings"]:
        phrase = texts[item["message"]][item["start"] : item["end"]]
        name = next(name for name in CLASSES if phrase in (name, f"{name}s"))
        assert presence[name]
        assert np.array_equal(decode_mask(item["mask"]), crop.labels == CLASSES.index(name))
    in_caption = [item for item in sample["groundings"] if item["message"] == 1]
    assert len(in_caption) == len(shown)


def test_counting_question_needs_instances(maps, counted):
    for source, expected in ((maps, set()), (counted, {"one", "two", "three"})):
        answers = set()
        for index in range(6):
            crop = source.crop(index, np.random.default_rng(0), (80, 60), 1.0)
            messages = label_map_sample(source, crop, np.random.default_rng(0))["messages"]
            if "how many cars" in message_text(messages[-2]):
                answers.add(message_text(messages[-1]))
        assert answers == expected


def test_count_is_not_asked_when_an_instance_is_cut_to_a_sliver(counted):
    crop = next(counted.subset(counted.frames[2:3]).evaluation_crops(1, (80, 60), 1.0))
    assert counted.counts(crop)["car"] == 3
    crop.labels[crop.instances == 3] = 1
    assert counted.counts(crop)["car"] == 2
    y, x = np.argwhere(crop.instances == 3)[0]
    crop.labels[y : y + 1, x : x + 2] = 2
    assert "car" not in counted.counts(crop)


@pytest.mark.parametrize("name", ["car", "animal", "image", "i", "traffic light", "bus"])
def test_spans_point_at_the_class(name):
    text, (start, end) = existence_question(name)
    assert text[start:end] == name
    text, (start, end) = count_question(name)
    assert text[start:end].startswith(name) and text[start:end] != name
    text, spans = caption([name, "car", name])
    assert [text[a:b] for a, b in spans] == [name, "car", name]


def test_dataset_repeats_itself_and_visits_every_frame(maps):
    dataset = LabelMapsDataset(maps, length=40, seed=3, size=(32, 24))
    again = LabelMapsDataset(maps, length=40, seed=3, size=(32, 24))
    assert len(dataset) == 40
    for epoch in range(4):
        samples = [dataset[i] for i in range(10 * epoch, 10 * epoch + 10)]
        assert len({sample["id"].split("/")[0] for sample in samples}) == 10
    assert dataset[17]["messages"] == again[17]["messages"]
    assert dataset[17]["images"][0].tobytes() == again[17]["images"][0].tobytes()
    other = LabelMapsDataset(maps, length=40, seed=4, size=(32, 24))
    assert [dataset[i]["id"].split("/")[0] for i in range(10)] != [other[i]["id"].split("/")[0] for i in range(10)]
    with pytest.raises(IndexError):
        dataset[40]
    validate_sample(dataset[-1])


def test_prior_and_statistics_count_training_crops(maps):
    prior, statistics = class_prior(maps, 300), class_statistics(maps, 300)
    assert set(prior) == set(CLASSES) and all(0 <= p <= 1 for p in prior.values())
    assert prior["animal"] < prior["car"]
    assert statistics.frequency["animal"] < statistics.frequency["car"]
    whole = class_prior(maps, 10, (80, 60), 1.0)
    assert whole == {"sky": 1, "road": 1, "car": 1, "animal": 0.5}


def test_items_are_balanced_labelled_and_repeatable(counted):
    statistics = class_statistics(counted, 200)
    items = label_map_items(counted, statistics, per_frame=3, size=(64, 48), min_side=0.3)
    assert len(items) == 30
    ids, modes = [], Counter()
    for item in items:
        labels = next(c for c in counted.evaluation_crops(3, (64, 48), 0.3) if c.id == item.image_id).labels
        presence = counted.presence(labels)
        everything = [q for q in item.questions if q.mode is None and q.kind == "existence"]
        assert {q.text[slice(*q.phrase)] for q in everything} == set(presence)
        for question in item.questions:
            ids.append(question.id)
            assert question.image_id == item.image_id
            if question.kind == "existence":
                name = question.text[slice(*question.phrase)]
                assert question.answer == ("yes" if presence[name] else "no")
                assert (question.mask is None) == (question.answer == "no")
                if question.mask is not None:
                    assert np.array_equal(decode_mask(question.mask), labels == CLASSES.index(name))
        for mode in POPE_MODES:
            answers = Counter(q.answer for q in item.questions if q.mode == mode)
            assert answers["yes"] == answers["no"]
            modes[mode] += answers["yes"]
    assert len(set(ids)) == len(ids)
    assert modes["random"] == modes["popular"] == modes["adversarial"] > 0
    again = label_map_items(counted, statistics, per_frame=3, size=(64, 48), min_side=0.3)
    assert [item.questions for item in again] == [item.questions for item in items]
    plain = label_map_items(counted, per_frame=1, size=(64, 48))
    assert all(q.mode is None for item in plain for q in item.questions)
    assert any(q.kind == "count" for item in plain for q in item.questions)


def spoil(folder, change):
    """A copy of a small data set with one thing wrong."""
    write(folder, n=3)
    change(folder)
    return folder


def save(path, array):
    Image.fromarray(array).save(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: save(f / "labels/frame01.png", np.zeros((10, 12), np.uint8)), "got 12 x 10 pixels.* 80 x 60"),
        (lambda f: save(f / "labels/frame01.png", np.full((60, 80), 7, np.uint8)), "index 7, expected 0"),
        (lambda f: save(f / "labels/frame01.png", np.full((60, 80), 40_000, np.uint16)), "index 40000"),
        (
            lambda f: save(f / "labels/frame01.png", np.zeros((60, 80, 3), np.uint8)),
            "RGB, expected one index per pixel",
        ),
        (
            lambda f: (f / "images/frame01.png").write_text("no image"),
            "images/frame01.png: could not be read, expected an image",
        ),
        (
            lambda f: (f / "images/frame01.png").write_bytes((f / "images/frame01.png").read_bytes()[:120]),
            "images/frame01.png: could not be read, expected an image",
        ),
        (
            lambda f: (f / "labels/frame01.png").write_bytes(b"\x89PNG\r\n\x1a\n"),
            "labels/frame01.png: could not be read, expected an image",
        ),
        (lambda f: save(f / "images/frame01.bmp", np.zeros((60, 80), np.uint8)), "one file per stem"),
        (lambda f: [p.unlink() for p in (f / "labels").iterdir()], "share file stems, got none among 3 files"),
        (lambda f: (f / "instances/frame02.png").unlink(), "none for 'frame02'"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    folder = spoil(tmp_path / "data", change)
    with pytest.raises(ValueError, match=message) as error:
        LabelMaps(folder / "images", folder / "labels", CLASSES, [UNLABELLED], instances=folder / "instances")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "nowhere"}, "images: got 'nowhere', expected a folder"),
        ({"labels": "nowhere"}, "labels: got .*, expected a folder"),
        ({"ignore": ()}, "index 4, expected 0 to 3"),
        ({"classes": CLASSES[:3]}, "index 3, expected 0 to 2"),
        ({"ignore": (-1,)}, "got -1"),
        ({"classes": ()}, "different names"),
        ({"classes": ("car", "Car")}, "different names"),
        ({"present": 0.1, "absent": 0.2}, "absent < present"),
    ],
)
def test_bad_options_are_named(folder, options, message):
    given = {"images": folder / "images", "labels": folder / "labels", "classes": CLASSES, "ignore": (4,), **options}
    with pytest.raises(ValueError, match=message):
        LabelMaps(**given)


def test_named_class_may_be_ignored_and_wide_indices_read(folder, tmp_path):
    ignoring = LabelMaps(folder / "images", folder / "labels", CLASSES, (3, 4))
    assert not any(ignoring.presence(frame.labels)["animal"] for frame in ignoring.frames)
    write(tmp_path / "wide", n=1)
    labels, _ = drawn(0, 80, 60)
    wide = labels.astype(np.uint16)
    wide[labels == UNLABELLED] = 65535
    save(tmp_path / "wide/labels/frame00.png", wide)
    read = LabelMaps(tmp_path / "wide/images", tmp_path / "wide/labels", CLASSES, [65535])
    assert np.array_equal(read.frames[0].labels == IGNORED, labels == UNLABELLED)


def test_palette_label_maps_are_read_by_index(tmp_path):
    write(tmp_path / "p", n=1)
    labels, _ = drawn(0, 80, 60)
    picture = Image.new("P", (80, 60))
    picture.putdata(labels.reshape(-1).tolist())
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    picture.save(tmp_path / "p/labels/frame00.png")
    read = LabelMaps(tmp_path / "p/images", tmp_path / "p/labels", CLASSES, [UNLABELLED])
    assert np.array_equal(read.frames[0].labels == 3, labels == 3)


def test_images_without_labels_are_reported(tmp_path):
    write(tmp_path / "p", n=3)
    (tmp_path / "p/labels/frame01.png").unlink()
    with pytest.warns(UserWarning, match="1 of 3 images"):
        assert len(LabelMaps(tmp_path / "p/images", tmp_path / "p/labels", CLASSES, [UNLABELLED])) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "p/images/frame01.png").unlink()
        LabelMaps(tmp_path / "p/images", tmp_path / "p/labels", CLASSES, [UNLABELLED])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.split(0), "fraction: got"),
        (lambda m: m.split(validation=1.0), "validation: got"),
        (lambda m: m.subset(m.frames[:2]).split(), "got 2 frames"),
        (lambda m: m.crop(0, np.random.default_rng(0), (0, 5)), "size: got"),
        (lambda m: m.crop(0, np.random.default_rng(0), min_side=0), "min_side: got"),
        (lambda m: LabelMapsDataset(m, length=0), "length: got"),
        (
            lambda m: label_map_sample(m, next(m.evaluation_crops(1)), np.random.default_rng(0), "some"),
            "questions: got",
        ),
    ],
)
def test_bad_calls_are_named(maps, call, message):
    with pytest.raises(ValueError, match=message):
        call(maps)
