"""The checkpoint that comes with the repository: whole, small, and as good as its model card says."""

import re
from dataclasses import replace
from importlib.resources import files

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from age_vlm.commands.ask import ask, bundled_checkpoint
from age_vlm.commands.recipe_file import load_recipe
from age_vlm.commands.sources import load_sources
from age_vlm.commands.train import test_metrics as measured
from age_vlm.configuration.checkpoint_code_agevlm import checkpoint_code
from age_vlm.data.scene_datasets import scene_items
from age_vlm.evaluation.benchmark import answer_metrics, grounding_metrics


@pytest.fixture(scope="module")
def checkpoint():
    folder = bundled_checkpoint()
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_it_is_small_enough_for_the_repository():
    assert sum(file.stat().st_size for file in bundled_checkpoint().rglob("*")) <= 8 * 2**20


def test_metrics_on_some_test_scenes_are_those_of_the_card(checkpoint):
    card = (bundled_checkpoint() / "README.md").read_text("utf-8")
    stated = {name: float(value) for name, value in re.findall(r"^\| (\S+) \| (0\.\d+|1\.0+) \|", card, re.MULTILINE)}
    items = scene_items("test", 60)
    metrics, _ = answer_metrics(*checkpoint, items)
    metrics |= grounding_metrics(*checkpoint, items)
    # 60 of the card's 500 scenes: an accuracy of .9 over 120 questions has a standard error of .03.
    for name in ("pope/random/accuracy", "pope/adversarial/accuracy", "pointing_accuracy", "attention_mass"):
        assert abs(metrics[name] - stated[name]) < 0.1, name


def test_it_answers_about_the_example_image(checkpoint):
    picture = Image.open(bundled_checkpoint().parents[1] / "images" / "scene.png")
    answer = ask(*checkpoint, picture, "what colour is the cross?")
    assert answer.text and [word for word, _ in answer.words] == ["colour", "cross", answer.text]


def test_it_carries_today_s_code():
    for name, source in checkpoint_code().items():
        kept = (bundled_checkpoint() / name).read_text("utf-8")
        assert kept == source, "AgeVlmConfig.from_pretrained(folder).save_pretrained(folder) brings it up to date"


def test_the_blank_control_does_not_see_the_image(checkpoint):
    """A model that looks shows what its control was shown; one with random weights answers alike either way."""
    recipe = load_recipe(
        files("age_vlm") / "recipes" / "scenes.yaml", ["data.train=1", "data.validation=1", "data.test=30"]
    )
    source = load_sources(recipe)
    found = measured(*checkpoint, recipe, source)
    grey = [replace(item, image=Image.new("RGB", item.image.size, "grey")) for item in source.test]
    expected, _ = answer_metrics(*checkpoint, grey)
    assert found["blank image"] == expected
    for name in ("pope/adversarial/accuracy", "colour/accuracy"):
        assert found["model"][name] > found["blank image"][name] + 0.2
