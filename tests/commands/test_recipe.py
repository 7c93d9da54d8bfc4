import dataclasses
import inspect
import re
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from age_vlm.commands.fit import training_arguments
from age_vlm.commands.recipe import COMPONENTS, RECIPE_ARGUMENTS, Recipe, TrainingRecipe
from age_vlm.commands.recipe_file import load_recipe
from age_vlm.errors import UserError


SCENES = Path(str(files("age_vlm") / "recipes" / "scenes.yaml"))
LABEL_MAPS = Path(__file__).parents[2] / "examples" / "recipes" / "label_maps.yaml"
REFERENCE = LABEL_MAPS.parent / "reference.yaml"
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


def test_the_reference_names_every_key_with_its_default():
    recipe = load_recipe(REFERENCE)
    assert recipe.to_yaml() == Recipe().to_yaml()
    written = yaml.safe_load(REFERENCE.read_text("utf-8"))
    named = {*written, *(f"{s}.{key}" for s, held in written.items() if isinstance(held, dict) for key in held)}
    named |= {f"training.lora.{key}" for key in written["training"]["lora"]}
    assert named == set(keys())
    for line in REFERENCE.read_text("utf-8").splitlines():
        if ":" in line.partition("#")[0] and not line.partition("#")[0].rstrip().endswith(":"):
            assert "#" in line, line


