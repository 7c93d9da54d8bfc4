"""The model card of a model that a recipe trained."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import yaml
from huggingface_hub import DatasetCard

from ..cards import ANY_QUESTION, config_components, read_license, render_card
from ..configuration import AgeVlmConfig
from ..configuration.configuration_agevlm import LOCAL_FOLDER, is_local
from .recipe import DataRecipe, Recipe
from .sources import DataSource


def model_card(
    recipe: Recipe,
    metrics: Mapping[str, Mapping[str, float]],
    environment: Mapping[str, object],
    source: DataSource,
    config: AgeVlmConfig,
) -> str:
    """Markdown with the Hub's metadata in front, for a model that a recipe trained.

    Args:
        metrics: metrics on the test split, by row.
        environment: versions and machine that they were measured with.
        config: of the model, which knows what it was built from, also where the recipe starts from a checkpoint.
    """
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    questions = {"scenes": "is there a red circle in the picture ?"}
    if recipe.data.kind == "label_maps":
        questions["label_maps"] = f"is there a {recipe.data.classes[0]} ?"
    aligned = recipe.alignment.weight or recipe.alignment.final_weight
    # What it was trained on, and the checkpoint that it began with: that knows what went into it.
    licenses = [data_license(data) for data in (recipe.data, *recipe.mix)]
    if recipe.model.checkpoint is not None:
        licenses.append(read_license(str(config.name_or_path)))
    return render_card(
        components=config_components(config),
        licenses=licenses,
        title=recipe.name,
        language="en",
        question=questions.get(recipe.data.kind, ANY_QUESTION),
        aligned=", which was aligned\nwith masks of what the words name" if aligned else "",
        recipe=recipe,
        data_name=recipe.data.path and _shown(recipe.data.path),
        recipe_yaml=yaml.safe_dump(_without_paths(dataclasses.asdict(recipe)), sort_keys=False),
        columns=list(metrics),
        metrics=[(name, [row.get(name) for row in metrics.values()]) for name in names],
        environment=environment,
        train_samples=source.train_samples,
        train_images=len(getattr(source.train, "numbers", ())),
        test_images=len(source.test),
        from_scratch=recipe.model.text is None and recipe.model.checkpoint is None,
    )


def data_license(data: DataRecipe) -> str | None:
    """The licence of what a recipe trains on: as it says, or as the data set's own card does; `None` where neither does."""
    if data.license is not None or data.kind in ("label_maps", "coco"):
        return data.license
    # Drawn scenes come with age-vlm.
    return "apache-2.0" if data.kind == "scenes" else read_license(data.path, DatasetCard)


def _shown(name: str) -> str:
    """A name as a card may show it to anyone: that of a local folder or file says nothing but where it lay."""
    return LOCAL_FOLDER if is_local(name) else name


def _without_paths(value, key: str = ""):
    if isinstance(value, dict):
        return {name: _without_paths(each, name) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(each) for each in value]
    if not isinstance(value, str) or not (key in _NAMES or os.path.isabs(value) or value.startswith("~")):
        return value
    return LOCAL_FOLDER if key in _FOLDERS else _shown(value)


# Keys of a recipe that name something to be read: always a folder, or else perhaps a repository of the Hub.
_FOLDERS = ("images", "labels", "instances")


_NAMES = (*_FOLDERS, "text", "vision", "checkpoint", "path", "name_or_path", "_name_or_path")
