import os
import re
import subprocess
import sys

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from age_vlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmProcessor
from age_vlm.cards import ANY_QUESTION, THIS_REPOSITORY, components_card, config_components, is_hub_id
from age_vlm.commands.model_card import model_card
from age_vlm.commands.recipe import DataRecipe, ModelRecipe, Recipe
from age_vlm.commands.sources import DataSource
from age_vlm.data.mix import Mix
from age_vlm.hub import save_checkpoint


METRICS = {"model": {"pope/random/accuracy": 0.98765, "attention_mass": 0.5}, "blank image": {"count/accuracy": 0.25}}
TRANSFORMER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ENVIRONMENT = {"python": "3.11", "torch": "2.15", "threads": 2}


def card_of(recipe, metrics=METRICS):
    source = DataSource(train=[], validation=[], test=[None] * 7, texts=list)
    config = AgeVlmConfig()
    # As `from_backbones` leaves it.
    config.text_config.name_or_path = recipe.model.text or ""
    config.vision_config.name_or_path = recipe.model.vision or ""
    return model_card(recipe, metrics, ENVIRONMENT, source, config)


def test_the_hub_can_read_its_metadata():
    card = ModelCard(card_of(Recipe(name="a card")))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert card.text.strip().startswith("# a card")


def test_it_says_how_the_model_was_made_and_how_well_it_does():
    recipe = Recipe(name="a card", seed=11)
    text = card_of(recipe)
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == yaml.safe_load(recipe.to_yaml())
    assert "Seed 11" in text and "all weights from random values" in text and "7 test images" in text
    for name, value in ENVIRONMENT.items():
        assert f"{name} {value}" in text


def test_metrics_are_a_table_with_a_column_a_row_of_metrics():
    lines = card_of(Recipe()).splitlines()
    start = lines.index("| metric | model | blank image |")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + 5]]
    assert table[1] == ["---"] * 3
    assert table[2:] == [
        ["pope/random/accuracy", "0.988", "-"],
        ["attention_mass", "0.500", "-"],
        ["count/accuracy", "-", "0.250"],
    ]


def test_backbones_of_the_hub_bring_their_own_terms():
    names = ["meta-llama/Llama-3.2-1B", "timm/convnext"]
    card = ModelCard(card_of(Recipe(model=ModelRecipe(text=names[0], vision=names[1]))))
    assert card.data.license == "unknown" and card.data.base_model == names, "nothing can be asked here"
    assert "all weights from random values" not in card.text


def test_limits_are_those_of_the_data():
    photographs = DataRecipe(kind="label_maps", images="a", labels="b", classes=["sky", "road"])
    assert "classes sky, road in photographs" in card_of(Recipe(data=photographs))
    assert "drawn scenes of 64 x 64" in card_of(Recipe())


# Parts


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, tokenizer):
    """Text and vision folders, as downloaded from the Hub: with a card each."""
    folder = tmp_path_factory.mktemp("backbones")
    config = LlamaConfig(**TRANSFORMER, vocab_size=300, bos_token_id=0, eos_token_id=5, pad_token_id=6)
    LlamaForCausalLM(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    SiglipModel(
        SiglipConfig(
            text_config={**TRANSFORMER, "vocab_size": 99, "projection_size": 32},
            vision_config={**TRANSFORMER, "image_size": 64, "patch_size": 16},
        )
    ).save_pretrained(folder / "vision")
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "vision")
    for part, license in (("text", "llama3.2"), ("vision", "apache-2.0")):
        (folder / part / "README.md").write_text(f"---\nlicense: {license}\n---\n# a part\n")
    return {part: folder / part for part in ("text", "vision")}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Repository and its files -> they are what was downloaded of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(repository, files, commit="0" * 40):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        for path, text in {
            "refs/main": commit,
            **{f"snapshots/{commit}/{name}": files[name] for name in files},
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)

    return add


@pytest.fixture
def built(backbones):
    return AgeVlmForConditionalGeneration.from_backbones(**backbones)


