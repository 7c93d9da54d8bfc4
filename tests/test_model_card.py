import yaml
from huggingface_hub import ModelCard

from age_vlm.data.sources import DataSource
from age_vlm.model_card import model_card
from age_vlm.training.recipe import DataRecipe, ModelRecipe, Recipe


METRICS = {"model": {"pope/random/accuracy": 0.98765, "attention_mass": 0.5}, "blank picture": {"count/accuracy": 0.25}}
ENVIRONMENT = {"python": "3.11", "torch": "2.15", "threads": 2}


def card_of(recipe, metrics=METRICS):
    source = DataSource(train=[], validation=[], test=[None] * 7, tokenizer=None)
    return model_card(recipe, metrics, ENVIRONMENT, source)


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
    assert "Seed 11" in text and "all weights from random values" in text and "7 test pictures" in text
    for name, value in ENVIRONMENT.items():
        assert f"{name} {value}" in text


def test_figures_are_a_table_with_a_column_a_row_of_figures():
    lines = card_of(Recipe()).splitlines()
    start = lines.index("| figure | model | blank picture |")
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
    assert card.data.license == "other" and card.data.base_model == names
    assert "all weights from random values" not in card.text


def test_limits_are_those_of_the_data():
    photographs = DataRecipe(kind="label_maps", images="a", labels="b", classes=["sky", "road"])
    assert "classes sky, road in photographs" in card_of(Recipe(data=photographs))
    assert "drawn scenes of 64 x 64" in card_of(Recipe())
