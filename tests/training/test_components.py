import copy

import pytest
from peft import get_peft_model

from age_vlm.modeling_agevlm.components_agevlm import COMPONENTS, component_of
from age_vlm.training.components import count_parameters
from age_vlm.training.lora import lora_config


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.vision_tower.timm_model.stem_0.weight", "vision"),
        ("vision_tower.encoder.layers.0.cross_attention.weight", "vision"),
        ("model.multi_modal_projector.linear.bias", "projector"),
        ("multi_modal_projector.modules_to_save.default.linear.bias", "projector"),
        ("model.language_model.layers.1.cross_attention.attn.q_proj.weight", "cross_attention"),
        ("model.language_model.layers.1.self_attn.q_proj.weight", "language_model"),
        ("model.language_model.embed_tokens.weight", "language_model"),
        ("lm_head.weight", "language_model"),
        ("base_model.model.model.layers.1.cross_attention.attn_gate.modules_to_save.default.weight", "cross_attention"),
        ("module.base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight", "language_model"),
    ],
)
def test_a_name_says_its_part(name, part):
    assert component_of(name) == part


def test_counts_are_of_every_parameter_once(make_model):
    model = make_model()
    counts = count_parameters(model)
    assert list(counts) == list(COMPONENTS) and sum(counts.values()) == model.num_parameters()
    model.model.vision_tower.requires_grad_(False)
    assert count_parameters(model, trainable=True) == {**counts, "vision": 0}


def test_peft_changes_no_part(make_model):
    model = make_model()
    counts = count_parameters(model)
    adapted = get_peft_model(copy.deepcopy(model), lora_config("both", rank=2, gates=False))
    trainable = count_parameters(adapted, trainable=True)
    assert trainable["vision"] == trainable["projector"] == 0
    assert min(trainable["cross_attention"], trainable["language_model"]) > 0
    assert count_parameters(adapted) == {part: counts[part] + trainable[part] for part in COMPONENTS}
