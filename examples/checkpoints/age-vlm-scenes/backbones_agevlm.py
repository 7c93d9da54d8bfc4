"""Building an AGE-VLM from a pretrained language model and a pretrained vision encoder."""

import os

import torch
from transformers import AutoConfig, AutoModel, LlamaForCausalLM
from transformers.utils import logging

from .configuration_agevlm import unknown_option
from .backbone_files_agevlm import is_unreadable, load_component, reserved_image_token
from .chat_agevlm import CHAT_TEMPLATE, stop_at_end_of_turn
from .vision_agevlm import drop_unused_head


logger = logging.get_logger(__name__)


def model_from_backbones(
    model_class,
    text: str | os.PathLike,
    vision: str | os.PathLike,
    image_token_id: int | None,
    dtype: torch.dtype | str | None,
    config_overrides: dict,
):
    """See [`AgeVlmForConditionalGeneration.from_backbones`]; `model_class` is the class that it is called on."""
    if unknown := unknown_option(config_overrides):
        raise ValueError(unknown)
    text_config = load_component("text", text, AutoConfig)
    whole_vision_config = load_component("vision", vision, AutoConfig)
    vision_config = getattr(whole_vision_config, "vision_config", whole_vision_config)
    if text_config.model_type != "llama":
        raise ValueError(f"text: '{text}' is a '{text_config.model_type}' model, expected a Llama.")
    tokenizer = _tokenizer(text)
    if image_token_id is None:
        image_token_id = _image_token_id(text, text_config, tokenizer)
    language_model, text_report = load_component("text", text, LlamaForCausalLM, dtype=dtype, output_loading_info=True)
    dtype = language_model.dtype
    if vision_config.model_type == "timm_wrapper" and vision_config.model_args:
        # timm writes it into the arguments as well, where transformers would pass it twice.
        vision_config.model_args.pop("num_classes", None)
    vision_tower, vision_report = load_component(
        "vision", vision, AutoModel, dtype=dtype, config=whole_vision_config, output_loading_info=True
    )
    vision_tower = getattr(vision_tower, "vision_model", vision_tower)
    # Of a model that reads text too, only the whole knows it; the model card names what a model was built from.
    vision_tower.config.name_or_path = str(vision)
    config = model_class.config_class(
        text_config=text_config,
        vision_config=vision_tower.config,
        image_token_id=image_token_id,
        **config_overrides,
    )
    # Not `.to(dtype)`: the rotary frequencies stay in float32, as in the language model.
    model = model_class._from_config(config, dtype=dtype)
    drop_unused_head(vision_tower)
    # A pooler for example may be missing: it is dropped.
    vision_missing = {name.removeprefix("vision_model.") for name in vision_report["missing_keys"]}
    missing = [
        *sorted(text_report["missing_keys"]),
        *sorted(vision_missing & vision_tower.state_dict().keys()),
        *model.model.vision_tower.load_state_dict(vision_tower.state_dict(), strict=False).missing_keys,
        *model.model.language_model.load_state_dict(language_model.model.state_dict(), strict=False).missing_keys,
        *model.lm_head.load_state_dict(language_model.lm_head.state_dict(), strict=False).missing_keys,
    ]
    missing = [name for name in missing if ".cross_attention." not in name]
    if missing:
        raise ValueError(
            f"text, vision: {len(missing)} weights are not in '{text}' or '{vision}', first '{missing[0]}'."
        )
    model.generation_config = language_model.generation_config
    if tokenizer is not None:
        # A base model's own configuration knows the end of a text alone.
        try:
            stop_at_end_of_turn(model.generation_config, tokenizer, CHAT_TEMPLATE)
        except ValueError as error:
            logger.warning(f"text: answers of '{text}' do not stop by themselves: {error}")
    return model.eval()


def _tokenizer(text: str | os.PathLike):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(text)
    except Exception as error:
        if not is_unreadable(error):
            raise
        if os.path.isdir(text) and any(name.startswith("tokenizer") for name in os.listdir(text)):
            return load_component("text", text, AutoTokenizer)  # which says what is wrong with it
        return None


def _image_token_id(text: str | os.PathLike, text_config, tokenizer) -> int:
    if tokenizer is None:
        logger.warning(
            f"'{text}' has no tokenizer: the last token of the vocabulary, {text_config.vocab_size - 1}, stands for images."
        )
        return text_config.vocab_size - 1
    return reserved_image_token(tokenizer)[1]
