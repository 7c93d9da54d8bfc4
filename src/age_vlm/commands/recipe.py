"""Recipes: YAML files that say everything about a training run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..configuration import PRESETS, AlignmentConfig
from ..errors import UserError, nearest, one_of
from ..modeling_agevlm.components_agevlm import COMPONENTS


# `model.checkpoint` of a recipe that goes on from the one before it in a folder of recipes.
PREVIOUS = "previous"


@dataclass
class ModelRecipe:
    """Where the model comes from: a `preset` with random weights, two pretrained `backbones`, or a saved `checkpoint`."""

    preset: str = "age-vlm-tiny"
    text: str | None = None
    vision: str | None = None
    gguf_file: str | None = None
    text_revision: str | None = None
    vision_revision: str | None = None
    image_token: str | None = None
    checkpoint: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    image_size: int | list[int] | None = None
    attention: str = "sdpa"
    dtype: str | None = None

    def __post_init__(self):
        _one_of(self, "model", "attention", ("eager", "sdpa", "flex_attention"))
        _one_of(self, "model", "preset", PRESETS)
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise UserError(f"model.image_size: got {self.image_size}, expected a side, or a height and a width.")
        sides = self.image_size if isinstance(self.image_size, list) else [self.image_size]
        if any(side is not None and side < 1 for side in sides):
            raise UserError(f"model.image_size: got {self.image_size}, expected pixels, at least 1.")
        if (self.text is None) != (self.vision is None):
            raise UserError("model.text, model.vision: got one without the other, expected both or neither.")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"model.dtype: got '{self.dtype}', expected 'float32', 'bfloat16' or null.")
        for name in ("gguf_file", "text_revision", "vision_revision", "image_token"):
            if self.text is None and getattr(self, name) is not None:
                raise UserError(
                    f"model.{name}: got '{getattr(self, name)}' without model.text and model.vision, expected null."
                )
        if self.dtype is not None and self.text is None:
            raise UserError(
                f"model.dtype: got '{self.dtype}' without model.text and model.vision, expected null: presets are float32, "
                "and a checkpoint keeps its own."
            )


@dataclass
class DataRecipe:
    """What is trained on: drawn `scenes`, `label_maps`, photographs with per-pixel class indices, `coco`, photographs
    with instances in COCO's format, or a `dataset` of samples of the schema."""

    kind: str = "scenes"
    weight: float = 1.0
    texts: list[str] | None = None
    train: int = 4000
    validation: int = 200
    test: int = 500
    test_seed: int = 0
    images: str | None = None
    labels: str | None = None
    instances: str | None = None
    classes: list[str] | None = None
    ignore: list[int] = field(default_factory=list)
    crop: list[int] = field(default_factory=lambda: [256, 192])
    min_side: float = 0.45
    path: str | None = None
    license: str | None = None
    split: str = "train"
    held_out: float = 0.2
    crops_per_frame: int = 8
    masks: str = "own"
    allow_outside: bool = False

    def __post_init__(self):
        _one_of(self, "data", "kind", TEXTS)
        if self.kind == "label_maps" and not (self.images and self.labels and self.classes):
            raise UserError("data: kind 'label_maps' needs images, labels and classes, got at least one of them empty.")
        if self.kind == "coco" and not (self.images and self.instances):
            raise UserError("data: kind 'coco' needs images and instances, got at least one of them empty.")
        if self.kind == "dataset" and not self.path:
            raise UserError(
                "data.path: got none, expected the folder or Hub name of a data set in the schema of age_vlm.data.schema."
            )
        if self.masks not in ("own", "other"):
            raise UserError(
                f"data.masks: got '{self.masks}', expected 'own', or 'other' for the control with masks of other images."
            )
        if len(self.crop) != 2:
            raise UserError(f"data.crop: got {self.crop}, expected a width and a height.")
        if not 0 < self.min_side <= 1:
            raise UserError(f"data.min_side: got {self.min_side}, expected a share above 0 and up to 1.")
        if not 0 <= self.held_out < 1 or (self.kind in ("label_maps", "coco") and not self.held_out):
            lowest = "above" if self.kind in ("label_maps", "coco") else "from"
            raise UserError(f"data.held_out: got {self.held_out}, expected a share, {lowest} 0 and below 1.")
        if not self.weight > 0:
            raise UserError(f"data.weight: got {self.weight}, expected more than 0.")
        self._check_texts()
        _at_least(self, "data", 1, "train", "validation", "test", "crops_per_frame")

    def _check_texts(self) -> None:
        if self.texts is None:
            return
        possible = TEXTS[self.kind]
        if not possible:
            raise UserError(
                f"data.texts: got {self.texts}, expected null: a data set of kind '{self.kind}' is used whole."
            )
        if not self.texts:
            raise UserError("data.texts: got an empty list, expected at least one kind of text, or null for all.")
        for text in self.texts:
            if text not in possible:
                raise UserError(f"data.texts: got '{text}' for kind '{self.kind}', expected {one_of(text, possible)}.")
        if self.kind == "label_maps" and self.texts == ["count"] and not self.instances:
            raise UserError("data.texts: got count alone, which needs data.instances.")


