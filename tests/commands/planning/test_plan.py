import dataclasses
import json

import pytest
import torch
from transformers import set_seed

from age_vlm.cli import main
from age_vlm.commands.build import build_model, set_trainable
from age_vlm.commands.planning.fake_step import GRADIENTS, OPTIMIZER, PARAMETERS
from age_vlm.commands.planning.plan import COMMUNICATION, OVERHEAD, Hardware, communication_bytes, plan
from age_vlm.commands.recipe import DataRecipe, ModelRecipe
from age_vlm.commands.sources import load_source
from age_vlm.configuration import preset_config
from age_vlm.hub import save_checkpoint
from age_vlm.modeling_agevlm import AgeVlmForConditionalGeneration
from age_vlm.training.components import count_parameters


LENGTH = 32
LORA = {"language_model": "lora", "lora": {"rank": 4}, "vision": "frozen"}


@pytest.fixture(scope="module")
def whole(make_recipe):
    return plan(make_recipe({"gradient_accumulation": 4}), Hardware(devices=4, price=3.0), length=LENGTH)


@pytest.mark.parametrize("training", [{}, LORA, {"language_model": "frozen", "vision": "frozen"}])
def test_parameters_and_their_bytes_are_those_of_the_model(make_recipe, training):
    recipe = make_recipe(training)
    result = plan(recipe, length=LENGTH)
    set_seed(0)
    model = AgeVlmForConditionalGeneration(preset_config("age-vlm-tiny"))
    set_trainable(model, recipe.training)
    assert result.parameters == count_parameters(model)
    assert result.trainable == count_parameters(model, trainable=True)
    assert sum(result.weights.values()) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert result.optimizer == {part: 8 * count for part, count in result.trainable.items()}


def test_weights_of_another_type(make_recipe):
    single, half = (plan(make_recipe(), length=LENGTH, dtype=dtype) for dtype in (None, torch.bfloat16))
    # The gates of two blocks, two each, stay in float32.
    gates = {"cross_attention": 4 * (4 - 2)}
    assert {part: size / 2 + gates.get(part, 0) for part, size in single.weights.items()} == half.weights
    assert half.total < 0.7 * single.total


def test_sharding_divides_what_it_says(make_recipe, whole):
    recipe = make_recipe({"gradient_accumulation": 4})
    state = {
        PARAMETERS: whole.memory[PARAMETERS],
        GRADIENTS: whole.memory[GRADIENTS],
        OPTIMIZER: whole.memory[OPTIMIZER],
    }
    assert whole.memory[COMMUNICATION] == state[GRADIENTS] == sum(whole.gradients.values())
    for sharding, divided in (("zero2", [GRADIENTS, OPTIMIZER]), ("zero3", list(state))):
        result = plan(recipe, Hardware(devices=4, sharding=sharding), length=LENGTH)
        for kind, size in state.items():
            assert result.memory[kind] == (size / 4 if kind in divided else size)
        assert result.total < whole.total


def test_gathered_weights_are_two_layers_and_what_is_in_none(model):
    layers = sorted(sum(p.numel() for p in layer.parameters()) for layer in model.model.language_model.layers)
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    outside = model.num_parameters() - sum(layers) - tower
    two = sum(sorted([*layers, tower])[-2:])
    assert communication_bytes(model, "zero3", "fp32") == 4 * (two + outside)
    assert communication_bytes(model, "zero3", "bf16") == 2 * (two + outside)


def test_tokens_hours_and_cost(make_recipe, whole):
    assert (whole.step_samples, whole.step_tokens) == (2 * 4 * 4, 2 * 4 * 4 * LENGTH)
    assert whole.run_tokens == 10 * whole.step_tokens
    assert whole.run_flops == pytest.approx(10 * 4 * 4 * sum(whole.flops.values()))
    seconds = whole.run_flops / (4 * 312e12 * 0.35)
    assert whole.hours == pytest.approx(seconds / 3600)
    assert whole.cost == pytest.approx(whole.hours * 4 * 3)
    slower = plan(make_recipe({"gradient_accumulation": 4}), Hardware(utilisation=0.175), length=LENGTH)
    assert slower.hours == pytest.approx(2 * whole.hours) and slower.cost is None


def test_overhead_is_on_top(whole):
    assert whole.memory[OVERHEAD] == pytest.approx(0.1 * whole.tensors)
    assert whole.total == pytest.approx(1.1 * whole.tensors)


def test_the_largest_batch_is_that_which_fits(make_recipe):
    start = plan(make_recipe({"batch_size": 4}), length=LENGTH)
    hardware = Hardware(memory=2.5 * start.total)
    largest = plan(make_recipe({"batch_size": 4}), hardware, length=LENGTH).largest_batch
    assert largest > 4
    for size, fits in ((round(0.95 * largest), True), (round(1.05 * largest) + 1, False)):
        assert plan(make_recipe({"batch_size": size}), hardware, length=LENGTH).fits is fits


