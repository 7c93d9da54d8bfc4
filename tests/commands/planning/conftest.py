import pytest

from age_vlm.commands.recipe import Recipe
from age_vlm.commands.recipe_file import build


@pytest.fixture(scope="session")
def make_recipe():
    """Values of `training`, and of other sections by name -> a recipe of the tiny preset with no data at hand."""

    def make(training=None, **sections) -> Recipe:
        values = {
            "data": {"kind": "dataset", "path": "not-there"},
            "training": {"steps": 10, "batch_size": 2, **(training or {})},
        }
        return build(Recipe, {**values, **sections})

    return make