@dataclass
class WarmStartRecipe:
    """Pretraining of the vision encoder on single images with one label each, without any mask; 0 steps: none."""

    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 2e-3

    def __post_init__(self):
        _at_least(self, "warm_start", 0, "steps", "learning_rate")
        _at_least(self, "warm_start", 1, "batch_size")


@dataclass
class LoraRecipe:
    """Size of the adapters of parts that are trained by `lora`; `alpha` is twice the rank when left out."""

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self):
        _at_least(self, "training.lora", 1, "rank")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"training.lora.alpha: got {self.alpha}, expected more than 0.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"training.lora.dropout: got {self.dropout}, expected a share, from 0 to below 1.")


@dataclass
class TrainingRecipe:
    """Length, batch and optimizer, and for each component of the model whether it is `frozen`, or trained in `full` or by
    `lora`."""

    steps: int = 1000
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float = 2e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.05
    adam_beta2: float = 0.999
    warmup: float = 0.05
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    vision: str = "full"
    projector: str = "full"
    cross_attention: str = "full"
    language_model: str = "full"
    language_model_from: int = 0
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    independent_turns: bool = True
    shared_prefix: bool = False
    max_length: int | None = None
    packing: bool = False
    pack_length: int | None = None
    non_finite: str = "stop"
    spike_threshold: float = 10.0
    log_every: int = 25
    evaluate_every: int = 100
    save_every: int = 0
    workers: int = 0
    save_parts: str = "all"
    encoder_cache: str | None = None
    text_cache: bool = False
    report_to: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def modes(self) -> dict[str, str]:
        """Component -> `frozen`, `full` or `lora`."""
        return {component: getattr(self, component) for component in COMPONENTS}

    def __post_init__(self):
        for component in COMPONENTS:
            possible = COMPONENT_MODES if component in LORA_COMPONENTS else COMPONENT_MODES[:2]
            _one_of(self, "training", component, possible)
        if set(self.modes.values()) == {"frozen"}:
            raise UserError(
                f"training: got 'frozen' for all of {', '.join(COMPONENTS)}, expected at least one that learns."
            )
        for component, rate in self.learning_rates.items():
            if component not in COMPONENTS:
                raise UserError(
                    f"training.learning_rates: got '{component}', expected {one_of(component, COMPONENTS)}."
                )
            if self.modes[component] == "frozen":
                raise UserError(
                    f"training.learning_rates.{component}: got a rate, but training.{component} is 'frozen'."
                )
            if rate < 0:
                raise UserError(f"training.learning_rates.{component}: got {rate}, expected at least 0.")
        _one_of(self, "training", "precision", ("fp32", "bf16", "fp16"))
        _one_of(self, "training", "schedule", LR_SCHEDULES)
        _one_of(self, "training", "non_finite", ("stop", "skip"))
        _one_of(self, "training", "save_parts", ("all", "new"))
        if self.encoder_cache is not None and self.vision != "frozen":
            raise UserError(
                f"training.encoder_cache: got '{self.encoder_cache}' with training.vision '{self.vision}', expected 'frozen': an "
                "encoder that learns has no output to keep."
            )
        if self.text_cache and self.language_model != "frozen" and not self.language_model_from:
            raise UserError(
                f"training.text_cache: got true with training.language_model '{self.language_model}', expected 'frozen', or "
                "training.language_model_from: layers that learn have no output to keep."
            )
        if not 0 <= self.adam_beta2 < 1:
            raise UserError(f"training.adam_beta2: got {self.adam_beta2}, expected at least 0 and below 1.")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"training.warmup: got {self.warmup}, expected a share of the steps, from 0 to 1.")
        if self.shared_prefix and (self.packing or not self.independent_turns):
            raise UserError(
                "training.shared_prefix: got true, expected false with training.packing or without training.independent_turns."
            )
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"training.max_length: got {self.max_length}, expected at least 1, or null for no limit.")
        if self.pack_length is not None and (self.pack_length < 1 or not self.packing):
            raise UserError(
                f"training.pack_length: got {self.pack_length}, expected at least 1, or null for twice the longest sample, "
                "and training.packing."
            )
        self._check_report_to()
        self._check_arguments()
        _at_least(self, "training", 1, "steps", "batch_size", "gradient_accumulation", "log_every", "evaluate_every")
        _at_least(self, "training", 0, "learning_rate", "weight_decay", "max_grad_norm", "save_every", "workers")
        _at_least(self, "training", 0, "spike_threshold", "language_model_from")

    def _check_arguments(self) -> None:
        if not self.arguments:
            return
        from transformers import TrainingArguments

        known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
        for name in self.arguments:
            if name in RECIPE_ARGUMENTS:
                raise UserError(f"training.arguments: got '{name}', which is set by {RECIPE_ARGUMENTS[name]}.")
            if name not in known:
                raise UserError(
                    f"training.arguments: got '{name}', expected fields of TrainingArguments{nearest(name, known)}."
                )

    def _check_report_to(self) -> None:
        if not self.report_to:
            return
        from transformers.integrations.integration_utils import (
            INTEGRATION_TO_CALLBACK,
            get_available_reporting_integrations,
            is_flytekit_available,
        )

        installed = get_available_reporting_integrations()
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                known = sorted(INTEGRATION_TO_CALLBACK)
                raise UserError(f"training.report_to: got '{name}', expected {one_of(name, known)}.")
            # transformers looks for flyte only when it is used.
            if not (is_flytekit_available() if name == "flyte" else name in installed):
                raise UserError(f"training.report_to: got '{name}', which is not installed (pip install {name}).")