def test_what_does_not_fit_is_said_with_what_would(make_recipe):
    recipe = make_recipe({"batch_size": 8})
    needed = plan(recipe, Hardware(devices=2), length=LENGTH)
    assert needed.fits and needed.remedies == []
    tight = plan(recipe, Hardware(devices=2, memory=0.8 * needed.total), length=LENGTH)
    assert not tight.fits and 1 <= tight.largest_batch < 8
    assert f"training.batch_size={tight.largest_batch} " in tight.remedies[0]
    assert any("zero3" in remedy for remedy in tight.remedies)
    assert any("gradient_checkpointing=true" in remedy for remedy in tight.remedies)
    none = plan(recipe, Hardware(memory=1e6), length=LENGTH)
    assert none.largest_batch == 0
    assert none.remedies[-1].startswith("all together") and all("too much" in remedy for remedy in none.remedies)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"sharding": "zero1"}, "sharding: got 'zero1', expected one of none, zero2, zero3"),
        ({"devices": 0}, "devices: got 0"),
        ({"memory": 0}, "memory: got 0"),
        ({"utilisation": 35}, "utilisation: got 35"),
        ({"overhead": -1}, "overhead: got -1"),
    ],
)
def test_hardware_refuses(values, words):
    with pytest.raises(ValueError, match=words):
        Hardware(**values)


# age-vlm plan


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages").mkdir()
    training = "training: {batch_size: 2, steps: 5, vision: frozen"
    for name, model, rest in (
        ("one", "preset: age-vlm-tiny, image_size: 32", "}"),
        ("two", "checkpoint: previous", ", language_model: lora}"),
    ):
        text = f"name: {name}\nmodel: {{{model}}}\ndata: {{kind: dataset}}\n{training}{rest}\n"
        (tmp_path / "stages" / f"{name}.yaml").write_text(text)
    return "stages"


def test_a_folder_of_stages_whose_data_are_not_named_yet(capsys, stages, tmp_path):
    arguments = ["plan", stages, "--length", "16", "--devices", "2", "--memory", "24GiB", "--json", "plan.json"]
    assert main([*arguments, "two:training.batch_size=3"]) == 0
    printed = capsys.readouterr().out
    assert "2 devices of 25.8 GB" in printed and "texts of 16 tokens with one image (given)" in printed
    assert "training.batch" not in printed
    made = json.loads((tmp_path / "plan.json").read_text())
    assert list(made) == ["one", "two"]
    assert made["one"]["parameters"]["vision"] == made["two"]["parameters"]["vision"]
    assert made["one"]["trainable"]["language_model"] > made["two"]["trainable"]["language_model"] > 0
    assert (made["one"]["batch_size"], made["two"]["batch_size"]) == (2, 3)
    assert made["one"]["total"] == pytest.approx(sum(made["one"]["memory"].values()))


def test_what_does_not_fit_is_printed(capsys, stages):
    assert main(["plan", "stages/one.yaml", "--length", "16", "--memory", "1MB"]) == 0
    printed = capsys.readouterr().out
    assert "one does not fit. What changes that:" in printed and "all together" in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.yaml"], "recipe: 'none.yaml' is not a file"),
        (["stages/one.yaml", "training.batch_siz=1"], "training.batch_siz: unknown key"),
        (["stages/two.yaml"], "model.checkpoint: got 'previous', expected a folder or Hub id, a preset"),
        (
            ["stages/one.yaml", "model.checkpoint=nowhere"],
            "model.checkpoint: 'nowhere' could not be read as an AGE-VLM",
        ),
        (["stages", "alignment.layers=[9]"], "one: alignment.layers: got 9"),
        (["stages/one.yaml", "--memory", "much"], "memory: got 'much', expected a size such as 80GB or 24GiB"),
        (["stages/one.yaml", "--length", "0"], "length: got 0, expected at least 2"),
        (["stages/one.yaml", "--json", "no/plan.json"], "--json: 'no/plan.json' is not in a folder"),
    ],
)
def test_plan_refuses(capsys, stages, arguments, words):
    assert main(["plan", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("age-vlm: ")]) == 1
    assert words in lines[-1]


def test_a_saved_checkpoint_is_read_without_its_weights(make_recipe, tmp_path):
    source = load_source(DataRecipe(train=1, validation=1, test=1), 0)
    model, processor = build_model(ModelRecipe(), source)
    folder = save_checkpoint(model, processor, tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    recipe = dataclasses.replace(make_recipe(), model=ModelRecipe(checkpoint=str(folder)))
    result = plan(recipe, length=LENGTH)
    assert result.parameters == count_parameters(model)
