"""Tiny models, tokenizers and images that the tests share; nothing here touches the network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
# The tests' tiny models gain nothing from a second thread: cores are for a second test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, logging

from age_vlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmProcessor
from age_vlm.processing import whole_image_processor


VERBOSITY = logging.get_verbosity()
IMAGE_SIZE = 32
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
TEXT_CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 5,
    "pad_token_id": 6,
    "tie_word_embeddings": True,
}
VISION_CONFIG = {
    "model_type": "timm_wrapper",
    "architecture": "convnext_atto",
    "do_pooling": False,
    "model_args": {
        "features_only": True,
        "out_indices": [1],
        "depths": [1, 1, 1, 1],
        "dims": [8, 16, 16, 16],
        "ls_init_value": None,
    },
    "hidden_size": 16,
}
IMAGE_TOKEN_ID = SPECIAL_TOKENS.index("<|reserved_special_token_0|>")


@pytest.fixture(autouse=True)
def _as_if_alone():
    """Every test starts from one seed, and with what transformers says by default: commands turn it down."""
    torch.manual_seed(0)
    logging.set_verbosity(VERBOSITY)
    yield


@pytest.fixture(scope="session")
def make_config():
    """Overrides -> a configuration with open gates and large weights: closed gates make every test of them vacuous."""

    def make(text=None, **overrides) -> AgeVlmConfig:
        settings = {
            "text_config": {**TEXT_CONFIG, **(text or {})},
            "vision_config": VISION_CONFIG,
            "image_token_id": IMAGE_TOKEN_ID,
            "cross_attention_layers": [1, 3],
            "cross_attention_gate_init": 0.8,
            **overrides,
        }
        return AgeVlmConfig(**settings)

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """Overrides -> the seeded model of that configuration, in evaluation mode."""

    def make(
        seed: int = 0, dtype=torch.float32, attention: str = "sdpa", **overrides
    ) -> AgeVlmForConditionalGeneration:
        torch.manual_seed(seed)
        config = make_config(**overrides)
        # Of the language model alone: timm's encoders choose for themselves.
        config.text_config._attn_implementation = attention
        return AgeVlmForConditionalGeneration(config).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model) -> AgeVlmForConditionalGeneration:
    """Shared: tests that change a model make their own."""
    return make_model()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and Llama 3's special tokens, among them the first reserved one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        padding_side="left",
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def processor(tokenizer) -> AgeVlmProcessor:
    return AgeVlmProcessor(whole_image_processor(IMAGE_SIZE), tokenizer)


@pytest.fixture(scope="session")
def make_batch():
    """Number of images of each row -> a batch with image tokens at random places between random text."""

    def make(images, seed: int = 0, longest: int = 14, side: str = "left", size=(IMAGE_SIZE, IMAGE_SIZE)) -> dict:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for count in images:
            length = int(torch.randint(max(6, 2 * count), longest + 1, (), generator=generator))
            row = torch.randint(7, TEXT_CONFIG["vocab_size"], (length,), generator=generator)
            # The last token is text: the place of the next one to generate.
            row[torch.randperm(length - 1, generator=generator)[:count]] = IMAGE_TOKEN_ID
            rows.append(row)
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), TEXT_CONFIG["pad_token_id"])
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            input_ids[index, place], attention_mask[index, place] = row, 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if sum(images):
            batch["pixel_values"] = torch.randn(sum(images), 3, *size, generator=generator)
        return batch

    return make


@pytest.fixture(scope="session")
def row_alone():
    """One row of a batch without its padding, with its own images."""

    def cut(batch: dict, row: int) -> dict:
        kept = batch["attention_mask"][row].bool()
        alone = {
            "input_ids": batch["input_ids"][row, kept][None],
            "attention_mask": torch.ones(1, int(kept.sum())).long(),
        }
        counts = (batch["input_ids"] == IMAGE_TOKEN_ID).sum(-1)
        first = int(counts[:row].sum())
        if counts[row]:
            alone["pixel_values"] = batch["pixel_values"][first : first + int(counts[row])]
        return alone

    return cut


@pytest.fixture(scope="session")
def make_cache():
    """Kind and model -> an empty cache of that kind."""

    def make(kind: str, model):
        text = model.config.text_config
        return DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=64)

    return make


@pytest.fixture(scope="session")
def coco_rectangles(tmp_path_factory):
    """Files in COCO's format, and the colours: grey photographs of 80 x 60 that show rectangles, of one colour for each
    category."""
    colours = {"dog": (200, 30, 30), "cat": (30, 200, 30), "car": (30, 30, 200)}
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(40):
        pixels = np.full((60, 80, 3), 128, np.uint8)
        for kind, name in enumerate(colours):
            if rng.random() < 0.6:
                left, top = int(rng.integers(0, 60)), 20 * kind + int(rng.integers(0, 8))
                box = [left, top, 18, 11]
                pixels[top : top + 11, left : left + 18] = colours[name]
                outline = [left, top, left + 18, top, left + 18, top + 11, left, top + 11]
                annotations.append(
                    {"id": len(annotations), "image_id": number, "category_id": kind, "bbox": box, "area": 198,
                     "iscrowd": 0, "segmentation": [outline]}
                )  # fmt: skip
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
    categories = [{"id": kind, "name": name} for kind, name in enumerate(colours)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return {"images": root / "images", "instances": root / "instances.json", "colours": colours}
