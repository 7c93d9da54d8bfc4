"""Recipes: YAML files that say everything about a training run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..configuration import PRESETS
from .alignment import AlignmentConfig


@dataclass
class ModelRecipe:
    """Where the model comes from: a `preset` with random weights, two pretrained `backbones`, or a saved `checkpoint`."""

    preset: str = "age-vlm-tiny"
    text: str | None = None
    vision: str | None = None
    checkpoint: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    image_size: int | list[int] | None = None
    attention: str = "sdpa"

    def __post_init__(self):
        if self.attention not in ("eager", "sdpa", "flex_attention"):
            raise ValueError(f"model.attention: got '{self.attention}', expected 'eager', 'sdpa' or 'flex_attention'.")
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise ValueError(f"model.image_size: got {self.image_size}, expected a side, or a height and a width.")
        if self.preset not in PRESETS:
            nearest = get_close_matches(self.preset, PRESETS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"model.preset: got '{self.preset}', expected one of {', '.join(PRESETS)} (nearest: '{nearest}')."
            )
        if (self.text is None) != (self.vision is None):
            raise ValueError("model.text, model.vision: got one without the other, expected both or neither.")


@dataclass
class DataRecipe:
    """What is trained on: drawn `scenes`, or `label_maps`, photographs with per-pixel class indices."""

    kind: str = "scenes"
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
    held_out: float = 0.2
    crops_per_frame: int = 8
    masks: str = "own"

    def __post_init__(self):
        if self.kind not in ("scenes", "label_maps"):
            raise ValueError(f"data.kind: got '{self.kind}', expected 'scenes' or 'label_maps'.")
        if self.kind == "label_maps" and not (self.images and self.labels and self.classes):
            raise ValueError(
                "data: kind 'label_maps' needs images, labels and classes, got at least one of them empty."
            )
        if self.masks not in ("own", "other"):
            raise ValueError(
                f"data.masks: got '{self.masks}', expected 'own', or 'other' for the control with masks of other pictures."
            )
        if len(self.crop) != 2:
            raise ValueError(f"data.crop: got {self.crop}, expected a width and a height.")
        _at_least(self, "data", 1, "train", "validation", "test", "crops_per_frame")


@dataclass
class WarmStartRecipe:
    """Pretraining of the vision encoder on single pictures with one label each, without any mask; 0 steps: none."""

    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 2e-3

    def __post_init__(self):
        _at_least(self, "warm_start", 0, "steps", "learning_rate")
        _at_least(self, "warm_start", 1, "batch_size")


@dataclass
class TrainingRecipe:
    """Length, batch and optimizer. `train` names the parts that learn; the others keep their weights."""

    steps: int = 1000
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    train: list[str] = field(default_factory=lambda: ["vision", "projector", "cross_attention", "language_model"])
    log_every: int = 25
    evaluate_every: int = 100
    workers: int = 0

    def __post_init__(self):
        unknown = [part for part in self.train if part not in PARTS]
        if unknown:
            nearest = get_close_matches(unknown[0], PARTS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"training.train: got '{unknown[0]}', expected parts of {', '.join(PARTS)} (nearest: '{nearest}')."
            )
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"training.precision: got '{self.precision}', expected 'fp32', 'bf16' or 'fp16'.")
        if self.schedule not in SCHEDULES:
            nearest = get_close_matches(self.schedule, SCHEDULES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"training.schedule: got '{self.schedule}', expected one of {', '.join(SCHEDULES)} (nearest: '{nearest}')."
            )
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"training.warmup: got {self.warmup}, expected a share of the steps, from 0 to 1.")
        _at_least(self, "training", 1, "steps", "batch_size", "gradient_accumulation", "log_every", "evaluate_every")
        _at_least(self, "training", 0, "learning_rate", "weight_decay", "max_grad_norm", "workers")


@dataclass
class Recipe:
    """One training run, whole."""

    name: str = "age-vlm"
    seed: int = 0
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    warm_start: WarmStartRecipe = field(default_factory=WarmStartRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)

    def __post_init__(self):
        _at_least(self, "", 0, "seed")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


PARTS = ("vision", "projector", "cross_attention", "language_model")
# Those of transformers that need nothing but the number of steps.
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def _at_least(recipe: Any, section: str, lowest: float, *names: str) -> None:
    for name in names:
        if not getattr(recipe, name) >= lowest:
            where = f"{section}.{name}" if section else name
            raise ValueError(f"{where}: got {getattr(recipe, name)}, expected at least {lowest}.")


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads a recipe; `overrides` are `section.key=value` with values in YAML.

    Raises:
        ValueError: one sentence, for a file that is not there or no YAML, an unknown key (with the nearest one), or a
            value of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe: '{path}' is not a file, expected a YAML file.")
    try:
        values = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: '{path}' is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe: '{path}' holds {values!r}, expected keys and values.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override: got '{override}', expected section.key=value.")
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"override: '{section}' in '{override}' has no keys of its own.")
        try:
            target[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"override: the value in '{override}' is not YAML: {reason}.") from None
    return build(Recipe, values)


def build(cls: type, values: Any, where: str = ""):
    """A dataclass from plain values, strictly: unknown keys and values of another type are errors."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'recipe'}: got {values!r}, expected keys and values.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            nearest = get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name}: unknown key, expected one of {', '.join(hints)} (nearest: '{nearest}').")
        if hints[key] is float and isinstance(value, str):
            value = _number(value)
        if dataclasses.is_dataclass(hints[key]):
            value = build(hints[key], value, name)
        elif not _fits(value, hints[key]):
            raise ValueError(f"{name}: got {value!r}, expected {_shown(hints[key])}.")
        elif hints[key] is float:
            value = float(value)
        arguments[key] = value
    return cls(**arguments)


def _number(text: str) -> float | str:
    """YAML 1.1 reads 2e-3, without a point, as text."""
    try:
        return float(text)
    except ValueError:
        return text


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is dict:
        return isinstance(value, dict)
    if origin is not None:
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
