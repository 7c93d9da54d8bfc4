import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig

from age_vlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from age_vlm.configuration.configuration_agevlm import logger


def test_round_trip_through_a_folder_keeps_every_field(make_config, tmp_path):
    config = make_config(image_visibility="all_previous", cross_attention_intermediate_size=40)
    config.save_pretrained(tmp_path)
    for loaded in (AgeVlmConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, AgeVlmConfig)
        loaded_dict, saved_dict = loaded.to_dict(), config.to_dict()
        assert all(part.pop("_name_or_path", "") is not None for part in (loaded_dict, saved_dict))
        assert loaded_dict == saved_dict


def test_saved_file_names_its_own_code(make_config, tmp_path):
    make_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    for target in saved["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}" in (tmp_path / f"{module}.py").read_text()


def test_defaults_follow_the_language_model():
    config = AgeVlmConfig()
    assert config.text_config.model_type == "llama"
    assert config.cross_attention_layers == [2, 6, 10, 14]
    assert config.cross_attention_intermediate_size == config.text_config.intermediate_size
    for layers, crossed in ((1, [0]), (2, [1]), (3, [2]), (7, [2, 6])):
        config = AgeVlmConfig(text_config=LlamaConfig(num_hidden_layers=layers), image_token_id=5)
        assert config.cross_attention_layers == crossed


def test_the_default_language_model_is_llama_3_2_1b_as_published():
    """By its `config.json`, and by the order of Llama 3's special tokens, which come after 128,000 others."""
    text = AgeVlmConfig().text_config
    shape = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    others = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    for name, value in {**shape, **heads, **others}.items():
        assert getattr(text, name) == value, name
    rotary = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    rotary |= {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert text.rope_parameters == rotary
    special = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    special += [
        "finetune_right_pad_id",
        "reserved_special_token_2",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
    ]
    ids = {name: 128000 + place for place, name in enumerate(special)}
    assert text.bos_token_id == ids["begin_of_text"] and text.pad_token_id == ids["finetune_right_pad_id"]
    assert text.eos_token_id == [ids["end_of_text"], ids["eom_id"], ids["eot_id"]]
    assert AgeVlmConfig().image_token_id == ids["reserved_special_token_0"]


def test_sub_configurations_given_as_objects_are_taken(make_config):
    parts = make_config()
    config = make_config(text=None, text_config=parts.text_config, vision_config=parts.vision_config)
    assert config.text_config is parts.text_config and config.vision_config is parts.vision_config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cross_attention_layers": [4]}, ["cross_attention_layers", "4", "0 to 3"]),
        ({"cross_attention_layers": [-1]}, ["cross_attention_layers", "-1", "0 to 3"]),
        ({"cross_attention_layers": []}, ["cross_attention_layers", "empty"]),
        ({"cross_attention_layers": [1, 1]}, ["cross_attention_layers", "[1, 1]", "repeats"]),
        ({"cross_attention_layers": "all"}, ["cross_attention_layers", "all"]),
        ({"image_visibility": "first"}, ["image_visibility", "first", "latest", "all_previous"]),
        ({"image_token_id": 300}, ["image_token_id", "300", "299"]),
        ({"image_token_id": "five"}, ["image_token_id", "five", "int"]),
        ({"cross_attention_gate_init": "open"}, ["cross_attention_gate_init", "open", "float"]),
        ({"cross_attention_intermediate_size": 0}, ["cross_attention_intermediate_size", "0", "positive"]),
        ({"text": {"hidden_size": 34}}, ["hidden", "34", "multiple"]),
        (
            {"text": {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 3}},
            ["hidden_size", "18", "multiple of 4"],
        ),
        ({"text": {"num_key_value_heads": 3}}, ["num_attention_heads", "4", "3"]),
        ({"text": {"model_type": "gpt2"}}, ["text_config", "gpt2", "llama"]),
        ({"vision_config": {"model_type": "no_such_model"}}, ["vision_config", "no_such_model"]),
        ({"vision_config": 5}, ["vision_config", "5"]),
    ],
)
def test_what_cannot_be_built_is_one_sentence(make_config, settings, words):
    with pytest.raises(ValueError) as error:
        make_config(**settings)
    message = str(error.value)
    assert "\n" not in message and "Error" not in message
    for word in words:
        assert word in message


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger.name]


def test_misspelt_keys_in_a_file_warn_and_name_the_nearest(make_config, warnings, tmp_path):
    make_config().save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tmp_path)
    assert not warnings()
    saved = json.loads((tmp_path / "config.json").read_text())
    saved |= {"cross_atention_layers": [0], "image_token": 2}
    saved["text_config"]["num_hidden_layer"] = 2
    saved["vision_config"]["model_arg"] = {}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = AutoConfig.from_pretrained(tmp_path)
    assert sorted(set(warnings())) == [
        "cross_atention_layers: unknown option of AgeVlmConfig (nearest: 'cross_attention_layers').",
        "image_token: unknown option of AgeVlmConfig (nearest: 'image_token_id').",
        "text_config.num_hidden_layer: unknown option of LlamaConfig (nearest: 'num_hidden_layers').",
        "vision_config.model_arg: unknown option of TimmWrapperConfig (nearest: 'model_args').",
    ]
    assert config.cross_attention_layers == [1, 3] and config.text_config.num_hidden_layers == 4


@pytest.mark.parametrize(
    "model_type", ["clip_vision_model", "convnext", "dinov2", "siglip_vision_model", "swin", "vit"]
)
def test_what_parts_save_of_themselves_does_not_warn(make_config, warnings, model_type):
    vision_config = CONFIG_MAPPING[model_type]().to_dict()
    text_config = {**make_config().text_config.to_dict(), "rope_theta": 1e4, "of_the_model_s_own": 5}
    make_config(text=text_config, vision_config=vision_config)
    assert not warnings()


def test_building_does_not_change_the_configuration(make_config):
    config = make_config()
    before = config.to_dict()
    AgeVlmForConditionalGeneration(config)
    assert config.to_dict() == before


def test_dtype_is_kept(make_config, tmp_path):
    AgeVlmForConditionalGeneration(make_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    assert AgeVlmConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
