"""Teachers of the real classes, small and with random weights, and things to ask them about."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPTokenizer,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
)

from age_vlm.grounding import Prompt, load_teacher


BOX = (4.0, 6.0, 40.0, 30.0)
# Of every kind, and of several lengths: they must not be padded to one another.
PROMPTS = [
    [Prompt("a", BOX), Prompt("b", points=((50, 9),)), Prompt("c", (20.0, 2.0, 60.5, 44.0))],
    [],
    [Prompt("d", points=((5, 5), (30, 70)), labels=(1, 0)), Prompt("e", (0, 0, 39, 79), ((3, 4),), (0,))],
]


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that a prompt decides the mask: with the usual small ones all masks are alike."""
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            fan_in = tensor[0].numel() if "embed" not in name else 1
            torch.nn.init.normal_(tensor, std=(2 / fan_in) ** 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_sam2(tmp_path_factory):
    """Folder of a small `Sam2Model` and its processor."""
    config = Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 12,
                "image_size": [128, 128],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [12, 24, 48, 96],
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "global_attention_blocks": [3],
            },
            "backbone_channel_list": [96, 48, 24, 12],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 128, "patch_size": 16},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    )
    folder = tmp_path_factory.mktemp("sam2")
    _lively(Sam2Model(config)).save_pretrained(folder)
    size, mask_size = {"height": 128, "width": 128}, {"height": 32, "width": 32}
    Sam2Processor(Sam2ImageProcessor(size=size, mask_size=mask_size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sam3(tmp_path_factory):
    """Folder of a small `Sam3Model` and its processor, which reads text letter by letter."""
    small = {"hidden_size": 32, "num_attention_heads": 2}
    block = {**small, "num_layers": 1, "intermediate_size": 64}
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                **small,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "image_size": 112,
                "patch_size": 14,
                "window_size": 4,
                "global_attn_indexes": [1],
                "pretrain_image_size": 56,
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config={
            "model_type": "clip_text_model",
            **small,
            "vocab_size": 600,
            "intermediate_size": 64,
            "projection_dim": 16,
            "num_hidden_layers": 2,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        geometry_encoder_config=block,
        detr_encoder_config=block,
        detr_decoder_config={**block, "num_queries": 6},
        mask_decoder_config=small,
    )
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<unk>", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("sam3")
    _lively(Sam3Model(config)).save_pretrained(folder)
    size, mask_size = {"height": 112, "width": 112}, {"height": 32, "width": 32}
    Sam3Processor(Sam3ImageProcessor(size=size, mask_size=mask_size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_memory():
    """Configuration of the parts that follow things through a video."""
    return {
        "memory_attention_hidden_size": 32,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 32,
        "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16,
        "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 32,
        "mask_downsampler_embed_dim": 32,
    }


@pytest.fixture(scope="session")
def sam2_teacher(tiny_sam2):
    return load_teacher("sam2-transformers", tiny_sam2, device="cpu")


@pytest.fixture(scope="session")
def sam3_teacher(tiny_sam3):
    return load_teacher("sam3", tiny_sam3, device="cpu")


@pytest.fixture(scope="session")
def images():
    """Noise of three sizes: wide, square, and tall."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((48, 64), (30, 30), (80, 40))
    ]


@pytest.fixture(scope="session")
def prompts():
    return PROMPTS


@pytest.fixture
def encoded():
    """Module -> a list that gets the number of images of each of its forward passes."""
    hooks = []

    def count(module: torch.nn.Module) -> list[int]:
        sizes: list[int] = []
        hooks.append(module.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0]))))
        return sizes

    yield count
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="session")
def same():
    """Whether two answers agree: masks but for few pixels, which another order of sums may turn over."""

    def check(found, expected) -> None:
        assert len(found) == len(expected)
        for own, others in zip(found, expected):
            assert len(own) == len(others)
            for a, b in zip(own, others):
                assert a.masks.shape == b.masks.shape and a.masks.dtype == bool
                assert (a.masks != b.masks).mean() < 0.002
                np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)

    return check
