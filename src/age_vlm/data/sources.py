"""What a recipe's `data` section means: training samples, evaluation pictures, words, pictures for a warm start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from .questions import EvaluationItem
from .schema import Sample


if TYPE_CHECKING:
    from ..training.recipe import DataRecipe


@dataclass
class DataSource:
    """
    Attributes:
        train: samples of the schema.
        validation, test: pictures with questions, none of which is trained on.
        tokenizer: made from the words of this data, for a language model that starts from scratch.
        pictures: `{"image", "label"}` and the number of labels, to warm a vision encoder up, where the data has such.
        prior: class -> share of the training pictures that show it, where a text-only guess could use it.
    """

    train: Dataset
    validation: list[EvaluationItem]
    test: list[EvaluationItem]
    tokenizer: PreTrainedTokenizerFast
    pictures: tuple[Dataset, int] | None = None
    prior: dict[str, float] | None = None


class MasksOfOthers(Dataset):
    """Every grounding with a mask of another sample: the control that has masks, but not the right ones."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        # The next sample that has any; a control with its own masks would be none.
        others = ((index + step) % len(self) for step in range(1, len(self)))
        candidates = ([grounding["mask"] for grounding in self.samples[other]["groundings"]] for other in others)
        masks = next(filter(None, candidates), None) if sample["groundings"] else None
        if masks is None:
            return {**sample, "groundings": []}
        # At random: texts name classes in the same order, and the same class lies in the same place in many photographs.
        chosen = np.random.default_rng(index).integers(len(masks), size=len(sample["groundings"]))
        groundings = [{**grounding, "mask": masks[number]} for grounding, number in zip(sample["groundings"], chosen)]
        return {**sample, "groundings": groundings}


def load_source(recipe: DataRecipe, seed: int) -> DataSource:
    """Builds the data that a recipe names. `seed` chooses training samples; evaluation pictures do not depend on it."""
    source = _scenes(recipe, seed) if recipe.kind == "scenes" else _label_maps(recipe, seed)
    if recipe.masks == "other":
        source.train = MasksOfOthers(source.train)
    return source


def _scenes(recipe: DataRecipe, seed: int) -> DataSource:
    from .scene_datasets import IconsDataset, ScenesDataset, scene_items
    from .scenes import SceneConfig
    from .scenes_tokenizer import build_scenes_tokenizer

    config = SceneConfig()
    return DataSource(
        train=ScenesDataset("train", recipe.train, seed),
        validation=scene_items("validation", recipe.validation),
        test=scene_items("test", recipe.test, recipe.test_seed),
        tokenizer=build_scenes_tokenizer(),
        pictures=(IconsDataset(8000, seed, side=config.size // 2), len(config.kinds)),
    )


def _label_maps(recipe: DataRecipe, seed: int) -> DataSource:
    from .label_maps import LabelMaps, LabelMapsDataset, class_prior, class_statistics, label_map_items, label_map_texts
    from .scenes_tokenizer import build_word_tokenizer

    maps = LabelMaps(recipe.images, recipe.labels, recipe.classes, ignore=recipe.ignore, instances=recipe.instances)
    split = maps.split(recipe.held_out)
    size = tuple(recipe.crop)
    statistics = class_statistics(split.train, size=size)
    validation, test = (
        label_map_items(part, statistics, size=size, per_frame=recipe.crops_per_frame)
        for part in (split.validation, split.test)
    )
    return DataSource(
        train=LabelMapsDataset(split.train, length=recipe.train, seed=seed, size=size),
        validation=_spread(validation, recipe.validation),
        test=_spread(test, recipe.test),
        tokenizer=build_word_tokenizer(label_map_texts(recipe.classes)),
        prior=class_prior(split.train, size=size),
    )


def _spread(items: list[EvaluationItem], number: int) -> list[EvaluationItem]:
    """At most so many items, from all over the list: neighbours in a recording look alike."""
    return items if len(items) <= number else [items[i * len(items) // number] for i in range(number)]