def test_a_model_from_parts_names_them_and_their_licences(built, backbones, tmp_path):
    processor = AgeVlmProcessor.from_backbones(**backbones)
    assert [part.name for part in config_components(built.config)] == [str(backbones["text"]), str(backbones["vision"])]
    built.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    saved = save_checkpoint(built, processor, tmp_path / "saved", components_card(built))
    for model in (built, AgeVlmForConditionalGeneration.from_pretrained(saved)):
        card = ModelCard(components_card(model))
        assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
        assert card.data.license == "other" and card.data.license_name == "that-of-its-components"
        assert card.data.base_model is None, "a folder is no model of the Hub"
        assert "| language model | a local folder | llama3.2 |" in card.text
        assert "| vision encoder | a local folder | apache-2.0 |" in card.text
        assert str(backbones["text"]) not in card.text
        assert "Every gate is closed" in card.text
    # Where something lay on this machine is in no file of what others get, however it is saved.
    for file in [*(tmp_path / "plain").iterdir(), *saved.iterdir()]:
        for folder in (*backbones.values(), tmp_path):
            assert str(folder).encode() not in file.read_bytes(), file
    again = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "plain")
    assert ModelCard(components_card(again)).data.license == "unknown"
    assert [part.license for part in config_components(again.config)] == [None, None]


def test_parts_of_the_hub_are_its_base_models(built, hub_cache):
    built.config.text_config.name_or_path, built.config.vision_config.name_or_path = "some/llama", "some/encoder"
    card = ModelCard(components_card(built))
    assert card.data.base_model == ["some/llama", "some/encoder"] and card.data.license == "unknown"
    assert "[some/llama](https://huggingface.co/some/llama) | not known: see its card |" in card.text
    hub_cache("some/llama", {"README.md": "---\nlicense: mit\n---\n"})
    assert ModelCard(components_card(built)).data.license == "unknown", "of one the licence is not known"
    hub_cache("some/encoder", {"README.md": "---\nlicense: mit\n---\n"})
    card = ModelCard(components_card(built))
    assert card.data.license == "mit" and card.data.license_name is None
    assert card.text.count("| mit |") == 2


def test_open_gates_and_random_beginnings_are_told_apart(make_model):
    card = ModelCard(components_card(make_model()))
    assert "Every gate is closed" not in card.text
    assert card.data.license == "unknown" and "## Components" not in card.text
    assert "layers 1, 3, counted from 0" in card.text


def test_a_recipe_that_goes_on_from_a_checkpoint_keeps_its_parts(built):
    source = DataSource(train=[], validation=[], test=[], texts=list)
    recipe = Recipe(model=ModelRecipe(checkpoint="runs/before/checkpoint"))
    built.config.text_config.name_or_path = "some/llama"
    card = ModelCard(model_card(recipe, METRICS, ENVIRONMENT, source, built.config))
    assert card.data.base_model == ["some/llama"] and card.data.license == "unknown"


