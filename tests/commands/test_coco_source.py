"""The data of the kind `coco`: split by image, questions of POPE's modes, metrics by mode."""

import shutil

import pytest

from age_vlm.commands.recipe import DataRecipe
from age_vlm.commands.sources import load_source
from age_vlm.commands.train import mode_aucs
from age_vlm.data.held_out import StoredImage
from age_vlm.errors import UserError


@pytest.fixture
def recipe(coco_rectangles):
    return DataRecipe(
        kind="coco", images=str(coco_rectangles["images"]), instances=str(coco_rectangles["instances"]), held_out=0.6, train=50,
        validation=8, test=8, texts=["presence"],
    )  # fmt: skip


def test_splits_share_no_image_and_ask_by_pope_s_modes(recipe):
    source = load_source(recipe, 0)
    used = [{item.image_id.removeprefix("coco/") for item in part} for part in (source.validation, source.test)]
    assert used[0] and used[1] and not used[0] & used[1]
    assert not (used[0] | used[1]) & {*source.train.numbers}
    questions = [question for item in source.test for question in item.questions]
    assert {question.mode for question in questions} == {"random", "popular", "adversarial"}
    assert {question.answer for question in questions} == {"yes", "no"}
    assert source.train_samples == 50 and "dog" in set(source.texts())


def test_other_data_may_hold_images_out(recipe):
    source = load_source(recipe, 0)
    other = DataRecipe(**{**vars(recipe), "held_out": 0.2})
    again = load_source(other, 0, evaluation=False, held_out=source.held_out)
    held = {item.image_id.removeprefix("coco/") for item in (*source.validation, *source.test)}
    assert not held & {*again.train.numbers} and not again.test


def test_a_photograph_that_is_missing_is_counted_and_no_fault(recipe, tmp_path):
    shutil.copytree(recipe.images, tmp_path / "images")
    gone = load_source(recipe, 0).train.numbers[0]
    (tmp_path / "images" / f"{gone}.png").unlink()
    source = load_source(DataRecipe(**{**vars(recipe), "images": str(tmp_path / "images")}), 0)
    names = [source.train[index]["id"].split("/")[1] for index in range(len(source.train.numbers))]
    assert gone not in names and source.train.rejects.counts["image file is missing"]
    assert list(source.texts()) == list(source.texts())


def test_all_photographs_held_out_is_one_sentence(recipe):
    source = load_source(recipe, 0)
    source.held_out.add(StoredImage.of_file(source.train.file(number)) for number in source.train.numbers)
    with pytest.raises(UserError, match="^mix: all photographs of '.*' are held out by `data`"):
        load_source(recipe, 0, evaluation=False, held_out=source.held_out)


def test_aucs_are_by_mode(recipe):
    source = load_source(recipe, 0)
    questions = [question for item in source.test for question in item.questions]
    right = {question.id: float(question.answer == "yes") for question in questions}
    assert mode_aucs(right, source.test) == {
        f"presence/{mode}_auc": 1.0 for mode in ("random", "popular", "adversarial")
    }
    for question in questions:
        right[question.id] = 1 - right[question.id] if question.mode == "popular" else right[question.id]
    assert mode_aucs(right, source.test)["presence/popular_auc"] == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instances": None}, "^data: kind 'coco' needs images and instances"),
        ({"held_out": 0.0}, "^data.held_out: got 0.0, expected a share, above 0 and below 1"),
        ({"texts": ["colour"]}, "^data.texts: got 'colour' for kind 'coco', expected one of presence, count, where"),
    ],
)
def test_what_does_not_fit_is_one_sentence(recipe, changes, message):
    with pytest.raises(UserError, match=message):
        DataRecipe(**{**vars(recipe), **changes})
