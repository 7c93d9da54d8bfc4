# Copyright 2026 The age-vlm authors. Licensed under the Apache License, Version 2.0.

"""Configuration of AGE-VLM (Mahajan et al., arXiv 2511.17793): a Llama, a vision encoder, and where they meet."""

import os
import re
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .checkpoint_code_agevlm import AUTO_MAP, save_with_code
from .versions_agevlm import supported_range, warn_if_untested


logger = logging.get_logger(__name__)

IMAGE_VISIBILITY = ("latest", "all_previous")

# Instead of its path, what a saved configuration says of a component that did not come from the Hub.
LOCAL_FOLDER = "a local folder"


def _one_sentence(config_class):
    """`@strict` reports over two lines and not as a ValueError; a user gets the sentence alone."""
    strict_init = config_class.__init__

    @wraps(strict_init)
    def __init__(self, *args, **kwargs):
        try:
            strict_init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(_sentence(error)) from error

    config_class.__init__ = __init__
    return config_class


@_one_sentence
@strict
class AgeVlmConfig(PreTrainedConfig):
    r"""
    Args:
        text_config (`LlamaConfig` or `dict`, *optional*):
            The language model; Llama-3.2-1B's shape when left out.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Any vision model of transformers that returns a feature map `(images, channels, rows, columns)` or a token
            sequence `(images, tokens, width)`; a timm ConvNeXt when left out.
        image_token_id (`int`, *optional*, defaults to 128002):
            The token that stands for one image in the text: `<|reserved_special_token_0|>` of Llama 3, so that the
            vocabulary does not grow.
        cross_attention_layers (`list[int]`, *optional*):
            Decoder layers, counted from 0, that carry a gated cross-attention block in front. Every fourth layer from
            the third on when left out: 2, 6, 10, 14 for 16 layers, which are the paper's 2, 7, 12, 17 of the merged
            20-layer stack.
        cross_attention_intermediate_size (`int`, *optional*):
            Width of the blocks' gated feed-forward layer, the language model's own when left out.
        cross_attention_gate_init (`float`, *optional*, defaults to 0.0):
            Start of every gate before its tanh. At 0 a new model equals its language model exactly; a model that is
            trained from scratch has nothing to preserve and learns faster from 0.5.
        image_visibility (`str`, *optional*, defaults to `"latest"`):
            Which images a text row attends to: the `"latest"` one before it (Flamingo) or `"all_previous"` (Mllama).
        initializer_range (`float`, *optional*):
            Standard deviation of new weights, the language model's own when left out.
        alignment (`dict`, *optional*):
            How the cross-attention was aligned with masks in training: `form`, `weight`, `layers` (among the blocks) and
            `heads`. The network does not read it; it says whose attention maps show where the model looked.
        components (`dict`, *optional*):
            Of a model that was built from pretrained components: where `language_model` and `vision` came from, a hash of
            their weights, and whether a checkpoint leaves them out, as `save_pretrained(parts="new")` does.

    Raises:
        ValueError: one sentence, for a layer that is not there, a width that does not divide or an unknown option.
    """

    model_type = "age_vlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    # Of the outputs, `Trainer` takes the logits alone for predictions.
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "hidden_states",
        "attentions",
        "cross_attentions",
        "cross_attention_maps",
        "image_outputs",
    ]
    # Beside that of the language model. The norms see the heads of their own process alone, as Qwen3's do.
    base_model_tp_plan = {
        f"language_model.layers.*.cross_attention.{name}": style
        for name, style in {
            "attn.q_proj": "colwise",
            "attn.k_proj": "colwise",
            "attn.v_proj": "colwise",
            "attn.q_norm": "replicated_with_grad_allreduce",
            "attn.k_norm": "replicated_with_grad_allreduce",
            "attn.o_proj": "rowwise",
            "mlp.gate_proj": "colwise",
            "mlp.up_proj": "colwise",
            "mlp.down_proj": "rowwise",
        }.items()
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 128002
    cross_attention_layers: list[int] | tuple[int, ...] | None = None
    cross_attention_intermediate_size: int | None = None
    cross_attention_gate_init: float = 0.0
    image_visibility: str = "latest"
    initializer_range: float | None = None
    alignment: dict | None = None
    components: dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        warn_if_untested()
        kwargs.pop(
            "tested_transformers", None
        )  # of the code that wrote it; this is other code, with a range of its own
        self.text_config = _sub_config("text_config", self.text_config, DEFAULT_TEXT_CONFIG)
        if self.text_config.model_type != "llama":
            raise ValueError(
                f"text_config: model_type is '{self.text_config.model_type}', expected 'llama': the cross-attention is a "
                "part of LlamaDecoderLayer."
            )
        self.vision_config = _sub_config("vision_config", self.vision_config, DEFAULT_VISION_CONFIG)
        layers = self.text_config.num_hidden_layers
        if self.cross_attention_layers is None:
            self.cross_attention_layers = list(range(min(2, layers - 1), layers, 4))
        self.cross_attention_layers = list(self.cross_attention_layers)
        if self.cross_attention_intermediate_size is None:
            self.cross_attention_intermediate_size = self.text_config.intermediate_size
        if self.initializer_range is None:
            self.initializer_range = self.text_config.initializer_range
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        for unknown in _unknown_options(kwargs):
            logger.warning(unknown)

    def validate_architecture(self):
        """Part of `@strict` validation: what no model could be built from."""
        text = self.text_config
        if not self.cross_attention_layers:
            raise ValueError("cross_attention_layers: got an empty list, expected at least one decoder layer.")
        for index in self.cross_attention_layers:
            if not 0 <= index < text.num_hidden_layers:
                raise ValueError(
                    f"cross_attention_layers: got {index}, expected indices from 0 to {text.num_hidden_layers - 1}: the "
                    f"language model has {text.num_hidden_layers} layers."
                )
        if sorted(set(self.cross_attention_layers)) != self.cross_attention_layers:
            raise ValueError(
                f"cross_attention_layers: got {self.cross_attention_layers}, expected increasing indices without repeats."
            )
        if text.hidden_size % 4:
            raise ValueError(
                f"text_config.hidden_size: got {text.hidden_size}, expected a multiple of 4: the 2-D position encoding "
                "splits it into sines and cosines of rows and columns."
            )
        if text.num_attention_heads % text.num_key_value_heads:
            raise ValueError(
                f"text_config.num_attention_heads: got {text.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {text.num_key_value_heads}."
            )
        if self.cross_attention_intermediate_size <= 0:
            raise ValueError(
                f"cross_attention_intermediate_size: got {self.cross_attention_intermediate_size}, expected a positive width."
            )
        if self.image_visibility not in IMAGE_VISIBILITY:
            raise ValueError(
                f"image_visibility: got '{self.image_visibility}', expected one of {', '.join(IMAGE_VISIBILITY)}."
            )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"image_token_id: got {self.image_token_id}, expected a token of the vocabulary, 0 to {text.vocab_size - 1}."
            )

    def to_dict(self):
        values = super().to_dict()
        for part in (values["text_config"], values["vision_config"]):
            # Where it lay on one machine is of no use on another, and nobody's business.
            if isinstance(part, dict) and part.get("_name_or_path") and is_local(part["_name_or_path"]):
                part["_name_or_path"] = LOCAL_FOLDER
        # A checkpoint names its own code, so that it also loads where age-vlm is not installed.
        auto_map = {key: AUTO_MAP[key] for key in AUTO_MAP if key != "AutoProcessor"}
        return {**values, "auto_map": auto_map, "tested_transformers": supported_range()}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        return save_with_code(self, super().save_pretrained, save_directory, push_to_hub, **kwargs)


