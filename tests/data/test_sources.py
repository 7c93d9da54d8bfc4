import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from age_vlm.data.masks import decode_mask
from age_vlm.data.schema import validate_sample
from age_vlm.data.sources import MasksOfOthers, load_source
from age_vlm.training.recipe import DataRecipe


SCENES = DataRecipe(train=6, validation=2, test=3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder each of pictures and class indices: bands of three classes, of which one is not in every picture."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for part in ("images", "labels", "instances"):
        (folder / part).mkdir()
    for number in range(12):
        labels = np.zeros((48, 64), np.uint8)
        labels[16:] = 1
        if number % 2:
            labels[24:, 32:] = 2
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "images" / f"{number:02}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{number:02}.png")
        Image.fromarray((labels == 2).astype(np.uint8)).save(folder / "instances" / f"{number:02}.png")
    return DataRecipe(
        kind="label_maps",
        images=str(folder / "images"),
        labels=str(folder / "labels"),
        classes=["sky", "road", "car"],
        crop=[32, 24],
        train=5,
        validation=1,
        test=2,
    )


@pytest.mark.parametrize("kind", ["scenes", "label_maps"])
def test_a_source_holds_what_its_recipe_says(kind, photographs):
    recipe = SCENES if kind == "scenes" else photographs
    source = load_source(recipe, seed=0)
    assert len(source.train) == recipe.train
    assert (len(source.validation), len(source.test)) == (recipe.validation, recipe.test)
    for index in range(recipe.train):
        validate_sample(source.train[index])
    images = {np.asarray(item.image).tobytes() for item in (*source.validation, *source.test)}
    assert len(images) == recipe.validation + recipe.test
    assert not images & {np.asarray(source.train[index]["images"][0]).tobytes() for index in range(recipe.train)}
    unknown = source.tokenizer.unk_token_id
    texts = [question.text for item in source.test for question in item.questions]
    texts += [part["text"] for index in range(3) for m in source.train[index]["messages"] for part in m["content"][-1:]]
    assert all(unknown not in source.tokenizer(text)["input_ids"] for text in texts)
    assert (source.pictures is None) == (kind == "label_maps")
    assert (source.prior is None) == (kind == "scenes")


def test_counts_are_asked_where_instances_are_given(photographs):
    def kinds(recipe):
        return {question.kind for item in load_source(recipe, seed=0).test for question in item.questions}

    instances = photographs.images.replace("images", "instances")
    assert kinds(photographs) == {"existence"}
    assert kinds(dataclasses.replace(photographs, instances=instances)) == {"existence", "count"}


def test_the_seed_chooses_training_pictures_only():
    sources = [load_source(SCENES, seed) for seed in (0, 1)]
    first, second = ([np.asarray(source.train[i]["images"][0]) for i in range(3)] for source in sources)
    assert not any(np.array_equal(*pair) for pair in zip(first, second))
    for items in zip(*(source.test for source in sources)):
        assert np.array_equal(*(np.asarray(item.image) for item in items))
        assert items[0].questions == items[1].questions


def test_warm_up_pictures_fit_their_labels():
    pictures, labels = load_source(SCENES, 0).pictures
    assert {pictures[index]["label"] for index in range(400)} == set(range(labels))


def grounded(name, *boxes):
    from age_vlm.data.schema import grounding, user_message

    masks = []
    for left in boxes:
        mask = np.zeros((8, 8), bool)
        mask[:, left : left + 2] = True
        masks.append(mask)
    return {
        "id": name,
        "images": [Image.new("RGB", (8, 8))],
        "messages": [user_message("a dog and a cat", images=1)],
        "groundings": [grounding(0, 0, 5, 0, mask) for mask in masks],
    }


class Samples(torch.utils.data.Dataset):
    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def columns(sample):
    return [int(decode_mask(grounding["mask"]).any(0).argmax()) for grounding in sample["groundings"]]


def test_masks_of_others_are_never_a_samples_own():
    samples = Samples(grounded("a", 0, 1), grounded("b"), grounded("c", 4), grounded("d", 5, 6))
    other = MasksOfOthers(samples)
    shown = [columns(other[index]) for index in range(len(other))]
    assert shown[:2] == [[4, 4], []]
    assert len(shown[2]) == 1 and len(shown[3]) == 2 and set(shown[2]) <= {5, 6} and set(shown[3]) <= {0, 1}
    assert shown == [columns(other[index]) for index in range(len(other))]  # at random, but always the same
    for index in range(len(other)):
        validate_sample(other[index])
        assert [g["start"] for g in other[index]["groundings"]] == [g["start"] for g in samples[index]["groundings"]]
    assert columns(samples[0]) == [0, 1]  # the samples themselves are as they were


def test_without_another_mask_there_is_none():
    assert MasksOfOthers(Samples(grounded("a", 0)))[0]["groundings"] == []
    assert MasksOfOthers(Samples(grounded("a", 0), grounded("b")))[0]["groundings"] == []


def test_the_control_is_what_the_recipe_names():
    recipe = DataRecipe(train=4, validation=1, test=1, masks="other")
    control, plain = load_source(recipe, 0).train, load_source(SCENES, 0).train
    masks = {grounding["mask"]["counts"] for grounding in plain[0]["groundings"]}
    changed = {grounding["mask"]["counts"] for grounding in control[0]["groundings"]}
    assert masks and changed and not masks & changed


def test_sizes_that_differ_are_one_sentence(photographs, tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(4):
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / f"{number}.png")
        Image.new("L", (64, 40)).save(tmp_path / "labels" / f"{number}.png")
    recipe = DataRecipe(
        kind="label_maps", images=str(tmp_path / "images"), labels=str(tmp_path / "labels"), classes=["sky"]
    )
    with pytest.raises(ValueError, match="48.*40|40.*48") as caught:
        load_source(recipe, 0)
    assert "\n" not in str(caught.value)
