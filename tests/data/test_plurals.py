"""English plurals, and every place that says one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.converters.mentions import Vocabulary
from age_vlm.data.label_maps import count_question, label_map_texts
from age_vlm.data.plurals import indefinite, is_countable, is_plural, plural
from age_vlm.data.scene_questions import scene_texts


PLURALS = {
    "dog": "dogs",
    "person": "people",
    "wine glass": "wine glasses",
    "bus": "buses",
    "couch": "couches",
    "toothbrush": "toothbrushes",
    "knife": "knives",
    "puppy": "puppies",
    "toy": "toys",
    "policeman": "policemen",
    "human": "humans",
    "old gentleman": "old gentlemen",
    "thief": "thieves",
    "passer-by": "passers-by",
    "fire-truck": "fire-trucks",
    "sheep": "sheep",
    "mouse": "mice",
    "tooth": "teeth",
    "cactus": "cactuses",
    "potato": "potatoes",
    "chest of drawers": "chests of drawers",
    "sign symbol": "sign symbols",
    # Class names that are plurals already.
    "skis": "skis",
    "scissors": "scissors",
    "stairs": "stairs",
    "glasses": "glasses",
    "traffic lights": "traffic lights",
    "people": "people",
    "children": "children",
}


@pytest.mark.parametrize(("name", "expected"), PLURALS.items())
def test_plurals_are_english(name, expected):
    assert plural(name) == expected


@given(st.sampled_from(sorted(PLURALS)))
@settings(deadline=None)
def test_the_plural_of_a_plural_is_itself(name):
    assert plural(plural(name)) == plural(name)


@pytest.mark.parametrize("name", ["bus", "person", "mouse", "knife", "sheep", "skis"])
def test_every_text_says_the_same_plural(name):
    text, (start, end) = count_question(name)
    assert text[start:end] == PLURALS[name]
    assert any(PLURALS[name] in said.split() for said in label_map_texts([name]))
    ((start, end, names),) = Vocabulary({"thing": [name]}).find(f"two {PLURALS[name]} here")
    assert (start, end, names) == (4, 4 + len(PLURALS[name]), {"thing"})


def test_drawn_shapes_have_plurals():
    assert {"circles", "crosses"} <= set(scene_texts())


INDEFINITE = {
    "dog": "a dog",
    "umbrella": "an umbrella",
    "hourglass": "an hourglass",
    "university": "a university",
    "sheep": "a sheep",
    "wine glass": "a wine glass",
    "skis": "skis",
    "scissors": "scissors",
    "police": "police",
    "children": "children",
    "broccoli": "broccoli",
    "wild grass": "wild grass",
    "series": "a series",
}


@pytest.mark.parametrize(("name", "expected"), INDEFINITE.items())
def test_articles_are_english_and_only_single_things_have_one(name, expected):
    assert indefinite(name) == expected
    assert is_countable(name) == (name != expected)
    assert is_plural(name) == (name in ("skis", "scissors", "police", "children"))