@dataclass
class Recipe:
    """One training run, whole. `data` is trained on and measured on; `mix` is trained on beside it."""

    name: str = "age-vlm"
    seed: int = 0
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    mix: list[DataRecipe] = field(default_factory=list)
    warm_start: WarmStartRecipe = field(default_factory=WarmStartRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)

    def __post_init__(self):
        _at_least(self, "", 0, "seed")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


# Kind of data -> kinds of texts it can be asked for.
TEXTS = {
    "scenes": ("caption", "existence", "count", "colour", "relation"),
    "label_maps": ("caption", "existence", "count"),
    "coco": ("presence", "count", "where"),
    "dataset": (),
}
COMPONENT_MODES = ("frozen", "full", "lora")
LORA_COMPONENTS = ("cross_attention", "language_model")
# Of `training`: what becomes of a step that goes wrong, not what is learned from the others.
WATCH_KEYS = ("non_finite", "spike_threshold")
# Those of transformers that need nothing but the number of steps.
LR_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


# Field of `TrainingArguments` that `training.arguments` may not set -> what sets it.
RECIPE_ARGUMENTS = {
    "output_dir": "--output",
    "max_steps": "training.steps",
    "num_train_epochs": "training.steps",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "adam_beta2": "training.adam_beta2",
    "warmup_steps": "training.warmup",
    "lr_scheduler_type": "training.schedule",
    "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "use_cpu": "the machine",
    "logging_steps": "training.log_every",
    "logging_nan_inf_filter": "training.non_finite",
    "save_strategy": "training.save_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.save_every",
    "activation_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing_kwargs": "training.gradient_checkpointing",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "report_to": "training.report_to",
    "run_name": "name",
    "remove_unused_columns": "the collator, which needs all",
    "dataloader_num_workers": "training.workers",
    "seed": "seed",
    "disable_tqdm": "the terminal",
    # A recipe is written into the run folder and onto the model card: no place for a secret.
    "hub_token": "`hf auth login`",
}


def _one_of(recipe: Any, section: str, name: str, known: Collection[str]) -> None:
    if (given := getattr(recipe, name)) not in known:
        raise UserError(f"{section}.{name}: got '{given}', expected {one_of(given, known)}.")


def _at_least(recipe: Any, section: str, lowest: float, *names: str) -> None:
    for name in names:
        if not getattr(recipe, name) >= lowest:
            where = f"{section}.{name}" if section else name
            raise UserError(f"{where}: got {getattr(recipe, name)}, expected at least {lowest}.")
