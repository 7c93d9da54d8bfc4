"""The model of a recipe without its weights, and batches as its data give them, or would."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ...configuration import IMAGE_SIZES, AgeVlmConfig, preset_config
from ...data.collator import AgeVlmCollator
from ...errors import UserError, checkpoint_errors
from ...modeling_agevlm import AgeVlmForConditionalGeneration
from ...processing import AgeVlmProcessor, ImageGeometry, image_geometry, whole_image_processor
from ...processing.backbone_files_agevlm import load_component
from ..build import build_model, component_files, set_trainable
from ..recipe import PREVIOUS, ModelRecipe, Recipe
from ..sources import DataSource, load_sources


# Longest of so many samples are taken for a batch: memory is needed for the longest.
SAMPLES = 64
# Tokens of a text where neither data nor recipe tell.
LENGTH = 512


class PlannedModel:
    """The model of a recipe on the meta device, its parts frozen as the recipe says, and batches for it.

    Args:
        length: tokens of each text. When left out: as in the data, where they are on this machine, else the recipe's
            `max_length`, else 512.
        dtype: of the weights, that of the recipe when left out.

    Attributes:
        model: never run, only copied from.
        source_of_text: where the lengths are from, in words.

    Raises:
        UserError: one sentence, where configuration or processor of the model cannot be read, or data are not as they
            should be.
    """

    def __init__(self, recipe: Recipe, *, length: int | None = None, dtype: torch.dtype | None = None):
        if length is not None and length < 2:
            raise UserError(f"length: got {length}, expected at least 2: an image and a word.")
        self.recipe = recipe
        source = load_sources(recipe) if length is None and _data_at_hand(recipe) else None
        self.model, processor = _load(recipe.model, source, dtype)
        with checkpoint_errors():
            recipe.alignment.check(self.model.config)
        self.image_size = tuple(processor.image_geometry(64, 64).size)
        self.image_tokens = math.prod(self.model.image_grid(self.image_size))
        if source is None:
            self.length = length or recipe.training.max_length or LENGTH
            given = "given" if length else "the recipe's max_length" if recipe.training.max_length else "assumed"
            self.source_of_text = f"texts of {self.length} tokens with one image ({given})"
        else:
            collator = AgeVlmCollator.from_model(
                self.model,
                processor,
                independent_turns=recipe.training.independent_turns,
                answer_queries=recipe.alignment.answer_queries,
                max_length=recipe.training.max_length,
                packing=recipe.training.packing,
                pack_length=recipe.training.pack_length,
            )
            self._collate, self._samples = collator, _longest(collator, source.train, self.image_tokens)
            self.source_of_text = f"the longest, with the tokens of images, of {len(self._samples)} samples of the data"
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that PEFT uses
            set_trainable(self.model, recipe.training)

    def copy(self) -> AgeVlmForConditionalGeneration:
        return copy.deepcopy(self.model)

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """One batch, as the collator gives it."""
        if not hasattr(self, "_collate"):
            return self._assumed_batch(size)
        # Copies, since one image in several samples would be encoded once.
        return self._collate([copy.deepcopy(self._samples[i % len(self._samples)]) for i in range(size)])

    def _assumed_batch(self, size: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(size, self.length, dtype=torch.long)
        image_token = self.model.config.image_token_id
        ids += int(image_token == 0)
        ids[:, 0] = image_token
        batch = {"input_ids": ids, "labels": ids.clone()}
        # Texts of one length are not packed: rows of several would leave as much padding, and see less of their attention.
        if self.recipe.training.independent_turns or self.recipe.training.packing:
            batch["position_ids"] = torch.arange(self.length).repeat(size, 1)
        else:
            batch["attention_mask"] = torch.ones_like(ids)
        batch["pixel_values"] = torch.empty(size, 3, *self.image_size, device="meta")
        if self.recipe.alignment.weight or self.recipe.alignment.final_weight:
            batch["grounding_queries"] = torch.tensor([[row, self.length - 1] for row in range(size)])
            batch["grounding_slots"] = torch.zeros(size, dtype=torch.long)
            batch["grounding_coverage"] = torch.ones(size, self.image_tokens)
        return batch


def _data_at_hand(recipe: Recipe) -> bool:
    """Whether all data are here: a plan downloads nothing."""
    folders = {"dataset": ("path",), "label_maps": ("images", "labels"), "scenes": ()}
    return all(Path(getattr(part, key)).is_dir() for part in (recipe.data, *recipe.mix) for key in folders[part.kind])


def _longest(collator: AgeVlmCollator, samples: Sequence, image_tokens: int) -> list:
    def tokens(sample) -> int:
        return collator([sample])["input_ids"].shape[1] + image_tokens * len(sample["images"])

    count = min(SAMPLES, len(samples))
    chosen = [samples[number * len(samples) // count] for number in range(count)]
    return sorted(chosen, key=tokens, reverse=True)


class _ImagesAlone:
    """A processor without a tokenizer: presets have none of their own."""

    def __init__(self, size: int | list[int]):
        self.image_processor = whole_image_processor(size)

    def image_geometry(self, height: int, width: int) -> ImageGeometry:
        return image_geometry(self.image_processor, height, width)


@checkpoint_errors()
def _load(
    recipe: ModelRecipe, source: DataSource | None, dtype: torch.dtype | None
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor | _ImagesAlone]:
    if recipe.checkpoint == PREVIOUS:
        raise UserError(
            f"model.checkpoint: got '{PREVIOUS}', expected a folder or Hub id, a preset instead "
            "(model={preset: age-vlm-1b}), or the folder of all stages as the recipe."
        )
    if recipe.attention == "flex_attention":
        # It needs an accelerator to compile for; its tensors are those of SDPA.
        recipe = dataclasses.replace(recipe, attention="sdpa")
    if recipe.checkpoint is None and recipe.text is None and source is not None:
        # The tokenizer, and with it the vocabulary, is made from the data.
        with torch.device("meta"):
            model, processor = build_model(recipe, source)
        return model.to(dtype or torch.float32), processor
    if recipe.checkpoint is not None:
        config, processor = _read_checkpoint(recipe)
        stored = config.dtype
    elif recipe.text is not None:
        config, processor = _read_backbones(recipe)
        stored = recipe.dtype or config.text_config.dtype
    else:
        config, stored = preset_config(recipe.preset, **recipe.config), None
        processor = _ImagesAlone(recipe.image_size or IMAGE_SIZES[recipe.preset])
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype or stored or torch.float32)
    model.set_attn_implementation({"text_config": recipe.attention})
    return model, processor


def _read_checkpoint(recipe: ModelRecipe) -> tuple[AgeVlmConfig, AgeVlmProcessor]:
    try:
        kind = AutoConfig.from_pretrained(recipe.checkpoint).model_type
        if kind != AgeVlmConfig.model_type:
            raise UserError(f"it holds a model of type '{kind}'")
        config = AgeVlmConfig.from_pretrained(recipe.checkpoint, **recipe.config)
        return config, AgeVlmProcessor.from_pretrained(recipe.checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"model.checkpoint: '{recipe.checkpoint}' could not be read as an AGE-VLM: {reason}."
        ) from error


def _read_backbones(recipe: ModelRecipe) -> tuple[AgeVlmConfig, AgeVlmProcessor]:
    files = {"gguf_file": recipe.gguf_file, "revision": recipe.text_revision}
    text = load_component("model.text", recipe.text, AutoConfig, **files)
    whole = load_component("model.vision", recipe.vision, AutoConfig, revision=recipe.vision_revision)
    vision = getattr(whole, "vision_config", whole)
    if vision.model_type == "timm_wrapper" and vision.model_args:
        vision.model_args.pop("num_classes", None)
    processor = AgeVlmProcessor.from_backbones(**component_files(recipe), image_size=recipe.image_size)
    text.vocab_size = max(text.vocab_size, processor.image_token_id + 1)
    settings = {"image_token_id": processor.image_token_id, **recipe.config}
    return AgeVlmConfig(text_config=text, vision_config=vision, **settings), processor
