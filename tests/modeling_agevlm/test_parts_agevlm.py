"""Checkpoints that hold only what training changed: they load as the whole ones do, and say what they lack."""

import json
import logging
import shutil

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from age_vlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from age_vlm.hub import load_checkpoint, save_checkpoint


def files(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@torch.no_grad()
def test_only_what_was_trained_is_written_and_all_of_it_is_loaded(built, folders, inputs, tmp_path, caplog):
    model, processor = built
    expected = model(**inputs).logits
    save_checkpoint(model, processor, tmp_path / "new", parts="new")
    model.save_pretrained(tmp_path / "all")
    names = files(tmp_path / "new")
    assert names and all("cross_attention" in name or "multi_modal_projector" in name for name in names)
    assert names < files(tmp_path / "all")
    assert not model.config.components["vision"].get("left_out"), "the model itself holds everything"
    with caplog.at_level(logging.WARNING):
        for load in (AgeVlmForConditionalGeneration, AutoModelForImageTextToText):
            loaded = load.from_pretrained(tmp_path / "new", parts=folders)
            assert torch.equal(loaded(**inputs).logits, expected)
        base = AutoModel.from_pretrained(tmp_path / "new", parts=folders)
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    assert not caplog.records
    again, _ = load_checkpoint(tmp_path / "new", parts=folders)
    # What was put together can be saved whole, or leave out the same again.
    save_checkpoint(again, processor, tmp_path / "whole")
    assert files(tmp_path / "whole") == files(tmp_path / "all")
    save_checkpoint(again, processor, tmp_path / "again", parts="new")
    assert files(tmp_path / "again") == names
    assert torch.equal(AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole")(**inputs).logits, expected)
    for file in (tmp_path / "new").iterdir():
        assert str(folders["text"]).encode() not in file.read_bytes(), f"{file.name} names a path of this machine"


def test_a_pipeline_takes_parts(built, folders, tmp_path, picture):
    model, processor = built
    save_checkpoint(model, processor, tmp_path / "new", parts="new")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]
    said = []
    for name, options in ((tmp_path / "new", {"model_kwargs": {"parts": folders}}), (None, {})):
        ask = pipeline("image-text-to-text", model=str(name) if name else model, processor=processor, **options)
        said.append(ask([chat], max_new_tokens=5, do_sample=False)[0][0]["generated_text"][-1]["content"])
    assert said[0] == said[1]


def test_remote_code_puts_them_together(built, check_remotely):
    check_remotely(*built)


@pytest.mark.parametrize("component", ["vision", "language_model"])
def test_what_training_changed_is_written(built, folders, inputs, tmp_path, component):
    model, processor = built
    parameter = (
        "model.vision_tower.timm_model.conv_stem.weight"
        if component == "vision"
        else "model.language_model.norm.weight"
    )
    with torch.no_grad():
        model.get_parameter(parameter).flatten()[0] += 0.01
    save_checkpoint(model, processor, tmp_path / "new", parts="new")
    assert parameter in files(tmp_path / "new")
    other = {"vision": "text", "language_model": "vision"}[component]
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "new", parts={other: folders[other]})
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_new_image_token_is_made_again(folders, tmp_path, inputs):
    other = tmp_path / "text"
    shutil.copytree(folders["text"], other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|reserved_special_token_0|>", "<|other|>"))
    config = json.loads((other / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**config, "vocab_size": 263})).save_pretrained(other)
    parts = {"text": other, "vision": folders["vision"]}
    model = AgeVlmForConditionalGeneration.from_backbones(**parts)
    model.save_pretrained(tmp_path / "new", parts="new")
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "new", parts=parts)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert "model.language_model.embed_tokens.weight" not in files(tmp_path / "new")
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] += 1
    model.save_pretrained(tmp_path / "trained", parts="new")
    assert "model.language_model.embed_tokens.weight" in files(tmp_path / "trained")


def test_another_dtype_is_no_other_component(built, folders, tmp_path, caplog):
    built[0].save_pretrained(tmp_path / "new", parts="new")
    with caplog.at_level(logging.WARNING):
        loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "new", parts=folders, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and not caplog.records
    expected = built[0].model.language_model.norm.weight.bfloat16()
    assert torch.equal(loaded.model.language_model.norm.weight, expected)


def test_other_weights_are_one_warning(built, folders, tmp_path, caplog):
    built[0].save_pretrained(tmp_path / "new", parts="new")
    other = LlamaForCausalLM(LlamaForCausalLM.from_pretrained(folders["text"]).config)
    other.save_pretrained(tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "new", parts={**folders, "text": tmp_path / "other"})
    assert [record.message for record in caplog.records] == [
        f"parts: the weights of the language model in '{tmp_path / 'other'}' are not those that this checkpoint was trained "
        "with; its answers may differ."
    ]


def test_what_cannot_be_put_together_is_one_sentence(built, folders, tmp_path):
    built[0].save_pretrained(tmp_path / "new", parts="new")
    wide = LlamaConfig.from_pretrained(folders["text"], hidden_size=64)
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    cases = [
        ({}, r"^parts: the checkpoint does not hold its language model, expected parts=\{'text': FOLDER\}, the folder that "
             r"it was built from \(python make_text.py FOLDER\)\.$"),
        ({"text": folders["text"]}, r"^parts: the checkpoint does not hold its vision encoder, expected parts=\{'vision': FOLDER\}"),
        ({**folders, "text": tmp_path / "none"}, r"^text: '.*none' could not be loaded; expected a folder"),
        ({**folders, "text": tmp_path / "wide"}, r"^text: 'embed_tokens.weight' has shape \(300, 64\), expected \(300, 32\)"),
        ({**folders, "text": folders["vision"]}, r"^text: '.*vision' is a 'timm_wrapper' model, expected a Llama\.$"),
        ({**folders, "language": "x"}, r"^parts: got 'language', expected some of text, vision\.$"),
    ]  # fmt: skip
    for parts, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "new", parts=parts)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^parts: got 'some', expected 'all' or 'new'\.$"):
        built[0].save_pretrained(tmp_path / "some", parts="some")


def test_components_of_the_hub_are_named_by_id_and_revision(folders):
    model = AgeVlmForConditionalGeneration.from_backbones(**folders)
    entry = AgeVlmConfig.from_dict(model.config.to_dict()).components["language_model"]
    assert entry["source"] == "python make_text.py FOLDER" and "name" not in entry
    assert len(entry["sha256"]) == 64 and entry["dtype"] == "float32" and entry["vocab_size"] == 300


def test_a_preset_is_always_saved_whole(make_model, tmp_path):
    make_model().save_pretrained(tmp_path, parts="new")
    assert len(files(tmp_path)) > 20