# Llama-3.2-1B, as published.
DEFAULT_TEXT_CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "pad_token_id": 128004,
    "tie_word_embeddings": True,
}

# CLIP's ConvNeXt-L of LAION-2B, soup, without the projection behind its last norm: nothing here would use it.
DEFAULT_VISION_CONFIG = {
    "model_type": "timm_wrapper",
    "architecture": "convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_320",
    "do_pooling": False,
    "model_args": {"head_hidden_size": None},
    "hidden_size": 1536,
}


def _sub_config(name, value, default):
    if value is None:
        value = default
    if isinstance(value, dict):
        value = dict(value)
        model_type = value.pop("model_type", default["model_type"])
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{name}: model_type is '{model_type}', expected one that transformers knows.")
        config_class = CONFIG_MAPPING[model_type]
        for unknown in _misspelt_options(value, config_class):
            logger.warning(f"{name}.{unknown}")
        try:
            value = config_class(**value)
        except StrictDataclassError as error:
            raise ValueError(f"{name}: {_sentence(error)}") from error
    return value


def _sentence(error: StrictDataclassError) -> str:
    # The errors of every member of a union follow the sentence.
    return str(error.__cause__ or error).split(". Errors:")[0]


def is_local(name: str | os.PathLike) -> bool:
    """Whether a name is that of a file or folder of this machine, or can be nothing else: no id of the Hub."""
    name = os.fspath(name)
    return os.path.exists(name) or re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is None


def unknown_option(options) -> str | None:
    """One sentence about the first of `options` that no configuration of transformers or AGE-VLM knows, if there is one."""
    return next(_unknown_options(options), None)


def _unknown_options(options):
    names = [field.name for field in fields(AgeVlmConfig)]
    known = {*names, *PreTrainedConfig().to_dict(), *_TRANSFORMERS_OPTIONS}
    for name in options:
        if name not in known and not name.startswith("_"):
            yield _unknown(name, AgeVlmConfig, get_close_matches(name, names, n=1, cutoff=0.0)[0])


def _misspelt_options(options, config_class):
    # Pretrained parts bring keys that no class declares: only what is nearly the name of a field is taken for a mistake.
    names = [field.name for field in fields(config_class)]
    known = {*dir(config_class), *config_class.attribute_map, *PreTrainedConfig().to_dict(), *_TRANSFORMERS_OPTIONS}
    for name in options:
        nearest = get_close_matches(name, names, n=1, cutoff=0.85)
        if nearest and name not in known and not name.startswith("_"):
            yield _unknown(name, config_class, nearest[0])


def _unknown(name, config_class, nearest) -> str:
    return f"{name}: unknown option of {config_class.__name__} (nearest: '{nearest}')."


# What transformers itself passes to, or stores in, a configuration without declaring it.
_TRANSFORMERS_OPTIONS = {
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "pad_token_id",  # `Trainer` sets the three on any configuration
    "quantization_config",
    "tie_encoder_decoder",
    "torch_dtype",
}


__all__ = ["AgeVlmConfig"]
