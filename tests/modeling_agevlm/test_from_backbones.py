"""`from_backbones` on folders that hold a random Llama and a random vision encoder."""

import json
import logging
import shutil

import pytest
import timm
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from age_vlm import AgeVlmForConditionalGeneration, AgeVlmProcessor


TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TRANSFORMER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=request.param)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def timm_wrapper(folder):
    config = TimmWrapperConfig.from_dict({"architecture": "convnext_atto", "num_classes": 0, "model_args": CONVNEXT})
    TimmWrapperModel(config).save_pretrained(folder)


def timm_hub_format(folder):
    model = timm.create_model("convnext_atto", num_classes=10, **CONVNEXT)
    timm.models.save_for_hf(model, folder, model_args=CONVNEXT)


def timm_transformer(folder):
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}
    config = TimmWrapperConfig.from_dict(
        {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments}
    )
    TimmWrapperModel(config).save_pretrained(folder)


def vit(folder):
    ViTModel(ViTConfig(**TRANSFORMER, image_size=64, patch_size=16)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)


def siglip_vision(folder):
    SiglipVisionModel(SiglipVisionConfig(**TRANSFORMER, image_size=64, patch_size=16)).save_pretrained(folder)


def siglip(folder):
    config = SiglipConfig(
        text_config={**TRANSFORMER, "vocab_size": 99, "projection_size": 32},
        vision_config={**TRANSFORMER, "image_size": 64, "patch_size": 16},
    )
    SiglipModel(config).save_pretrained(folder)


def convnext(folder):
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])).save_pretrained(folder)


def source_weights(folder):
    if "model_type" not in json.loads((folder / "config.json").read_text()):
        weights = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).state_dict()
        return {f"timm_model.{name}": value for name, value in weights.items()}
    source = AutoModel.from_pretrained(folder)
    return getattr(source, "vision_model", source).state_dict()


@pytest.fixture(params=[timm_wrapper, timm_hub_format, timm_transformer, vit, siglip_vision, siglip, convnext])
def encoder(request, tmp_path):
    torch.manual_seed(2)
    request.param(tmp_path / "vision")
    return tmp_path / "vision"


