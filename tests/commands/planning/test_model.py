"""The batch that a plan is made with, where its data are at hand."""

import datasets
import pytest
from PIL import Image

from age_vlm.commands.planning.fake_step import fake_step
from age_vlm.commands.planning.model import PlannedModel
from age_vlm.data.schema import FEATURES, assistant_message, user_message


@pytest.fixture
def recipe_of(make_recipe, tmp_path):
    """Numbers of images and of words of each sample -> a recipe that trains on such samples."""

    def make(*samples, **sections):
        rows = [
            {
                "id": str(number),
                "images": [Image.new("RGB", (64, 64), "red")] * pictures,
                "messages": [user_message("is " * words, images=pictures), assistant_message("yes")],
                "groundings": [],
            }
            for number, (pictures, words) in enumerate(samples)
        ]
        datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(tmp_path / "data")
        return make_recipe(data={"kind": "dataset", "path": str(tmp_path / "data"), "held_out": 0.0}, **sections)

    return make


def test_an_image_is_longer_than_a_few_words(recipe_of):
    """Its tokens count: the longest of texts alone would have no image to plan the vision encoder's memory with."""
    planned = PlannedModel(recipe_of((0, 30), (1, 4), (2, 3), (0, 20)))
    assert planned.image_tokens > 30
    assert len(planned.batch(1)["pixel_values"]) == 2 and len(planned.batch(2)["pixel_values"]) == 3
    assert "4 samples" in planned.source_of_text


def test_a_step_without_images(recipe_of):
    recipe = recipe_of((0, 8), (0, 9))
    batch = PlannedModel(recipe).batch(1)
    assert "pixel_values" not in batch
    figures = fake_step(PlannedModel(recipe).copy(), recipe, batch, {"one": {}})
    assert figures.forward["language_model"] > 0
    assert figures.forward.get("vision", 0) == 0
