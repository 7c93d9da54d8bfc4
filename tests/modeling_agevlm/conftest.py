"""Llamas without the images, how near two results must be, and a model built from the folders of two components."""

import copy
import subprocess
import sys

import PIL.Image
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TimmWrapperConfig, TimmWrapperModel

from age_vlm import AgeVlmForConditionalGeneration, AgeVlmProcessor
from age_vlm.hub import save_checkpoint


TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.15, torch.float16: 0.03}


def _close(first, second, dtype=torch.float32):
    scale = second.float().abs().max().item()
    torch.testing.assert_close(
        first.float(), second.float(), atol=TOLERANCE[dtype] * max(scale, 1.0), rtol=0, equal_nan=False
    )


@pytest.fixture(scope="session")
def close():
    return _close


def _language_model_of(model: AgeVlmForConditionalGeneration) -> LlamaForCausalLM:
    """A plain Llama with the same weights."""
    llama = LlamaForCausalLM(copy.deepcopy(model.config.text_config)).to(model.dtype)
    weights = {
        f"model.{name}": value
        for name, value in model.model.language_model.state_dict().items()
        if ".cross_attention." not in name
    }
    llama.load_state_dict({**weights, "lm_head.weight": model.lm_head.weight})
    return llama.eval()


@pytest.fixture(scope="session")
def language_model_of():
    return _language_model_of


TEXT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request, tmp_path_factory, tokenizer):
    """The folders of a Llama and of an encoder with batch norm."""
    root = tmp_path_factory.mktemp("components")
    torch.manual_seed(1)
    text = LlamaConfig(**TEXT, tie_word_embeddings=request.param)
    text.source = "python make_text.py FOLDER"
    LlamaForCausalLM(text).save_pretrained(root / "text")
    tokenizer.save_pretrained(root / "text")
    config = TimmWrapperConfig.from_dict({"architecture": "test_efficientnet", "num_classes": 0})
    tower = TimmWrapperModel(config)
    for name, buffer in tower.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    tower.save_pretrained(root / "vision")
    return {"text": root / "text", "vision": root / "vision"}


@pytest.fixture
def built(folders):
    """A model whose projector and cross-attention have been trained."""
    processor = AgeVlmProcessor.from_backbones(**folders, image_size=64)
    model = AgeVlmForConditionalGeneration.from_backbones(**folders, processor=processor, cross_attention_layers=[1, 3])
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross_attention" in name or "multi_modal_projector" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, processor


@pytest.fixture(scope="module")
def picture():
    return PIL.Image.effect_noise((80, 60), 90).convert("RGB")


@pytest.fixture
def inputs(built, picture):
    processor = built[1]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return processor(images=[picture], text=[text], return_tensors="pt", add_special_tokens=False)


@pytest.fixture
def check_remotely(folders, inputs, tmp_path):
    """Saves a model without its pretrained components, loads it in a process that has no age-vlm, and compares the logits."""

    def check(model, processor):
        save_checkpoint(model, processor, tmp_path / "new", parts="new")
        torch.save((dict(inputs), model(**inputs).logits.detach()), tmp_path / "expected.pt")
        script = f"""
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "age_vlm":
            raise ImportError(name)
sys.meta_path.insert(0, Without())
import torch
from transformers import AutoModelForImageTextToText
parts = {{"text": {str(folders["text"])!r}, "vision": {str(folders["vision"])!r}}}
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "new")!r}, trust_remote_code=True, parts=parts)
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=False)
assert torch.equal(model(**inputs).logits, expected)
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=300)

    return check
