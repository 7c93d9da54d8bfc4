"""Questions about the instances of COCO's files: as training samples of `coco`, and as evaluation items of `coco_items`."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from age_vlm.data.converters import convert
from age_vlm.data.converters.coco import coco
from age_vlm.data.converters.coco_instances import SPLITS, Choice
from age_vlm.data.converters.coco_items import coco_items, coco_statistics
from age_vlm.data.masks import decode_mask
from age_vlm.data.rejects import Rejects
from age_vlm.data.schema import message_text


WIDTH, HEIGHT = 40, 30
NAMES = {1: "person", 18: "dog", 28: "umbrella", 35: "skis", 47: "cup"}
ALL = ("presence", "count", "where")
# Columns 0 to 2 of the uppermost 5 pixels, as an uncompressed run-length encoding.
CROWD = {"counts": [0, 5, HEIGHT - 5, 5, HEIGHT - 5, 5, WIDTH * HEIGHT - 2 * HEIGHT - 5], "size": [HEIGHT, WIDTH]}


def square(x, y, side=8):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def thing(number, image, category, segmentation, iscrowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": iscrowd,
        "area": 1.0,
        "bbox": [0.0, 0.0, 1.0, 1.0],
    }


THINGS = [
    thing(1, 1, 18, square(0, 0)),
    thing(2, 1, 18, square(20, 10)),
    thing(3, 1, 1, CROWD, iscrowd=1),
    thing(4, 1, 28, square(30, 20)),
    thing(5, 1, 47, square(3, 20, 2)),  # 4 of 1200 pixels
    thing(6, 2, 35, square(0, 20)),
    thing(7, 4, 18, square(0, 0)),
]


@pytest.fixture
def write(tmp_path, photograph):
    """(annotations, numbers of the images, captions) -> arguments of the converter."""

    def run(things=THINGS, numbers=(1, 2, 3, 4), captions=None, categories=None):
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": WIDTH, "height": HEIGHT} for n in numbers]
        for image in images:
            photograph(tmp_path / "images" / image["file_name"], WIDTH, HEIGHT)
            with open(tmp_path / "images" / image["file_name"], "ab") as file:  # else all would be the same
                file.write(image["id"].to_bytes(2, "big"))
        categories = categories or [{"id": number, "name": name} for number, name in NAMES.items()]
        files = {"instances": {"images": images, "annotations": things, "categories": categories}}
        if captions is not None:
            said = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(captions)]
            files["captions"] = {"images": images, "annotations": said}
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return {"images": tmp_path / "images", **{name: tmp_path / f"{name}.json" for name in files}}

    return run


def chat(sample):
    texts = [message_text(message) for message in sample["messages"]]
    return dict(zip(texts[::2], texts[1::2]))


def test_photographs_without_captions_are_asked_about(write, check, phrase):
    rejects = Rejects()
    first, second, fourth = check(coco(**write(), questions=ALL, rejects=rejects))
    assert [sample["id"] for sample in (first, second, fourth)] == ["coco/1", "coco/2", "coco/4"]
    assert rejects.counts == {"nothing is clear enough to ask about": 1} and rejects.examples.popitem()[1] == "3"
    asked = chat(first)
    assert Counter(answer for question, answer in asked.items() if " there " in question) == {"Yes": 1, "No": 1}
    # The cup is too small to ask about, and not absent; the crowd of people is not counted; skis are the only absent.
    assert asked["Are there skis in the image?"] == "No"
    assert asked["How many dogs are in the image?"] == "Two" and asked["How many umbrellas are in the image?"] == "One"
    assert asked["Where is the umbrella?"] == "In the bottom right"
    assert not any(word in question for question in asked for word in ("cup", "people", "Where is the dog", "person?"))
    assert chat(second)["Where are the skis?"] == "In the bottom left"
    for number, item in enumerate(first["groundings"]):
        word, mask = phrase(first, number), decode_mask(item["mask"])
        assert word in ("dog", "dogs", "umbrella", "umbrellas", "person")
        assert mask.sum() == {"dog": 128, "umb": 64, "per": 15}[word[:3]]
    assert chat(fourth).keys() >= {"Where is the dog?", "How many dogs are in the image?"}


def test_questions_follow_the_captions(write, check, phrase):
    arguments = write(captions=[(1, "Two dogs."), (3, "Nothing much.")])
    rejects = Rejects()
    samples = check(coco(**arguments, questions=["where"], rejects=rejects))
    assert [sample["id"] for sample in samples] == ["coco/1", "coco/2", "coco/3", "coco/4"]
    assert chat(samples[0]) == {"describe the picture.": "Two dogs.", "Where is the umbrella?": "In the bottom right"}
    assert [phrase(samples[0], number) for number in (0, 1)] == ["dogs", "umbrella"]
    assert chat(samples[2]) == {"describe the picture.": "Nothing much."}
    assert rejects.counts == {"nothing is clear enough to ask about": 1}
    assert list(rejects.examples.values()) == ["questions of 3"]
    # Without questions, as ever, an image without captions is left out.
    with pytest.warns(UserWarning, match="image has no captions: 2"):
        assert len(list(coco(**arguments))) == 2


def test_images_and_annotations_come_in_any_order_and_in_parts(write):
    made = list(coco(**write(), questions=ALL, rejects=Rejects()))
    turned = list(coco(**write(THINGS[::-1], (4, 3, 2, 1)), questions=ALL, rejects=Rejects()))
    parts = [s for n in (0, 1) for s in coco(**write(), questions=ALL, shard=(n, 2), rejects=Rejects())]
    for other in (turned, parts):
        other = sorted(other, key=lambda sample: sample["id"])
        assert [(s["id"], s["messages"], s["groundings"]) for s in other] == [
            (s["id"], s["messages"], s["groundings"]) for s in made
        ]
    seeds = [[s["messages"] for s in coco(**write(), questions=ALL, seed=n, rejects=Rejects())] for n in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_what_cannot_be_read_is_not_taken_for_absent(write):
    nobody = {key: value for key, value in thing(8, 2, 18, square(9, 9)).items() if key != "category_id"}
    broken = [
        thing(9, 4, 47, [[1, 2]]),  # a cup, nobody knows where
        thing(10, 4, 99, square(9, 9)),  # of no category of the file
        nobody,
        thing(11, 3, 1, square(0, 0)),
        thing(11, 3, 18, square(9, 9)),
    ]
    for annotations in ([*THINGS, *broken], [*broken[::-1], *THINGS]):
        rejects = Rejects()
        asked = {}
        for seed in range(20):
            for sample in coco(**write(annotations), questions=ALL, seed=seed, rejects=rejects):
                asked.setdefault(sample["id"], set()).update(chat(sample))
        assert set(asked) == {"coco/1", "coco/4"}
        assert not any("cup" in question for question in asked["coco/4"])
        assert "Is there an umbrella in the image?" in asked["coco/4"]
        for reason in (
            "an annotation of the image has no category, so what is absent is unknown",
            "annotations of the image share an identifier, so what is absent is unknown",
            "polygon is malformed",
            "category is unknown",
            "record lacks 'category_id'",
        ):
            assert rejects.counts[reason] == 20


def test_images_that_the_instances_lack_are_only_described(write, tmp_path):
    arguments = write(captions=[(1, "Dogs."), (4, "A dog.")])
    arguments["instances"] = write(THINGS[:6], (1, 2))["instances"]
    rejects = Rejects()
    samples = {sample["id"]: chat(sample) for sample in coco(**arguments, questions=ALL, rejects=rejects)}
    assert samples["coco/4"] == {"describe the picture.": "A dog."}
    assert rejects.counts["instances lack the image, so what it shows is unknown"] == 2


def many(n=60):
    """Images with a dog or an umbrella each, every third with a person."""
    things = [thing(2 * n + 1, n, 18 if n % 2 else 28, square(n % 30, n % 20)) for n in range(1, n + 1)]
    return [*things, *(thing(2 * n, n, 1, square(5, 5)) for n in range(3, n + 1, 3))]


def test_splits_share_no_image_and_do_not_depend_on_others(write):
    arguments = write(many(), range(1, 61))
    trained = {split: {s["id"] for s in coco(**arguments, questions=ALL, split=split)} for split in SPLITS}
    measured = {split: {i.image_id for i in coco_items(**arguments, split=split)} for split in SPLITS}
    assert trained["train"] == {f"coco/{n}" for n in range(1, 61) if Choice("train").split_of(str(n)) == "train"}
    assert trained["train"] | measured["validation"] | measured["test"] <= {f"coco/{n}" for n in range(1, 61)}
    for one in SPLITS:
        for other in set(SPLITS) - {one}:
            assert not (trained[one] | measured[one]) & (trained[other] | measured[other])
    fewer = write([item for item in many() if item["image_id"] <= 20], range(1, 21))
    assert {s["id"] for s in coco(**fewer, questions=ALL, split="test")} == {
        name for name in trained["test"] if int(name[5:]) <= 20
    }
    shares = Counter(Choice("test", 0.4).split_of(str(number)) for number in range(5000))
    assert abs(shares["test"] - 1000) < 100 and abs(shares["validation"] - 1000) < 100


def test_a_held_out_photograph_under_another_identifier_is_not_trained_on(write, tmp_path):
    arguments = write(many(), range(1, 61))
    splits = {n: Choice("train").split_of(str(n)) for n in range(1, 61)}
    held, copy = (next(n for n in splits if splits[n] == split) for split in ("test", "train"))
    shutil.copy(tmp_path / f"images/{held:012d}.jpg", tmp_path / f"images/{copy:012d}.jpg")
    rejects = Rejects()
    made = {sample["id"] for sample in coco(**arguments, questions=ALL, split="train", rejects=rejects)}
    assert rejects.counts == {"image is held out under another identifier": 1}
    assert rejects.examples.popitem()[1] == str(copy)
    assert len(made) == sum(split == "train" for split in splits.values()) - 1


def test_statistics_are_of_training_images_alone(write):
    arguments = write(many(), range(1, 61))
    trained = [n for n in range(1, 61) if Choice("train").split_of(str(n)) == "train"]
    for split in SPLITS:
        statistics = coco_statistics(arguments["instances"], split=split)
        assert statistics.frequency == {
            "dog": sum(n % 2 for n in trained),
            "umbrella": sum(not n % 2 for n in trained),
            "person": sum(not n % 3 for n in trained),
        }
        assert statistics.cooccurrence["person"]["dog"] == sum(n % 2 and not n % 3 for n in trained)
    assert coco_statistics(arguments["instances"]).frequency["person"] == 20


def test_items_ask_by_the_statistics_that_are_given(write):
    arguments = write()
    plain, *_ = coco_items(**arguments, rejects=Rejects())
    assert not any(question.mode for question in plain.questions)
    assert {q.subject: q.answer for q in plain.questions if q.kind == "existence"} == {
        "dog": "yes",
        "person": "yes",
        "umbrella": "yes",
        "skis": "no",
    }
    assert {q.subject: q.answer for q in plain.questions if q.kind == "count"} == {"dogs": "Two", "umbrellas": "One"}
    assert {q.subject: q.answer for q in plain.questions if q.kind == "where"} == {"umbrella": "In the bottom right"}
    assert plain.image_id == "coco/1" and plain.image.size == (WIDTH, HEIGHT)
    for question in plain.questions:
        assert (question.mask is None) == (question.answer == "no")
    # Of image 4, a dog's: the cup is never with a dog, the umbrella always, and people are most frequent.
    statistics = coco_statistics(write(many(6), range(1, 7))["instances"])
    statistics.cooccurrence["dog"] = Counter({"umbrella": 9, "person": 1})
    statistics.frequency = Counter({"person": 9, "umbrella": 1})
    item = coco_items(**write(), statistics=statistics, per_mode=1, rejects=Rejects())[-1]
    asked = {(q.mode, q.answer): q.subject for q in item.questions if q.mode}
    assert asked["adversarial", "no"] == "umbrella" and asked["popular", "no"] == "person"
    assert {asked[mode, "yes"] for mode in ("random", "popular", "adversarial")} == {"dog"}


def test_two_categories_of_one_name_are_one_and_none_is_left_unsaid(write):
    categories = [
        {"id": 1, "name": "dog"},
        {"id": 2, "name": " dog "},
        {"id": 3, "name": " "},
        {"id": 4, "name": "cup"},
    ]
    things = [thing(1, 1, 1, square(0, 0)), thing(2, 1, 2, square(20, 10)), thing(3, 1, 3, square(9, 9))]
    (sample,) = coco(**write(things, (1,), categories=categories), questions=ALL)
    assert chat(sample) == {
        "Is there a dog in the image?": "Yes",
        "Is there a cup in the image?": "No",
        "How many dogs are in the image?": "Two",
    }


def test_converted_samples_are_stored(write, tmp_path):
    with pytest.warns(UserWarning, match="nothing is clear enough"):
        data = convert("coco", cache_dir=tmp_path / "cache", questions=list(ALL), **write())
    assert data["id"] == ["coco/1", "coco/2", "coco/4"]
    assert np.all([item["mask"]["counts"] for sample in data for item in sample["groundings"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instances": None, "questions": ()}, "captions, instances: got neither, expected a file"),
        ({"questions": ()}, "questions: got none, and no captions, expected some of presence, count, where"),
        ({"instances": None, "captions": "there"}, r"questions: got \['presence', .* without instances"),
        ({"panoptic": "there"}, "panoptic: got a file without captions"),
        ({"questions": "presence"}, "questions: got 'presence', expected a list"),
        ({"questions": ["counts"]}, r"got 'counts', expected one of .*\(nearest: 'count'\)"),
        ({"per_kind": 0}, "per_kind: got 0, expected a whole number from 1 on"),
        ({"min_area": 1}, "min_area: got 1, expected a share of the image, from 0 to below 1"),
        ({"min_area": "small"}, "min_area: got 'small', expected a share"),
        ({"seed": -1}, "seed: got -1, expected a whole number from 0 on"),
        ({"split": "testing"}, r"split: got 'testing', expected one of .*\(nearest: 'test'\), or None"),
        ({"split": "test", "held_out": 1.0}, "held_out: got 1.0, expected a share of the images, above 0 and below 1"),
    ],
)
def test_wrong_arguments_are_named(write, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        list(coco(**{**write(), "questions": ALL, **arguments}))
    assert "\n" not in str(error.value)
    if arguments.keys() <= {"min_area", "seed", "split", "held_out"}:
        with pytest.raises(ValueError, match=message):
            coco_items(**write(), **arguments)


def test_a_missing_file_is_named(write):
    with pytest.raises(ValueError, match="instances: got 'nowhere.json', expected a file"):
        list(coco(**{**write(), "instances": "nowhere.json"}, questions=ALL))
    with pytest.raises(ValueError, match="instances: got 'nowhere.json', expected a file"):
        coco_items(write()["images"], "nowhere.json")
    with pytest.raises(ValueError, match="per_mode: got 0, expected a whole number"):
        coco_items(**write(), per_mode=0)
