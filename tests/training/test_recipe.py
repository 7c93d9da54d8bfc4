import dataclasses
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from age_vlm.training.recipe import Recipe, TrainingRecipe, load_recipe


SCENES = Path(str(files("age_vlm") / "recipes" / "scenes.yaml"))
LABEL_MAPS = Path(__file__).parents[2] / "examples" / "recipes" / "label_maps.yaml"
OWN = ["data.images=photographs", "data.labels=labels", "data.classes=[sky, road]"]


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_an_empty_recipe_is_the_default(recipe_file):
    assert load_recipe(recipe_file("")) == Recipe() == load_recipe(recipe_file("{}"))


@pytest.mark.parametrize("path, own", [(SCENES, []), (LABEL_MAPS, OWN)])
def test_the_recipes_that_come_along_load_and_survive_a_round_trip(path, own, recipe_file):
    recipe = load_recipe(path, [*own, "seed=7", "training.steps=3", "alignment.heads=[1, 2]"])
    assert (recipe.seed, recipe.training.steps, list(recipe.alignment.heads)) == (7, 3, [1, 2])
    plain = load_recipe(path, own)
    written = yaml.safe_load(path.read_text("utf-8"))
    for section, values in written.items():
        held = getattr(plain, section)
        for key, value in values.items() if isinstance(values, dict) else ():
            if value is not None:
                assert getattr(held, key) == value, (section, key)
    for each in (recipe, plain):
        again = load_recipe(recipe_file(each.to_yaml()))
        assert again.to_yaml() == each.to_yaml()


def test_label_maps_need_to_be_told_where_they_are():
    with pytest.raises(ValueError, match="^data: kind 'label_maps' needs images, labels and classes"):
        load_recipe(LABEL_MAPS)


def keys(cls=Recipe, where=""):
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            yield from keys(factory, f"{where}{field.name}.")
        yield f"{where}{field.name}"


@given(st.sampled_from(sorted(keys())), st.data())
def test_a_misspelt_key_is_named_with_a_nearest_valid_one(key, data):
    *sections, name = key.split(".")
    place = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:place] + "q" + name[place + 1 :]
    values: dict = {misspelt: 1}
    for section in reversed(sections):
        values = {section: values}
    from age_vlm.training.recipe import build

    with pytest.raises(ValueError) as caught:
        build(Recipe, values)
    message = str(caught.value)
    assert message.startswith(f"{'.'.join([*sections, misspelt])}: unknown key") and "\n" not in message
    if len(name) > 4:
        assert message.endswith(f"(nearest: '{name}').")


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed=one", "^seed: got 'one', expected int"),
        ("seed=true", "^seed: got True, expected int"),
        ("seed=-1", "^seed: got -1, expected at least 0"),
        ("seed=1.5", "^seed: got 1.5, expected int"),
        ("name=3", "^name: got 3, expected str"),
        ("training.learning_rate=fast", "^training.learning_rate: got 'fast', expected float"),
        ("training.learning_rate=nan", "^training.learning_rate: got nan, expected float"),
        ("training.learning_rate=-1", "^training.learning_rate: got -1"),
        ("training.steps=0", "^training.steps: got 0, expected at least 1"),
        ("training.evaluate_every=0", "^training.evaluate_every: got 0, expected at least 1"),
        ("training.log_every=0", "^training.log_every: got 0, expected at least 1"),
        ("training.schedule=cosin", "^training.schedule: got 'cosin', .*nearest: 'cosine'"),
        ("training.warmup=30", "^training.warmup: got 30"),
        ("training.train=[vison]", "^training.train: got 'vison', .*nearest: 'vision'"),
        ("training.train=vision", "^training.train: got 'vision', expected list"),
        ("training.precision=fp8", "^training.precision: got 'fp8'"),
        ("training=5", "^training: got 5, expected keys and values"),
        ("training.steps.more=5", "^override: 'steps' in 'training.steps.more=5' has no keys"),
        ("warm_start.steps=-1", "^warm_start.steps: got -1"),
        ("data.kind=scene", "^data.kind: got 'scene', expected 'scenes' or 'label_maps'"),
        ("data.masks=none", "^data.masks: got 'none'"),
        ("data.test=0", "^data.test: got 0, expected at least 1"),
        ("data.crop=[3]", "^data.crop: got .3., expected a width and a height"),
        ("model.preset=age-vlm-tniy", "^model.preset: got 'age-vlm-tniy', .*nearest: 'age-vlm-tiny'"),
        ("model.text=somewhere", "^model.text, model.vision: got one without the other"),
        ("alignment.form=kll", "^alignment.form: got 'kll', .*nearest: '(kl|nll)'"),
        ("alignment.layers=0", "^alignment.layers: got 0, expected"),
        ("alignment.layers=[]", "^alignment.layers: got an empty list"),
        ("alignment.heads=[a]", "^alignment.heads: got .'a'., expected"),
        ("seed", "^override: got 'seed', expected section.key=value"),
        ("data.classes=[a", "^override: the value in 'data.classes=.a' is not YAML"),
        ("traning.steps=5", "^traning: unknown key, .*nearest: 'training'"),
        ("=5", "unknown key"),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_sentence(override, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_recipe(SCENES, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [1", "is not YAML: while parsing"),
        ("- 1\n- 2", r"holds \[1, 2\], expected keys and values"),
        ("just words", "holds 'just words', expected keys and values"),
        (b"name: \xff\xfe", "is not YAML: .*utf-8"),
        ("training:", "^training: got None, expected keys and values"),
        ("5: 6", "^5: unknown key"),
    ],
)
def test_files_that_are_no_recipe_are_refused_in_one_sentence(recipe_file, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_recipe(recipe_file(text), ["seed=1"])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ValueError, match="is not a file, expected a YAML file"):
            load_recipe(path)


@pytest.mark.parametrize("text", ["2e-3", "0.002", "2.0e-3", "2E-3"])
def test_numbers_are_read_as_people_write_them(text):
    assert load_recipe(SCENES, [f"training.learning_rate={text}"]).training.learning_rate == 0.002


def test_a_whole_number_is_a_float_where_one_is_wanted():
    rate = load_recipe(SCENES, ["training.weight_decay=1"]).training.weight_decay
    assert rate == 1.0 and isinstance(rate, float)


def test_schedules_are_those_transformers_makes_without_more_arguments():
    import torch
    from transformers import get_scheduler

    from age_vlm.training.recipe import SCHEDULES

    for name in SCHEDULES:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=TrainingRecipe().learning_rate)
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=5)