@torch.no_grad()
def test_text_is_the_llama_s_exactly_and_vision_weights_are_unchanged(llama, encoder, tmp_path):
    model = AgeVlmForConditionalGeneration.from_backbones(text=llama, vision=encoder)
    reference = LlamaForCausalLM.from_pretrained(llama).eval()
    ids = torch.randint(7, 300, (2, 9))
    assert torch.equal(model(ids).logits, reference(ids).logits)

    pixels = torch.randn(2, 3, 64, 64)
    image_ids = ids.clone()
    image_ids[:, 2] = model.config.image_token_id
    assert torch.equal(model(image_ids, pixels).logits, reference(image_ids).logits), "gates start closed"

    source = source_weights(encoder)
    tower = model.model.vision_tower.state_dict()
    assert tower and all(torch.equal(tower[name], source[name]) for name in tower)

    features = model.get_image_features(pixels).pooler_output
    assert features.shape[0] == 2 and features.shape[2] == 32
    assert features.shape[1] in ((64 // 32) ** 2, (64 // 16) ** 2)

    # The Llama's own end of a text, and that of a turn, which the chat template has and a base model's configuration has not.
    assert reference.generation_config.eos_token_id == 1
    assert model.generation_config.eos_token_id == [1, 5]
    assert not model.training

    model.save_pretrained(tmp_path / "saved")
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "saved")
    loaded.model.language_model.layers[2].cross_attention.attn_gate.weight.fill_(1)
    model.model.language_model.layers[2].cross_attention.attn_gate.weight.fill_(1)
    assert torch.equal(loaded(image_ids, pixels).logits, model(image_ids, pixels).logits)
    assert not torch.equal(loaded(image_ids, pixels).logits, reference(image_ids).logits)


def test_every_parameter_of_any_encoder_trains(llama, encoder):
    model = AgeVlmForConditionalGeneration.from_backbones(llama, encoder, cross_attention_gate_init=0.5).train()
    ids = torch.tensor([[9, 2, 10, 11]])
    model(ids, torch.randn(1, 3, 64, 64), labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("size", [(64, 96), (32, 64)])
@torch.no_grad()
def test_grids_follow_images_that_are_not_square(llama, tmp_path, size):
    for index, (save, stride) in enumerate(((timm_wrapper, 32), (convnext, 32))):
        save(tmp_path / str(index))
        model = AgeVlmForConditionalGeneration.from_backbones(llama, tmp_path / str(index))
        features = model.get_image_features(torch.randn(1, 3, *size)).pooler_output
        assert features.shape[1] == size[0] // stride * (size[1] // stride)


def test_half_precision_is_kept(llama, tmp_path):
    timm_wrapper(tmp_path)
    model = AgeVlmForConditionalGeneration.from_backbones(llama, tmp_path, dtype=torch.bfloat16)
    names = {name: p.dtype for name, p in model.named_parameters()}
    gates = {name for name in names if name.split(".")[-2] in ("attn_gate", "mlp_gate")}
    assert gates and {names[name] for name in gates} == {torch.float32}
    assert {dtype for name, dtype in names.items() if name not in gates} == {torch.bfloat16}
    reference = LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    ids = torch.randint(7, 300, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_options_reach_the_configuration(llama, tmp_path):
    timm_wrapper(tmp_path)
    model = AgeVlmForConditionalGeneration.from_backbones(
        llama, tmp_path, image_token_id=7, cross_attention_layers=[0], image_visibility="all_previous"
    )
    assert (model.config.image_token_id, model.config.cross_attention_layers) == (7, [0])
    assert model.config.image_visibility == "all_previous"
    with pytest.raises(ValueError, match=r"cross_attention_layer: .*'cross_attention_layers'"):
        AgeVlmForConditionalGeneration.from_backbones(llama, tmp_path, cross_attention_layer=[0])


def test_processor_goes_with_the_model(llama, encoder):
    model = AgeVlmForConditionalGeneration.from_backbones(llama, encoder)
    if not (encoder / "preprocessor_config.json").exists() and "timm" not in (encoder / "config.json").read_text():
        (encoder / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}})
        )
    processor = AgeVlmProcessor.from_backbones(llama, encoder, image_size=64)
    assert processor.image_token_id == model.config.image_token_id
    batch = processor(images=torch.zeros(3, 20, 30), text="<|reserved_special_token_0|>What?", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    model(**batch)
    assert processor.image_geometry(20, 30).source_box == (0, 0, 30, 20), "the whole image is seen"


def test_processor_takes_the_encoder_s_own_statistics(llama, tmp_path):
    vit(tmp_path / "vit")
    processor = AgeVlmProcessor.from_backbones(llama, tmp_path / "vit")
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.image_geometry(20, 30).size == (64, 64)
    timm_hub_format(tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    processor = AgeVlmProcessor.from_backbones(llama, tmp_path / "timm")
    assert list(processor.image_processor.image_mean) == list(config["mean"])
    assert processor.image_geometry(20, 30).size == tuple(config["input_size"][1:])


def test_of_several_reserved_tokens_model_and_processor_take_the_first(llama, tmp_path):
    timm_wrapper(tmp_path / "vision")
    shutil.copytree(llama, tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_1|>"]})
    tokenizer.save_pretrained(tmp_path / "text")
    parts = {"text": tmp_path / "text", "vision": tmp_path / "vision"}
    model, processor = (each.from_backbones(**parts) for each in (AgeVlmForConditionalGeneration, AgeVlmProcessor))
    assert processor.image_token == "<|reserved_special_token_0|>"
    assert processor.image_token_id == model.config.image_token_id == 2


def without_tokenizer(llama, folder):
    folder.mkdir()
    for saved in set(llama.iterdir()) - set(llama.glob("*token*")):
        shutil.copy(saved, folder)
    return folder


def test_without_a_tokenizer_the_last_token_stands_for_images(llama, tmp_path, caplog, monkeypatch):
    timm_wrapper(tmp_path / "vision")
    text = without_tokenizer(llama, tmp_path / "text")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = AgeVlmForConditionalGeneration.from_backbones(text, tmp_path / "vision")
    assert model.config.image_token_id == TEXT["vocab_size"] - 1
    assert f"the last token of the vocabulary, {TEXT['vocab_size'] - 1}, stands for images" in caplog.text


@pytest.mark.parametrize("file", ["{}", "{", '{"added_tokens": []}', '{"added_tokens": [], "model": {"type": "BPE"}}'])
@pytest.mark.parametrize("cls", [AgeVlmForConditionalGeneration, AgeVlmProcessor], ids=["model", "processor"])
def test_a_damaged_tokenizer_is_one_sentence(llama, tmp_path, cls, file):
    timm_wrapper(tmp_path / "vision")
    text = without_tokenizer(llama, tmp_path / "text")
    (text / "tokenizer.json").write_text(file)
    with pytest.raises(ValueError, match="^text: '.*' could not be loaded; expected a folder") as caught:
        cls.from_backbones(text, tmp_path / "vision")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ["text", "vision"])
@pytest.mark.parametrize("name", ["no-such-organisation/gated-model", "missing/folder/of/mine", "."])
@pytest.mark.parametrize("made", [AgeVlmForConditionalGeneration, AgeVlmProcessor])
def test_what_cannot_be_read_is_one_sentence_that_says_what_to_do(llama, tmp_path, argument, name, made):
    timm_wrapper(tmp_path / "vision")
    name = str(tmp_path) if name == "." else name
    arguments = {"text": llama, "vision": tmp_path / "vision", argument: name}
    with pytest.raises(ValueError) as error:
        made.from_backbones(**arguments)
    message = str(error.value)
    assert message.startswith(f"{argument}: '{name}'") and "\n" not in message
    # Of a folder that is there, it is none of the Hub's business.
    assert ("hf auth login" in message) == (name != str(tmp_path)) and "folder" in message
    first = str(error.value.__cause__).strip().splitlines()[0].rstrip(" .:")
    assert message.endswith(f": {first}."), "what transformers says first"


def test_another_kind_of_language_model_is_one_sentence(tmp_path):
    timm_wrapper(tmp_path / "vision")
    vit(tmp_path / "text")
    with pytest.raises(ValueError, match="text: .* is a 'vit' model, expected a Llama"):
        AgeVlmForConditionalGeneration.from_backbones(tmp_path / "text", tmp_path / "vision")


@pytest.fixture
def without_reserved(llama, tmp_path):
    """Folders of a language model whose tokenizer has no reserved special tokens, and of a vision encoder."""
    timm_wrapper(tmp_path / "vision")
    shutil.copytree(llama, tmp_path / "text")
    file = tmp_path / "text" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|reserved_special_token_0|>", "<|other|>"))
    config = json.loads((llama / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**config, "vocab_size": 263})).save_pretrained(tmp_path / "text")
    return {"text": tmp_path / "text", "vision": tmp_path / "vision"}


def test_an_image_token_of_the_vocabulary(without_reserved):
    model, processor = (
        made.from_backbones(**without_reserved, image_token="<|other|>")
        for made in (AgeVlmForConditionalGeneration, AgeVlmProcessor)
    )
    assert processor.image_token_id == model.config.image_token_id == 2
    assert model.config.text_config.vocab_size == 263
    for made in (AgeVlmForConditionalGeneration, AgeVlmProcessor):
        with pytest.raises(ValueError, match=r"^image_token: got '<none>', which is not in the tokenizer's vocabulary"):
            made.from_backbones(**without_reserved, image_token="<none>")


@torch.no_grad()
def test_a_new_image_token_changes_no_logit_of_the_others(without_reserved):
    plain = LlamaForCausalLM.from_pretrained(without_reserved["text"]).eval()
    model, processor = (
        made.from_backbones(**without_reserved) for made in (AgeVlmForConditionalGeneration, AgeVlmProcessor)
    )
    assert processor.image_token == "<image>" and processor.image_token_id == model.config.image_token_id == 263
    ids = torch.randint(6, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits
    assert logits.shape[-1] == model.config.text_config.vocab_size == 264
    assert torch.equal(logits[..., :263], plain(input_ids=ids).logits)
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[263], table[:263].mean(0))


def test_a_new_image_token_is_saved_and_loaded(without_reserved, tmp_path):
    model, processor = (
        made.from_backbones(**without_reserved) for made in (AgeVlmForConditionalGeneration, AgeVlmProcessor)
    )
    processor.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    again = AgeVlmProcessor.from_pretrained(tmp_path / "saved")
    assert (again.image_token, again.image_token_id) == ("<image>", 263)
    assert torch.equal(
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "saved").get_input_embeddings().weight,
        model.get_input_embeddings().weight,
    )


