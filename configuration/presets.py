"""The named sizes of AGE-VLM."""

from difflib import get_close_matches

from .configuration_agevlm import AgeVlmConfig, unknown_option


# The paper's model: Llama-3.2-1B with CLIP ConvNeXt-L at 768 pixels, 24 x 24 = 576 image tokens.
AGE_VLM_1B = {}

# The embedded default: 64 x 64 drawn scenes, 8 x 8 image tokens. Trained from scratch, so the gates start open, and timm's
# layer scale of 1e-6 is off: it would silence a ConvNeXt that has no pretrained weights. Initial weights are larger than the
# usual 0.02, which suits layers twenty times as wide.
AGE_VLM_TINY = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "timm_wrapper",
        "architecture": "convnext_atto",
        "do_pooling": False,
        "initializer_range": 0.12,
        "model_args": {
            "features_only": True,
            "out_indices": [1],
            "depths": [2, 2, 1, 1],
            "dims": [40, 80, 80, 80],
            "stem_type": "overlap_act",
            "ls_init_value": None,
        },
        "hidden_size": 80,
    },
    "image_token_id": 5,
    "cross_attention_layers": [1, 2],
    "cross_attention_gate_init": 0.5,
}

# SmolLM2-135M-Instruct and EfficientNet-Lite2 at 384 pixels, 12 x 12 tokens: real components that train on two cores. The
# blocks are late, so that little has to be computed backwards through a language model that is frozen, and narrow.
AGE_VLM_135M = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49153,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "timm_wrapper",
        "architecture": "tf_efficientnet_lite2",
        "do_pooling": False,
        "hidden_size": 1280,
        "pretrained_cfg": {
            "input_size": [3, 384, 384],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
        },
    },
    "image_token_id": 49152,
    "cross_attention_layers": [20, 24],
    "cross_attention_intermediate_size": 576,
    "cross_attention_gate_init": 0.5,
}

PRESETS = {"age-vlm-1b": AGE_VLM_1B, "age-vlm-135m": AGE_VLM_135M, "age-vlm-tiny": AGE_VLM_TINY}
IMAGE_SIZES = {"age-vlm-1b": 768, "age-vlm-135m": 384, "age-vlm-tiny": 64}


def preset_config(name: str, **overrides) -> AgeVlmConfig:
    """The configuration called `name`, with `overrides` on its top-level keys.

    Raises:
        ValueError: if no preset has that name or no configuration such a key; names the nearest.
    """
    if name not in PRESETS:
        nearest = get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"preset: got '{name}', expected one of {', '.join(PRESETS)} (nearest: '{nearest}').")
    if unknown := unknown_option(overrides):
        raise ValueError(unknown)
    return AgeVlmConfig(**{**PRESETS[name], **overrides})
