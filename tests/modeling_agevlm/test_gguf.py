"""A language model from a GGUF file, as llama.cpp and its kin publish them."""

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM, TimmWrapperConfig, TimmWrapperModel

from age_vlm import AgeVlmForConditionalGeneration, AgeVlmProcessor


gguf = pytest.importorskip("gguf")
WIDTH, HEADS, LAYERS, MLP = 64, 4, 2, 96
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


def write_gguf(path, architecture="llama", quantised=True):
    """A model of that architecture with random weights of 8 bits, its tokenizer and its chat template."""
    tokens = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["ab", *(f"<unused{number}>" for number in range(1, 320 - len(tokens)))]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0

    def add(name, *shape):
        value = rng.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 2 and quantised:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value + (len(shape) == 1))

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for number in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{number}.{name}.weight", WIDTH, WIDTH)
        for name, shape in (("gate", (MLP, WIDTH)), ("up", (MLP, WIDTH)), ("down", (WIDTH, MLP))):
            add(f"blk.{number}.ffn_{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{number}.{name}.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def vision(tmp_path):
    config = TimmWrapperConfig.from_dict({"architecture": "test_efficientnet", "num_classes": 0})
    TimmWrapperModel(config).save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


@torch.no_grad()
def test_a_gguf_is_read_answers_as_its_llama_does_and_is_saved(tmp_path, vision):
    text = tmp_path / "text"
    text.mkdir()
    write_gguf(text / "small.gguf")
    files = {"text": text, "vision": vision, "gguf_file": "small.gguf"}
    processor = AgeVlmProcessor.from_backbones(**files)
    model = AgeVlmForConditionalGeneration.from_backbones(**files, processor=processor)
    assert processor.image_token == "<image>" and processor.chat_template.endswith(TEMPLATE)
    assert model.generation_config.eos_token_id == 1, "the end of a turn in the template"
    plain = LlamaForCausalLM.from_pretrained(text, gguf_file="small.gguf")
    ids = processor.tokenizer("hello", return_tensors="pt")["input_ids"]
    assert torch.equal(model(input_ids=ids).logits[..., :320], plain.eval()(input_ids=ids).logits)
    assert not hasattr(model.config.text_config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    again = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    # Without it, from the same file.
    model.save_pretrained(tmp_path / "new", parts="new")
    assert model.config.components["language_model"]["gguf_file"] == "small.gguf"


def test_a_gguf_that_is_no_llama_is_one_sentence(tmp_path, vision):
    text = tmp_path / "text"
    text.mkdir()
    write_gguf(text / "other.gguf", "qwen2")
    with pytest.raises(ValueError, match="^text: '.*text' is a 'qwen2' model, expected a Llama") as error:
        AgeVlmForConditionalGeneration.from_backbones(text, vision, gguf_file="other.gguf")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^text: '.*text' could not be loaded; expected a folder") as error:
        AgeVlmForConditionalGeneration.from_backbones(text, vision, gguf_file="none.gguf")
    (text / "broken.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(ValueError, match="^text: '.*text' could not be loaded; expected a folder") as error:
        AgeVlmForConditionalGeneration.from_backbones(text, vision, gguf_file="broken.gguf")
    assert "\n" not in str(error.value)
