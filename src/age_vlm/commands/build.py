"""The model and processor that a recipe starts from, and what of them learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..configuration import IMAGE_SIZES, preset_config
from ..errors import UserError, checkpoint_errors
from ..hub import load_checkpoint
from ..modeling_agevlm import AgeVlmForConditionalGeneration
from ..modeling_agevlm.components_agevlm import component_of
from ..processing import AgeVlmProcessor, whole_image_processor
from ..processing.backbone_files_agevlm import add_image_token
from .recipe import PREVIOUS, ModelRecipe, TrainingRecipe
from .sources import DataSource


if TYPE_CHECKING:
    from peft import PeftModel


@checkpoint_errors()
def build_model(
    recipe: ModelRecipe, source: DataSource, previous: Path | None = None
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """The model and processor that a recipe starts from; `previous` is the checkpoint of the recipe before it."""
    if recipe.checkpoint == PREVIOUS and previous is None:
        raise UserError(
            f"model.checkpoint: got '{PREVIOUS}', expected a folder or Hub id: only `age-vlm pipeline` knows the recipe before."
        )
    if recipe.checkpoint is not None:
        checkpoint = previous if recipe.checkpoint == PREVIOUS else recipe.checkpoint
        model, processor = load_checkpoint(checkpoint, "model.checkpoint", recipe.parts, **recipe.config)
    elif recipe.text is not None:
        dtype = recipe.dtype and getattr(torch, recipe.dtype)
        files = component_files(recipe)
        processor = AgeVlmProcessor.from_backbones(**files, image_size=recipe.image_size)
        model = AgeVlmForConditionalGeneration.from_backbones(
            **files, processor=processor, dtype=dtype, **recipe.config
        )
    else:
        model, processor = _model_from_preset(recipe, source)
    model.set_attn_implementation({"text_config": recipe.attention})
    return model, processor


def component_files(recipe: ModelRecipe) -> dict[str, str | None]:
    """The arguments of `from_backbones` that say which pretrained components a model is built from."""
    names = ("text", "vision", "image_token", "gguf_file", "text_revision", "vision_revision")
    return {name: getattr(recipe, name) for name in names}


def _model_from_preset(
    recipe: ModelRecipe, source: DataSource
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    if "image_token_id" in recipe.config:
        raise UserError("model.config.image_token_id: got one, expected none: the tokenizer is made with the model.")
    tokenizer = source.tokenizer
    image_token, image_token_id = add_image_token(tokenizer)
    config = preset_config(recipe.preset, image_token_id=image_token_id, **recipe.config)
    text = config.text_config
    text.vocab_size = len(tokenizer)
    text.bos_token_id, text.eos_token_id, text.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    size = recipe.image_size or IMAGE_SIZES[recipe.preset]
    processor = AgeVlmProcessor(whole_image_processor(size), tokenizer, image_token=image_token)
    return AgeVlmForConditionalGeneration(config), processor


def set_trainable(model: AgeVlmForConditionalGeneration, recipe: TrainingRecipe) -> PeftModel | None:
    """Freezes what the recipe does not train, and puts adapters into what it trains by LoRA.

    Returns:
        The model as PEFT wraps it, where there are adapters, to save and merge them. They are in `model` itself, too: it is
        what is trained and stored on the way, since an adapter's own file lacks the parts that are trained in full.
    """
    first = recipe.language_model_from
    if first >= model.config.text_config.num_hidden_layers:
        raise UserError(
            f"training.language_model_from: got {first}, expected less than {model.config.text_config.num_hidden_layers}, the "
            "number of the language model's layers."
        )
    adapted = None
    targets = [component for component, mode in recipe.modes.items() if mode == "lora"]
    if targets:
        from peft import get_peft_model

        from ..training.lora import lora_config

        lora = recipe.lora
        config = lora_config(
            targets[0] if len(targets) == 1 else "both",
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            use_dora=lora.dora,
            gates="cross_attention" in targets,
            layers=range(first, model.config.text_config.num_hidden_layers) if first else None,
        )
        adapted = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        component = component_of(name)
        mode = recipe.modes[component]
        if mode != "lora":
            late = component != "language_model" or not first or _layer_of(name) >= first
            parameter.requires_grad_(mode == "full" and late)
    return adapted


def _layer_of(parameter: str) -> int:
    """Number of the decoder layer of a language model's parameter; -1 of its embeddings, last norm and head, which are
    trained only where every layer is."""
    found = re.search(r"language_model\.layers\.(\d+)\.", parameter)
    return int(found[1]) if found else -1
