"""What a recipe's `data` section means: training samples, evaluation images, words, images for a warm start."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..data.held_out import HeldOutImages, StoredImage, warn_of_held_out
from ..data.masks import MaskRLE, decode_mask, encode_mask
from ..data.mix import Mix
from ..data.questions import EvaluationItem, Question
from ..data.sample_names import sample_name
from ..data.schema import FEATURES, Message, Sample, message_text, upright_size
from ..data.stored import image_outside, load_stored
from ..errors import UserError, reading


if TYPE_CHECKING:
    import datasets

    from .recipe import DataRecipe, Recipe


@dataclass
class DataSource:
    """
    Attributes:
        train: samples of the schema.
        validation, test: images with questions, none of which is trained on.
        texts: gives texts that together hold every word of this data.
        tokenizer: made from these words, for a language model that starts from scratch.
        images: `{"image", "label"}` and the number of labels, to warm a vision encoder up, where the data has such.
        prior: class -> share of the training images that show it, where a text-only guess could use it.
        held_out: the images behind `validation` and `test`, where they are files that other data may have too.
    """

    train: Dataset
    validation: list[EvaluationItem]
    test: list[EvaluationItem]
    texts: Callable[[], Iterable[str]]
    icons: tuple[Dataset, int] | None = None
    prior: dict[str, float] | None = None
    held_out: HeldOutImages = field(default_factory=HeldOutImages)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        # Not before it is asked for: a large data set has to be read for it, and pretrained models bring their own.
        from ..data.scenes_tokenizer import build_word_tokenizer

        return build_word_tokenizer(self.texts())

    @property
    def train_samples(self) -> int:
        """How many different samples there are to train on: a mixture draws some of them again and again."""
        return self.train.different if isinstance(self.train, Mix) else len(self.train)


class MasksOfOthers(Dataset):
    """Every grounding with a mask of another sample: the control that has masks, but not the right ones."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        own = [grounding["mask"] for grounding in sample["groundings"]]
        # The next sample that has any; a control with its own masks would be none, as where one image has two samples.
        others = ((index + step) % len(self) for step in range(1, len(self)))
        candidates = (
            [mask for item in self.samples[other]["groundings"] if _is_mask(mask := item["mask"]) and mask not in own]
            for other in others
        )
        masks = next(filter(None, candidates), None) if own else None
        if masks is None:
            return {**sample, "groundings": []}
        # At random: texts name classes in the same order, and the same class lies in the same place in many photographs.
        chosen = np.random.default_rng(index).integers(len(masks), size=len(own))
        groundings = [
            # One without a mask of its own is refused with it, as without this control.
            {
                **item,
                "mask": _stretched(masks[number], sample["images"][item["image"]]) if _is_mask(item["mask"]) else None,
            }
            for item, number in zip(sample["groundings"], chosen)
        ]
        return {**sample, "groundings": groundings}


def _is_mask(mask: MaskRLE | None) -> bool:
    return bool(mask and mask["counts"])


def _stretched(mask: MaskRLE, image: PIL.Image.Image) -> MaskRLE:
    """The mask at the size of that image. It keeps a pixel at least, however small it becomes."""
    size = upright_size(image)
    if tuple(mask["size"]) == size[::-1]:
        return mask
    pixels = PIL.Image.fromarray(decode_mask(mask).astype(np.float32))
    covered = np.asarray(pixels.resize(size, PIL.Image.Resampling.BOX))
    return encode_mask((covered > 0) & (covered >= min(0.5, covered.max())))


def load_sources(recipe: Recipe) -> DataSource:
    """The data of a whole recipe: what `data` says, and for training mixed with what `mix` says."""
    source = load_source(recipe.data, recipe.seed)
    if not recipe.mix:
        return source
    # Seeds far apart: parts that are drawn shall not be the same images.
    others = [
        load_source(part, recipe.seed + 1_000_003 * number, evaluation=False, held_out=source.held_out)
        for number, part in enumerate(recipe.mix, start=1)
    ]
    sources, training = [source, *others], recipe.training
    draws = training.steps * training.batch_size * training.gradient_accumulation
    mix = Mix(
        [part.train for part in sources],
        [part.weight for part in (recipe.data, *recipe.mix)],
        length=draws * int(os.environ.get("WORLD_SIZE", 1)),
        seed=recipe.seed,
    )
    return replace(source, train=mix, texts=lambda: chain.from_iterable(part.texts() for part in sources))


def load_source(
    recipe: DataRecipe, seed: int, *, evaluation: bool = True, held_out: HeldOutImages | None = None
) -> DataSource:
    """Builds the data that a recipe names. `seed` chooses training samples; evaluation images do not depend on it.

    No image is in two of training, validation and test, under whatever name: what is held out leaves training.

    Args:
        evaluation: whether there are images to evaluate on.
        held_out: images of other data that are not to be trained on either.

    Raises:
        UserError: one sentence, for data that is not there or not as it should be.
    """
    source = {"scenes": _scenes, "label_maps": _label_maps, "coco": _coco, "dataset": _dataset}[recipe.kind](
        recipe, seed, evaluation, held_out or HeldOutImages()
    )
    if recipe.masks == "other":
        source.train = MasksOfOthers(source.train)
    return source


