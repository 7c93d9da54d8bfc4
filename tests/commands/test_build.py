import pytest
import torch
from transformers import LlamaForCausalLM

from age_vlm.commands.build import build_model, set_trainable
from age_vlm.commands.recipe import LoraRecipe, ModelRecipe, TrainingRecipe
from age_vlm.errors import UserError
from age_vlm.modeling_agevlm.components_agevlm import COMPONENTS, component_of


pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_parameter_belongs_to_one_part(make_model):
    model, trained = make_model(), {}
    for part in COMPONENTS:
        modes = {other: "full" if other == part else "frozen" for other in COMPONENTS}
        assert set_trainable(model, TrainingRecipe(**modes)) is None
        trained[part] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained[part]
    everything = [name for names in trained.values() for name in names]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())
    llama = LlamaForCausalLM(model.config.text_config)
    renamed = {name.replace("model.language_model.", "model.") for name in trained["language_model"]}
    assert renamed == {name for name, _ in llama.named_parameters()}


def test_a_preset_takes_the_tokenizer_of_its_data(source):
    model, processor = build_model(ModelRecipe(), source)
    config = model.config
    assert config.text_config.vocab_size == len(source.tokenizer) == model.get_input_embeddings().num_embeddings
    assert config.image_token_id == processor.image_token_id
    assert config.text_config.eos_token_id == source.tokenizer.eos_token_id
    for settings, words in (
        ({"image_token_id": 3}, "^model.config.image_token_id: got one"),
        ({"cross_attention_layer": [0]}, "cross_attention_layer: unknown option"),
        ({"cross_attention_layers": [9]}, "cross_attention_layers: got 9"),
    ):
        with pytest.raises(ValueError, match=words):
            build_model(ModelRecipe(config=settings), source)


def test_a_recipe_goes_on_from_a_checkpoint(source, tmp_path):
    model, processor = build_model(ModelRecipe(), source)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    again, _ = build_model(ModelRecipe(checkpoint=str(tmp_path / "checkpoint")), source)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for checkpoint in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="^model.checkpoint: '.*' could not be loaded as an AGE-VLM") as caught:
            build_model(ModelRecipe(checkpoint=str(checkpoint)), source)
        assert "\n" not in str(caught.value)


def test_what_is_frozen_full_or_adapted(make_model):
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    adapted = set_trainable(
        model, TrainingRecipe(vision="frozen", cross_attention="lora", language_model="lora", lora=LoraRecipe(rank=2))
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(component_of(name) == "vision" for name in trained)
    projector = {name for name in names if component_of(name) == "projector"}
    assert projector <= trained
    rest = trained - projector
    gates = {name for name in rest if ".modules_to_save." in name}
    assert len(gates) == 4 and all("_gate." in name for name in gates)
    assert {component_of(name) for name in rest - gates} == {"cross_attention", "language_model"}
    assert all(".lora_" in name for name in rest - gates)
    merged = adapted.merge_and_unload()
    assert merged is model and [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("cross_attention", ["full", "lora"])
def test_late_layers_of_the_language_model_alone(make_model, mode, cross_attention):
    model = make_model()
    last = model.config.text_config.num_hidden_layers - 1
    recipe = {"cross_attention": cross_attention, "language_model": mode, "lora": LoraRecipe(rank=2)}
    set_trainable(model, TrainingRecipe(**recipe, language_model_from=last))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    own = [name for name in trained if component_of(name) == "language_model"]
    assert own and all(f"language_model.layers.{last}." in name for name in own)
    assert all((".lora_" in name) == (mode == "lora") for name in own)
    others = {name.split(".layers.")[1].split(".")[0] for name in trained if component_of(name) == "cross_attention"}
    assert others == {str(index) for index in model.config.cross_attention_layers}
    with pytest.raises(
        UserError, match=f"^training.language_model_from: got {last + 1}, expected less than {last + 1}"
    ):
        set_trainable(make_model(), TrainingRecipe(language_model_from=last + 1))


def test_the_recipe_before_is_known_in_a_pipeline_only(source, tmp_path):
    recipe = ModelRecipe(checkpoint="previous")
    with pytest.raises(ValueError, match="^model.checkpoint: got 'previous', expected a folder or Hub id"):
        build_model(recipe, source)
    model, processor = build_model(ModelRecipe(), source)
    model.save_pretrained(tmp_path / "before")
    processor.save_pretrained(tmp_path / "before")
    again, _ = build_model(recipe, source, tmp_path / "before")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_backbones_come_in_the_type_that_is_asked_for(backbones, source):
    names = {"text": str(backbones / "text"), "vision": str(backbones / "vision"), "image_size": 64}
    options = {**names, "config": {"cross_attention_layers": [1]}}
    assert build_model(ModelRecipe(**options, dtype="bfloat16"), source)[0].dtype == torch.bfloat16
    assert build_model(ModelRecipe(**options), source)[0].dtype == torch.float32
