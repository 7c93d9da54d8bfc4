"""A small source of drawn scenes, random backbones, and recipes of a few steps."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TimmWrapperConfig, TimmWrapperModel

from age_vlm.commands.recipe import DataRecipe, Recipe, TrainingRecipe
from age_vlm.commands.sources import load_source
from age_vlm.data.scenes_tokenizer import build_scenes_tokenizer


DATA = DataRecipe(train=8, validation=1, test=1)


@pytest.fixture(scope="module")
def one_thread():
    """With several, the same sums may come out differently from one time to the next on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source():
    return load_source(DATA, 0)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of a random Llama, with the tokenizer of drawn scenes, and of a random timm ConvNeXt."""
    folder = tmp_path_factory.mktemp("backbones")
    tokenizer = build_scenes_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    arguments = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    TimmWrapperModel(
        TimmWrapperConfig.from_dict({"architecture": "convnext_atto", "num_classes": 0, "model_args": arguments})
    ).save_pretrained(folder / "vision")
    return folder


def _recipe_of(**sections):
    training = {"steps": 3, "batch_size": 2, "learning_rate": 0.01, "log_every": 1, **sections.pop("training", {})}
    return Recipe(data=DATA, training=TrainingRecipe(**training), **sections)


@pytest.fixture(scope="session")
def recipe_of():
    """Sections, and values of `training` -> a recipe of three steps."""
    return _recipe_of