def test_the_licence_is_that_of_all_it_was_trained_on(tmp_path):
    def licence(**sections):
        return ModelCard(card_of(Recipe(**sections))).data.license

    def stored(name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{text}\n---\n")
        return DataRecipe(kind="dataset", path=str(tmp_path / name))

    photographs = {"kind": "label_maps", "images": "a", "labels": "b", "classes": ["sky", "road"]}
    assert licence() == "apache-2.0", "drawn scenes are ours"
    assert licence(data=DataRecipe(**photographs)) == "unknown"
    assert licence(data=DataRecipe(**photographs, license="cc-by-4.0")) == "cc-by-4.0"
    mit, listed = stored("mit", "license: mit"), stored("listed", "license: [mit]")
    for data, told in ((mit, "mit"), (listed, "mit"), (stored("none", "tags: [x]"), "unknown")):
        assert licence(data=data) == told
    assert licence(data=stored("said", "license: unknown")) == "unknown"
    assert licence(data=DataRecipe(kind="dataset", path="some/where")) == "unknown"
    assert licence(data=mit, mix=[listed]) == "mit" and licence(data=mit, mix=[DataRecipe()]) == "other"
    assert licence(mix=[DataRecipe(**photographs)]) == "unknown"


def test_a_model_that_goes_on_from_another_has_its_licence_too(tmp_path):
    source = DataSource(train=[], validation=[], test=[], texts=list)
    config = AgeVlmConfig()
    config.name_or_path = str(tmp_path)
    for text, told in (
        ("license: cc-by-4.0", "other"),
        ("license: apache-2.0", "apache-2.0"),
        ("tags: [x]", "unknown"),
    ):
        (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
        recipe = Recipe(model=ModelRecipe(checkpoint="previous"))
        assert ModelCard(model_card(recipe, METRICS, ENVIRONMENT, source, config)).data.license == told


def test_no_path_of_this_machine_is_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "llama").mkdir(parents=True)
    here = str(tmp_path)
    photographs = DataRecipe(
        kind="label_maps", images="some/images", labels=f"{here}/labels", instances="../instances", classes=["sky"]
    )
    recipes = [
        Recipe(model=ModelRecipe(text=f"{here}/text", vision="some/llama"), data=photographs),
        Recipe(model=ModelRecipe(checkpoint=f"{here}/before"), data=DataRecipe(kind="dataset", path=f"{here}/data")),
        Recipe(
            data=photographs, mix=[DataRecipe(kind="dataset", path="~/data"), DataRecipe(kind="dataset", path="./x")]
        ),
        Recipe(model=ModelRecipe(config={"text_config": {"_name_or_path": "some/llama", "name": f"{here}/x"}})),
    ]
    for recipe in recipes:
        text = card_of(recipe)
        for path in (here, "some/", "../", "~/", "./x"):
            assert path not in text.replace("https://", ""), path
        assert "a local folder" in text
    kept = card_of(
        Recipe(model=ModelRecipe(text="a/llama", vision="an/encoder"), data=DataRecipe(kind="dataset", path="b/c"))
    )
    assert "text: a/llama" in kept and "path: b/c" in kept and "It was trained on b/c" in kept


def test_samples_are_counted_once_however_often_they_are_drawn():
    def stated(train):
        source = DataSource(train=train, validation=[], test=[], texts=list)
        return int(re.search(r"(\d+) training samples", model_card(Recipe(), METRICS, {}, source, AgeVlmConfig()))[1])

    parts = [["a", "b"], ["c"] * 500]
    assert stated(Mix(parts, [1, 1], length=40)) == 22, "both of the first, 20 of the second"
    assert stated(Mix(parts, [1, 1], length=2)) == 2
    assert stated(["a", "b", "c"]) == 3


def test_folders_are_not_taken_for_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "llama").mkdir(parents=True)
    assert [is_hub_id(name) for name in ("some/llama", "some/encoder", "llama", "a/b/c", "/some/llama", "")] == [
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    recipe = Recipe(model=ModelRecipe(text="some/llama", vision="some/encoder"))
    assert ModelCard(card_of(recipe)).data.base_model == ["some/encoder"]


def test_the_snippets_of_the_cards_run(built, backbones, tmp_path):
    processor = AgeVlmProcessor.from_backbones(**backbones)
    photographs = DataRecipe(kind="label_maps", images="a", labels="b", classes=["sky", "road"])
    cards = [components_card(built), card_of(Recipe()), card_of(Recipe(data=photographs))]
    folder = save_checkpoint(built, processor, tmp_path / "checkpoint")
    # As someone runs them who has not got age-vlm.
    lines = ["import sys", "sys.modules['age_vlm'] = None"]
    for card in cards:
        snippet = card.split("```python\n")[1].split("```")[0]
        assert snippet.count(THIS_REPOSITORY) == 1
        lines.append(snippet.replace(THIS_REPOSITORY, str(folder)))
    (tmp_path / "snippets.py").write_text("\n".join(lines))
    Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 50).save(tmp_path / "image.png")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "snippets.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in (ANY_QUESTION, "is there a red circle in the picture ?", "is there a sky ?")
    ]
    expected = []
    for message in messages:
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        batch = processor(images=Image.open(tmp_path / "image.png"), text=text, return_tensors="pt")
        answer = built.generate(**batch, max_new_tokens=16)[0, batch["input_ids"].shape[1] :]
        expected.append(processor.decode(answer, skip_special_tokens=True))
    assert done.stdout.decode() == "".join(f"{answer}\n" for answer in expected)
