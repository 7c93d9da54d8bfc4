"""Llamas without the images, and how near two results must be."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from age_vlm import AgeVlmForConditionalGeneration


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