@torch.no_grad()
def test_components_may_be_loaded_already(llama, tmp_path):
    timm_wrapper(tmp_path / "vision")
    expected = AgeVlmForConditionalGeneration.from_backbones(llama, tmp_path / "vision")
    text, vision = LlamaForCausalLM.from_pretrained(llama), AutoModel.from_pretrained(tmp_path / "vision")
    kept = {name: value.clone() for name, value in vision.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    processor = AgeVlmProcessor.from_backbones(tokenizer, tmp_path / "vision")
    for options in ({}, {"processor": processor}):
        model = AgeVlmForConditionalGeneration.from_backbones(text, vision, **options)
        assert model.config.image_token_id == expected.config.image_token_id
        assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id
        states = model.state_dict()
        assert all(
            torch.equal(states[name], value)
            for name, value in expected.state_dict().items()
            if ".cross_attention." not in name and "multi_modal_projector" not in name
        )
    assert all(torch.equal(kept[name], value) for name, value in vision.state_dict().items())
    assert AgeVlmForConditionalGeneration.from_backbones(text, vision, dtype="bfloat16").dtype == torch.bfloat16
    assert text.dtype == vision.dtype == torch.float32, "what is given stays as it is"
    with pytest.raises(ValueError, match="^text: '.*' is a 'timm_wrapper' model, expected a Llama"):
        AgeVlmForConditionalGeneration.from_backbones(vision, vision)
    text.lm_head.weight = torch.nn.Parameter(text.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="^text: '.*' is quantised, expected floating point weights"):
        AgeVlmForConditionalGeneration.from_backbones(text, vision)


@pytest.mark.parametrize("eos, expected", [(None, [5]), (1, [1, 5]), (5, 5), ([1, 5], [1, 5])])
def test_an_answer_ends_where_the_template_ends_it(llama, tmp_path, eos, expected):
    timm_wrapper(tmp_path / "vision")
    shutil.copytree(llama, tmp_path / "text")
    LlamaForCausalLM(LlamaConfig(**{**TEXT, "eos_token_id": eos})).save_pretrained(tmp_path / "text")
    parts = {"text": tmp_path / "text", "vision": tmp_path / "vision"}
    model, processor = (each.from_backbones(**parts) for each in (AgeVlmForConditionalGeneration, AgeVlmProcessor))
    assert model.generation_config.eos_token_id == expected
    chat = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]
    assert processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0][-1] == 5