def check_paths(recipe: Recipe) -> None:
    """Raises UserError, one sentence, for a folder of data that is not there, before anything is read."""
    for name, data in (("data", recipe.data), *((f"mix.{i}", part) for i, part in enumerate(recipe.mix))):
        if data.kind == "label_maps":
            for key in ("images", "labels", "instances"):
                folder = getattr(data, key)
                if folder is None:
                    continue
                with reading(f"{name}.{key}", folder):
                    if not Path(folder).is_dir():
                        raise UserError(f"{name}.{key}: '{folder}' is not a folder, expected one.")
        elif data.kind == "coco":
            with reading(f"{name}.images", data.images):
                if not Path(data.images).is_dir():
                    raise UserError(f"{name}.images: '{data.images}' is not a folder, expected one.")
            with reading(f"{name}.instances", data.instances):
                if not Path(data.instances).is_file():
                    raise UserError(f"{name}.instances: '{data.instances}' is not a file, expected COCO's JSON.")
        elif data.kind == "dataset" and not Path(data.path).is_dir() and not re.fullmatch(_HUB_NAME, data.path):
            raise UserError(f"{name}.path: '{data.path}' is not a folder, expected one, or the Hub name of a data set.")


_HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"


def _scenes(recipe: DataRecipe, seed: int, evaluation: bool, held_out: HeldOutImages) -> DataSource:
    from ..data.scene_datasets import IconsDataset, ScenesDataset, scene_items
    from ..data.scene_questions import scene_texts
    from ..data.scenes import SceneConfig

    config = SceneConfig()
    return DataSource(
        train=ScenesDataset("train", recipe.train, seed, texts=recipe.texts),
        validation=scene_items("validation", recipe.validation) if evaluation else [],
        test=scene_items("test", recipe.test, recipe.test_seed) if evaluation else [],
        texts=scene_texts,
        # With 8,000 the encoder learns them by heart, and mistakes one in 25 others.
        icons=(IconsDataset(24_000, seed, side=config.size // 2), len(config.kinds)),
    )


def _label_maps(recipe: DataRecipe, seed: int, evaluation: bool, held_out: HeldOutImages) -> DataSource:
    from ..data.label_map_items import class_prior, class_statistics, label_map_items
    from ..data.label_maps import LabelMaps, LabelMapsDataset, label_map_texts

    maps = LabelMaps(
        recipe.images,
        recipe.labels,
        recipe.classes,
        ignore=recipe.ignore,
        instances=recipe.instances,
        allow_outside=recipe.allow_outside,
    )
    split = maps.split(recipe.held_out)
    files = [StoredImage.of_file(image) for _, image, *_ in split.train.frames.files]
    trained = [number for number, file in enumerate(files) if not held_out.hold([file])]
    if not trained:
        raise UserError(f"mix: all photographs of '{recipe.images}' are held out by `data`, expected one to train on.")
    warn_of_held_out(len(split.train) - len(trained), recipe.images)
    split = split._replace(train=maps.subset(split.train.frames.take(trained)))
    crops = {"size": tuple(recipe.crop), "min_side": recipe.min_side}
    source = DataSource(
        train=LabelMapsDataset(split.train, length=recipe.train, seed=seed, texts=recipe.texts, **crops),
        validation=[],
        test=[],
        texts=lambda: label_map_texts(recipe.classes),
        prior=class_prior(split.train, **crops),
    )
    if evaluation:
        source.held_out.add(StoredImage.of_file(image) for part in split[1:] for _, image, *_ in part.frames.files)
        statistics = class_statistics(split.train, **crops)
        source.validation, source.test = (
            _spread(label_map_items(part, statistics, per_frame=recipe.crops_per_frame, **crops), number)
            for part, number in ((split.validation, recipe.validation), (split.test, recipe.test))
        )
    return source


def _coco(recipe: DataRecipe, seed: int, evaluation: bool, held_out: HeldOutImages) -> DataSource:
    from .coco_source import coco_splits

    train, validation, test, own = coco_splits(recipe, seed, evaluation, held_out)
    indices = range(min(len(train), len(train.numbers)))
    return DataSource(
        train,
        validation,
        test,
        texts=lambda: chain(
            train.categories, (message_text(message) for index in indices for message in train[index]["messages"])
        ),
        held_out=own,
    )


def _dataset(recipe: DataRecipe, seed: int, evaluation: bool, held_out: HeldOutImages) -> DataSource:
    samples = open_dataset(recipe.path, recipe.split, allow_outside=recipe.allow_outside)
    kept = len(samples) - round(len(samples) * recipe.held_out)
    middle = (kept + len(samples)) // 2
    own = HeldOutImages()
    validation: Sequence[int] = range(kept, middle)
    if evaluation:
        own.add_samples(samples, range(middle, len(samples)))
        validation = own.others(samples, validation)
        own.add_samples(samples, validation)
    train = held_out.others(samples, own.others(samples, range(kept)))
    if not train:
        raise UserError(
            f"data.path: '{recipe.path}' has {len(samples)} samples, expected one to train on at least whose images are "
            "not held out."
        )
    warn_of_held_out(kept - len(train), recipe.path)
    source = DataSource(
        train=samples.select(range(kept) if len(train) == kept else train),
        validation=[],
        test=[],
        texts=lambda: (
            message_text(message) for row in samples.select_columns("messages") for message in row["messages"]
        ),
        held_out=own,
    )
    if evaluation:
        source.validation = yes_no_items(samples, validation, recipe.validation)
        source.test = yes_no_items(samples, range(middle, len(samples)), recipe.test)
        if not source.test:
            warnings.warn(
                f"data.path: the held-out part of '{recipe.path}' asks no question about one image that is answered by "
                "yes or no, so there will be no metrics.",
                stacklevel=3,
            )
    return source


def open_dataset(path: str, split: str = "train", *, allow_outside: bool = False) -> datasets.Dataset:
    """A data set of the schema, see `load_stored`.

    Args:
        allow_outside: open images that are stored as paths or URLs that lead out of the data set's folder.

    Raises:
        UserError: one sentence, where there is none, one without the columns of the schema, or with images elsewhere.
    """
    samples = load_stored(path, split, "data.path")
    missing = [column for column in FEATURES if column not in samples.column_names]
    if missing:
        raise UserError(f"data.path: '{path}' lacks the columns {', '.join(missing)} of the schema.")
    chat = samples.select_columns(["messages"])[0]["messages"] if len(samples) else None
    if any(isinstance(message["content"], str) for message in chat or ()):
        raise UserError(
            f"data.path: '{path}' has messages whose content is a text, expected a list of parts like "
            '{"type": "text", "text": ...}.'
        )
    if samples.features["images"] != FEATURES["images"]:
        # Written by other tools, images are bytes without a type.
        samples = samples.cast_column("images", FEATURES["images"])
    if not allow_outside and (outside := image_outside(samples, path)) is not None:
        raise UserError(
            f"data.path: '{path}' has an image at '{outside}', expected images inside of it (`save_to_disk` puts them "
            "there), or data.allow_outside: true."
        )
    return samples


def yes_no_items(samples: Sequence[Sample], numbers: Sequence[int], most: int) -> list[EvaluationItem]:
    """Samples with one image and a question that is answered by yes or no, as images to evaluate on.

    A question's phrase and mask are those of its first grounding, where it has any.

    Args:
        numbers: which samples are looked at.
        most: at most so many are taken, from all over them.
    """
    # Without the images: they are not decoded just to be looked through.
    chats = samples.select_columns(["messages"]) if hasattr(samples, "select_columns") else samples
    asking = [number for number in numbers if any(_yes_no_turns(chats[number]["messages"]))]
    items = []
    for number in _spread(asking, most):
        try:
            sample = samples[number]
        # Decoders of damaged images raise nearly anything.
        except Exception as error:
            raise UserError(f"held-out data: {sample_name(samples, number)} could not be read: {error}.") from error
        image_id = f"{number}:{sample['id']}"
        questions = []
        for message, text, answer in _yes_no_turns(sample["messages"]):
            asked = (
                g for g in sample["groundings"] or () if g["message"] == message and (g["mask"] or {}).get("counts")
            )
            first = next(asked, None)
            phrase, mask = ((first["start"], first["end"]), first["mask"]) if first else (None, None)
            question = Question(f"{image_id}/{message}", image_id, text, answer, "existence", None, phrase, mask)
            questions.append(question)
        items.append(EvaluationItem(image_id, sample["images"][0], tuple(questions)))
    return items


def _yes_no_turns(messages: Sequence[Message]) -> Iterator[tuple[int, str, str]]:
    """Number and text of each question of a chat about one image that is answered by a bare yes or no, and which."""
    counts = [
        number for number, message in enumerate(messages) for part in message["content"] if part["type"] == "image"
    ]
    if len(counts) != 1:
        return
    for number, (message, reply) in enumerate(pairwise(messages)):
        answer = message_text(reply).strip().rstrip(".").lower()
        if message["role"] == "user" and reply["role"] == "assistant" and answer in ("yes", "no"):
            if number >= counts[0]:
                yield number, message_text(message), answer


def _spread(items: list, number: int) -> list:
    """At most so many items, from all over the list: neighbours in a recording look alike."""
    return items if len(items) <= number else [items[i * len(items) // number] for i in range(number)]
