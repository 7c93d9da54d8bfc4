"""Random crops of photographs with instances: questions are about what a crop shows, and masks lie on it."""

import pickle

import numpy as np
import pytest

from age_vlm.data.coco_crops import CocoCrops
from age_vlm.data.masks import decode_mask
from age_vlm.data.schema import message_text, validate_sample


@pytest.fixture
def files(coco_rectangles):
    return {name: coco_rectangles[name] for name in ("images", "instances")}


@pytest.fixture
def colours(coco_rectangles):
    return coco_rectangles["colours"]


def crops(files, **options):
    return CocoCrops(**files, **{"held_out": 0.4, "length": 120, **options})


def test_masks_lie_on_what_the_words_name(files, colours):
    for index in range(60):
        sample = crops(files, questions=["presence"])[index]
        validate_sample(sample)
        pixels = np.asarray(sample["images"][0]).astype(int)
        for item in sample["groundings"]:
            name = message_text(sample["messages"][item["message"]])[item["start"] : item["end"]]
            inside = decode_mask(item["mask"])
            wanted = np.abs(pixels - colours[name]).sum(-1) < 60
            assert inside.shape == wanted.shape and (inside & wanted).sum() / (inside | wanted).sum() > 0.8


def test_presence_is_that_of_the_crop(files, colours):
    answers = set()
    for sample in map(crops(files, questions=["presence"]).__getitem__, range(120)):
        pixels = np.asarray(sample["images"][0]).astype(int)
        for question, answer in zip(sample["messages"][::2], sample["messages"][1::2]):
            name = next(name for name in colours if name in message_text(question))
            share = (np.abs(pixels - colours[name]).sum(-1) < 60).mean()
            said = message_text(answer)
            answers.add(said)
            assert share > 0.003 if said == "Yes" else share == 0
    assert answers == {"Yes", "No"}


def test_an_index_is_always_the_same_crop(files):
    first, second, other = crops(files), crops(files), crops(files, seed=1)
    differ = 0
    for index in (0, 7, 50):
        one, two = first[index], second[index]
        assert one["id"] == two["id"] and one["messages"] == two["messages"] and one["groundings"] == two["groundings"]
        assert np.array_equal(np.asarray(one["images"][0]), np.asarray(two["images"][0]))
        differ += one["messages"] != other[index]["messages"]
    assert differ
    received = pickle.loads(pickle.dumps(first))
    assert received[3]["messages"] == first[3]["messages"]


def test_each_photograph_comes_once_in_a_round_and_no_held_out_one(files):
    train, test = crops(files), crops(files, split="test")
    assert train.numbers and test.numbers and not {*train.numbers} & {*test.numbers}
    names = [train[index]["id"].split("/")[1] for index in range(len(train.numbers))]
    assert sorted(names) == sorted(train.numbers)


def test_without_augmentation_it_is_the_whole_photograph(files):
    sample = crops(files, augment=False)[0]
    assert sample["images"][0].size == (80, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_side": 0}, "^min_side: got 0, expected"),
        ({"length": 0}, "^length: got 0, expected a whole number from 1 on"),
        ({"questions": ["colour"]}, "^questions: got 'colour', expected one of presence, count, where"),
        ({"split": "dev"}, "^split: got 'dev', expected one of train"),
    ],
)
def test_bad_arguments_are_one_sentence(files, options, message):
    with pytest.raises(ValueError, match=message) as error:
        crops(files, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(IndexError):
        crops(files)[120]
