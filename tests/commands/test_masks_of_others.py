"""The control that aligns each sample with another one's masks."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.commands.recipe import DataRecipe
from age_vlm.commands.sources import MasksOfOthers, load_source
from age_vlm.data.masks import decode_mask
from age_vlm.data.schema import (
    assistant_message,
    grounding,
    user_message,
    validate_sample,
)


SCENES = DataRecipe(train=6, validation=2, test=3)


def grounded(name, *boxes):
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


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_masks_of_others_fit_images_of_any_size(data):
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=4))
    samples = []
    for number, (height, width) in enumerate(sizes):
        mask = np.zeros((height, width), bool)
        top, left = data.draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
        mask[top : data.draw(st.integers(top + 1, height)), left : data.draw(st.integers(left + 1, width))] = True
        image = Image.new("RGB", (width, height))
        if data.draw(st.booleans()):
            image.getexif()[0x0112] = 6
            mask = np.rot90(mask, -1)
        chat = [user_message("a dog?", images=1), assistant_message("yes")]
        groundings = [grounding(0, 2, 5, 0, mask)]
        samples.append({"id": str(number), "images": [image], "messages": chat, "groundings": groundings})
    other = MasksOfOthers(Samples(*samples))
    for index in range(len(other)):
        validate_sample(other[index])
        for item in other[index]["groundings"]:
            assert decode_mask(item["mask"]).any()


def test_a_mask_of_another_covers_the_same_part_of_the_image():
    def large(name, size, box):
        mask = np.zeros(size, bool)
        mask[box] = True
        chat = [user_message("a dog?", images=1), assistant_message("yes")]
        image = Image.new("RGB", size[::-1])
        return {"id": name, "images": [image], "messages": chat, "groundings": [grounding(0, 2, 5, 0, mask)]}

    samples = Samples(large("a", (40, 60), np.s_[:20, 30:]), large("b", (20, 120), np.s_[5:15, :60]))
    first, second = (decode_mask(MasksOfOthers(samples)[index]["groundings"][0]["mask"]) for index in range(2))
    assert first[10:30, :30].all() and first.sum() == 20 * 30
    assert second[:10, 60:].all() and second.sum() == 10 * 60


def test_a_mask_that_two_samples_share_is_no_other():
    assert (
        MasksOfOthers(Samples(grounded("a", 0), grounded("b", 0), grounded("c", 3)))[0]["groundings"][0]["mask"]
        == (grounded("c", 3)["groundings"][0]["mask"])
    )


def test_groundings_that_still_lack_masks():
    lacking = grounded("b", 2)
    lacking["groundings"][0]["mask"] = None
    samples = Samples(grounded("a", 0), lacking, grounded("c", 3))
    assert columns(MasksOfOthers(samples)[0]) == [3]
    assert MasksOfOthers(samples)[1]["groundings"][0]["mask"] is None, "refused, as without the control"


def test_the_control_is_what_the_recipe_names():
    recipe = DataRecipe(train=4, validation=1, test=1, masks="other")
    control, plain = load_source(recipe, 0).train, load_source(SCENES, 0).train
    masks = {grounding["mask"]["counts"] for grounding in plain[0]["groundings"]}
    changed = {grounding["mask"]["counts"] for grounding in control[0]["groundings"]}
    assert masks and changed and not masks & changed
