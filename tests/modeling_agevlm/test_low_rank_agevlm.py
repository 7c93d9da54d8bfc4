"""What LoRA changed in a language model is saved as its factors, and put on the weights that loading fetches."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageTextToText

from age_vlm import AgeVlmForConditionalGeneration
from age_vlm.commands.fit import merged
from age_vlm.hub import save_checkpoint
from age_vlm.training.lora import lora_config


def _tuned(model, seed=0, target="both", **options):
    """The model after a training by LoRA, whose language model's factors are kept."""
    adapted = peft.get_peft_model(model, lora_config(target, rank=3, **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return merged(adapted, keep_factors=True).eval()


def _names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@torch.no_grad()
def test_factors_are_written_and_the_model_is_the_same(built, folders, inputs, tmp_path, caplog):
    model, processor = built
    before = model(**inputs).logits
    model = _tuned(model, layers=[2, 3])
    expected = model(**inputs).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    save_checkpoint(model, processor, tmp_path / "new", parts="new")
    names = _names(tmp_path / "new")
    assert not any(".self_attn." in name or "embed_tokens" in name for name in names)
    assert sum("low_rank" in name for name in names) == 2 * 2 * 7  # two factors, two layers, seven matrices
    for load in (AgeVlmForConditionalGeneration, AutoModelForImageTextToText):
        loaded = load.from_pretrained(tmp_path / "new", parts=folders)
        assert torch.equal(loaded(**inputs).logits, expected)
        assert not any("low_rank" in name for name in loaded.state_dict())
    base = AutoModel.from_pretrained(tmp_path / "new", parts=folders)
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    assert not caplog.records
    # What was put together is saved alike, or whole.
    save_checkpoint(loaded, processor, tmp_path / "again", parts="new")
    assert _names(tmp_path / "again") == names
    save_checkpoint(loaded, processor, tmp_path / "whole")
    assert "low_rank" not in (tmp_path / "whole" / "config.json").read_text()
    whole = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole(**inputs).logits, expected)


@torch.no_grad()
def test_a_second_stage_adds_its_own(built, folders, inputs, tmp_path):
    model, processor = built
    save_checkpoint(_tuned(model, layers=[2, 3]), processor, tmp_path / "first", parts="new")
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "first", parts=folders)
    second = _tuned(loaded, seed=1, layers=[1, 2])
    save_checkpoint(second, processor, tmp_path / "second", parts="new")
    ranks = json.loads((tmp_path / "second" / "config.json").read_text())["components"]["language_model"]["low_rank"]
    assert ranks["layers.2.mlp.up_proj.weight"] == 6 and ranks["layers.1.mlp.up_proj.weight"] == 3
    again = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "second", parts=folders)
    torch.testing.assert_close(again(**inputs).logits, second(**inputs).logits)


@pytest.mark.parametrize("how", ["dora", "more"])
@torch.no_grad()
def test_what_is_no_product_is_written_whole(built, folders, inputs, tmp_path, how):
    model, processor = built
    model = _tuned(model, use_dora=how == "dora")
    if how == "more":
        model.model.language_model.norm.weight[0] += 0.1
    save_checkpoint(model, processor, tmp_path / "new", parts="new")
    assert "model.language_model.norm.weight" in _names(tmp_path / "new")
    assert not any("low_rank" in name for name in _names(tmp_path / "new"))
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "new", parts={"vision": folders["vision"]})
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_remote_code_adds_them(built, check_remotely):
    model, processor = built
    check_remotely(_tuned(model), processor)


@pytest.mark.parametrize("name", ["layers.9.mlp.up_proj.weight", "norm.weight"])
def test_a_weight_that_is_not_there_is_one_sentence(built, folders, tmp_path, name):
    model, processor = built
    save_checkpoint(_tuned(model), processor, tmp_path / "new", parts="new")
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    settings["components"]["language_model"]["low_rank"] = {name: 3}
    (tmp_path / "new" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"^components.language_model.low_rank: got '{name}', expected a matrix"):
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "new", parts=folders)


def test_factors_that_are_missing_are_an_error(built, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    model, processor = built
    save_checkpoint(_tuned(model), processor, tmp_path / "new", parts="new")
    state = load_file(tmp_path / "new" / "model.safetensors")
    missing = next(name for name in state if "low_rank" in name)
    del state[missing]
    save_file(state, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of AgeVlmForConditionalGeneration"):
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "new", parts=folders)
