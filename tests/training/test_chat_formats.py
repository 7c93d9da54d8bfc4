"""A model trained for 100 steps in the chat format of its tokenizer, whichever that is, answers and stops."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from age_vlm import AgeVlmForConditionalGeneration
from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.schema import assistant_message, user_message
from age_vlm.processing import AgeVlmProcessor, whole_image_processor
from age_vlm.processing.chat_agevlm import stop_at_end_of_turn
from age_vlm.training import AgeVlmTrainer, AlignmentConfig


TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
# Name -> the template, and the special tokens that it knows.
FORMATS = {
    "llama_3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "llama_2": [],
    "smollm2": ["<|im_start|>", "<|im_end|>"],
    "tinyllama": [],
    "base": [],
}


@pytest.mark.parametrize("name", FORMATS)
def test_it_stops_at_the_end_of_its_turn(name, make_config, tmp_path):
    torch.manual_seed(0)
    special = ["<s>", "</s>", "<image>", "<pad>", *FORMATS[name]]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if name != "base":
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    processor = AgeVlmProcessor(whole_image_processor(32), tokenizer, image_token="<image>")
    config = make_config(image_token_id=processor.image_token_id, cross_attention_gate_init=0.5)
    model = AgeVlmForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    stop_at_end_of_turn(model.generation_config, tokenizer, processor.chat_template)
    answers = {"red": "it is red", "blue": "blue"}
    samples = [
        {
            "id": colour,
            "images": [Image.new("RGB", (32, 32), colour)],
            "messages": [user_message("which colour?", images=1), assistant_message(answer)],
            "groundings": [],
        }
        for colour, answer in answers.items()
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=100, per_device_train_batch_size=2, learning_rate=3e-3, report_to="none",
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    AgeVlmTrainer(
        model,
        arguments,
        train_dataset=samples,
        data_collator=AgeVlmCollator.from_model(model, processor),
        alignment=AlignmentConfig(weight=0.0),
    ).train()
    model.eval()
    for sample in samples:
        prompt = processor.apply_chat_template(sample["messages"][:1], add_generation_prompt=True, tokenize=False)
        inputs = processor(images=sample["images"], text=[prompt], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False, tokenizer=tokenizer)
        said = out[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == answers[sample["id"]]
        assert len(said) < 20, "it stopped by itself"