@pytest.mark.parametrize("path", sorted((REFERENCE.parent / "scenes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_stage_says_what_it_is(path):
    for line in path.read_text("utf-8").splitlines():
        key = line.partition("#")[0].rstrip()
        assert not key or key.endswith(":") or "#" in line, line


@pytest.mark.parametrize("path", sorted(REFERENCE.parent.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_can_be_read(path):
    needed = OWN if path == LABEL_MAPS else []
    if path.parent.name == "age-vlm-1b":  # its user names the data
        mixed = len(yaml.safe_load(path.read_text("utf-8")).get("mix", ()))
        needed = ["data.path=FOLDER", *(f"mix.{number}.path=FOLDER" for number in range(mixed))]
    assert load_recipe(path, needed).name


def test_parts_that_are_all_frozen_and_rates_of_frozen_ones():
    with pytest.raises(ValueError, match="^training: got 'frozen' for all of vision, projector"):
        load_recipe(SCENES, [f"training.{part}=frozen" for part in COMPONENTS])
    with pytest.raises(
        ValueError, match="^training.learning_rates.vision: got a rate, but training.vision is 'frozen'"
    ):
        load_recipe(SCENES, ["training.vision=frozen", "training.learning_rates={vision: 1e-4}"])


def test_trackers_are_those_that_are_there():
    for name, words in (
        ("tensorbord", "got 'tensorbord', expected one of .*trackio.* .nearest: 'tensorboard'"),
        ("neptune", "got 'neptune', which is not installed .pip install neptune"),
        ("flyte", "got 'flyte', which is not installed .pip install flyte"),
    ):
        with pytest.raises(ValueError, match=f"^training.report_to: {words}"):
            load_recipe(SCENES, [f"training.report_to=[{name}]"])
    with pytest.raises(ValueError, match="^training.report_to: got 'wandb', expected"):
        load_recipe(SCENES, ["training.report_to=wandb"])


def test_texts_are_those_that_the_data_have():
    label_maps = ["data.kind=label_maps", *OWN]
    assert load_recipe(SCENES, [*label_maps, "data.texts=[count, caption]"]).data.texts == ["count", "caption"]
    for override, words in (
        (
            "data.texts=[colour]",
            "^data.texts: got 'colour' for kind 'label_maps', expected one of caption, existence, count",
        ),
        ("data.texts=[count]", "^data.texts: got count alone, which needs data.instances"),
        ("data.held_out=0", "^data.held_out: got 0.0, expected a share, above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            load_recipe(SCENES, [*label_maps, override])
    with pytest.raises(ValueError, match="^data.texts: got .*, expected null"):
        load_recipe(SCENES, ["data.kind=dataset", "data.path=here", "data.texts=[caption]"])


def test_items_of_a_list_have_overrides(recipe_file):
    path = recipe_file("mix:\n- {texts: [caption]}\n- {kind: dataset, path: null}\n")
    recipe = load_recipe(path, ["mix.1.path=here", "mix.0.weight=2"])
    assert [(part.kind, part.path, part.weight) for part in recipe.mix] == [
        ("scenes", None, 2.0),
        ("dataset", "here", 1),
    ]
    assert load_recipe(recipe_file(recipe.to_yaml())).to_yaml() == recipe.to_yaml()
    for override, words in (("mix.2.path=x", "'2' in"), ("mix.x.path=x", "'x' in"), ("mix.1=x", "'1' in .* is no key")):
        with pytest.raises(ValueError, match=f"^override: {words}"):
            load_recipe(path, [override])


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
    from age_vlm.commands.recipe_file import build

    with pytest.raises(ValueError) as caught:
        build(Recipe, values)
    message = str(caught.value)
    assert message.startswith(f"{'.'.join([*sections, misspelt])}: unknown key") and "\n" not in message
    if len(name) > 4:
        # Another key may be as near: 'learning_rateq' is one letter from two of them.
        nearest = re.search(r"\(nearest: '(\w+)'\)\.$", message)[1]
        ratios = [SequenceMatcher(None, other, misspelt).ratio() for other in (nearest, name)]
        assert ratios[0] >= ratios[1]


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
        ("training.adam_beta2=1", "^training.adam_beta2: got 1"),
        ("training.train=[vision]", "^training.train: unknown key"),
        ("training.vision=frozn", "^training.vision: got 'frozn', expected one of frozen, full .nearest: 'frozen'"),
        ("training.vision=lora", "^training.vision: got 'lora', expected one of frozen, full"),
        ("training.language_model=lor", "^training.language_model: got 'lor', expected one of frozen, full, lora"),
        ("training.projector=false", "^training.projector: got False, expected str"),
        ("training.learning_rates={vison: 1e-3}", "^training.learning_rates: got 'vison', .*nearest: 'vision'"),
        ("training.learning_rates={vision: fast}", "^training.learning_rates.vision: got 'fast', expected float"),
        ("training.learning_rates={vision: -1}", "^training.learning_rates.vision: got -1"),
        ("training.learning_rates=[1]", "^training.learning_rates: got .1., expected dict"),
        ("training.lora.rank=0", "^training.lora.rank: got 0, expected at least 1"),
        ("training.lora.alpha=0", "^training.lora.alpha: got 0.0, expected more than 0"),
        ("training.lora.dropout=1", "^training.lora.dropout: got 1.0, expected a share"),
        ("training.lora.rnk=4", "^training.lora.rnk: unknown key, .*nearest: 'rank'"),
        ("training.save_every=-1", "^training.save_every: got -1, expected at least 0"),
        ("training.max_length=0", "^training.max_length: got 0, expected at least 1"),
        (
            "training.encoder_cache=there",
            "^training.encoder_cache: got 'there' with training.vision 'full', expected 'frozen'",
        ),
        (
            "training.text_cache=true",
            "^training.text_cache: got true with training.language_model 'full', expected 'frozen'",
        ),
        ("training={shared_prefix: true, packing: true}", "^training.shared_prefix: got true, expected false with"),
        ("training.pack_length=512", "^training.pack_length: got 512, expected at least 1, or null .*training.packing"),
        ("training.packing=512", "^training.packing: got 512, expected bool"),
        ("training.non_finite=ignore", "^training.non_finite: got 'ignore', expected one of stop, skip"),
        ("training.spike_threshold=-1", "^training.spike_threshold: got -1.0, expected at least 0"),
        ("training.precision=fp8", "^training.precision: got 'fp8'"),
        ("training=5", "^training: got 5, expected keys and values"),
        ("training.steps.more=5", "^override: 'steps' in 'training.steps.more=5' has no keys"),
        ("warm_start.steps=-1", "^warm_start.steps: got -1"),
        ("data.kind=scene", "^data.kind: got 'scene', expected one of scenes, label_maps, coco, dataset"),
        ("data.kind=dataset", "^data.path: got none, expected the folder or Hub name"),
        ("data.weight=0", "^data.weight: got 0.0, expected more than 0"),
        ("data.texts=[captions]", "^data.texts: got 'captions' for kind 'scenes', .*nearest: 'caption'"),
        ("data.texts=[]", "^data.texts: got an empty list"),
        ("data.held_out=1", "^data.held_out: got 1.0, expected a share"),
        ("mix=[{kind: scene}]", "^mix.0.kind: got 'scene', expected one of scenes"),
        ("mix=[{kind: dataset}]", "^mix.0.path: got none"),
        ("mix=[{}, {weight: -1}]", "^mix.1.weight: got -1.0"),
        ("mix=[{knd: scenes}]", "^mix.0.knd: unknown key, .*nearest: 'kind'"),
        ("mix=[scenes]", "^mix.0: got 'scenes', expected keys and values"),
        ("mix=scenes", "^mix: got 'scenes', expected list"),
        ("mix.0.weight=1", "^mix: got {'0': {'weight': 1}}, expected list"),
        ("model.image_size=-64", "^model.image_size: got -64, expected pixels, at least 1"),
        ("model.image_size=[64, 0]", "^model.image_size: got .64, 0., expected pixels, at least 1"),
        ("model.config={5: 1}", "^model.config: got {5: 1}, expected dict"),
        ("model.dtype=float32", "^model.dtype: got 'float32' without model.text"),
        ("alignment.schedule=cosin", "^alignment.schedule: got 'cosin', .*nearest: 'cosine'"),
        ("alignment.final_weight=-1", "^alignment.final_weight: got -1"),
        ("data.masks=none", "^data.masks: got 'none'"),
        ("data.test=0", "^data.test: got 0, expected at least 1"),
        ("data.crop=[3]", "^data.crop: got .3., expected a width and a height"),
        ("data.min_side=0", "^data.min_side: got 0.0, expected a share above 0 and up to 1"),
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

    from age_vlm.commands.recipe import LR_SCHEDULES

    for name in LR_SCHEDULES:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=TrainingRecipe().learning_rate)
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=5)


@pytest.mark.parametrize(
    "value, words",
    [
        ("{optim: adafactor}", None),
        ("{max_steps: 3}", r"^training.arguments: got 'max_steps', which is set by training.steps"),
        (
            "{optm: adafactor}",
            r"^training.arguments: got 'optm', expected fields of TrainingArguments .nearest: 'optim'",
        ),
        ("{hub_token: hf_secret}", r"^training.arguments: got 'hub_token', which is set by `hf auth login`"),
        ("7", r"^training.arguments: got 7, expected dict"),
    ],
)
def test_other_arguments_are_those_of_the_trainer(value, words):
    if words is None:
        assert load_recipe(SCENES, [f"training.arguments={value}"]).training.arguments == {"optim": "adafactor"}
        return
    with pytest.raises(UserError, match=words) as caught:
        load_recipe(SCENES, [f"training.arguments={value}"])
    assert "\n" not in str(caught.value)


def test_what_the_recipe_sets_itself_is_what_may_not_be_passed_on(tmp_path):
    """Both lists of names are one."""
    set_here = inspect.getsource(training_arguments)
    names = set(re.findall(r"^        (\w+)=", set_here, re.MULTILINE)) | {
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
    }
    assert names <= set(RECIPE_ARGUMENTS)
    assert set(RECIPE_ARGUMENTS) - names <= {"num_train_epochs", "gradient_checkpointing", "hub_token"}


def test_other_arguments_reach_the_trainer(tmp_path):
    training = TrainingRecipe(arguments={"optim": "adafactor", "label_smoothing_factor": 0.1})
    arguments = training_arguments(training, 0, tmp_path, progress=False)
    assert arguments.optim == "adafactor" and arguments.label_smoothing_factor == 0.1
    with pytest.raises(UserError, match="^training.arguments: .*adamgold") as caught:
        training_arguments(TrainingRecipe(arguments={"optim": "adamgold"}), 0, tmp_path, progress=False)
    assert "\n" not in str(caught.value)
