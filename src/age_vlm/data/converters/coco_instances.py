"""What COCO's instances say an image shows: masks for words, questions, statistics of all images, and splits by image."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError, one_of
from ..held_out import HeldOutImages, StoredImage
from ..instance_questions import Shown, training_turns
from ..instance_questions import Turn as AskedTurn
from ..masks import MaskRLE
from ..questions import KindStatistics
from ..rejects import Rejects, Unusable
from .chats import Turn, line
from .geometry import segmentation_mask
from .images import ImageFolder
from .index import Index, identity
from .records import CocoFile, read_json, shard_of
from .refcoco import image_names


SPLITS = ("train", "validation", "test")


class Things:
    """The instances of one image, read when they are first asked for and counted once where they cannot be used.

    Args:
        file: of instances, with the annotations of that image.
        number: `identity` of the image.
    """

    def __init__(self, file: CocoFile, number: str, rejects: Rejects) -> None:
        self.file, self.number, self.rejects = file, number, rejects
        self._read: list[tuple[str | None, MaskRLE | None, dict[str, Any]]] | None = None

    def masks(self, size: tuple[int, int]) -> dict[str, list[MaskRLE]]:
        """Category -> masks of all that is annotated of it, in an image of that width and height."""
        masks = defaultdict(list)
        for name, mask, _ in self._annotations(size):
            if mask is not None and name is not None:
                masks[name].append(mask)
        return masks

    def shown(self, size: tuple[int, int], min_area: float) -> Shown:
        """What is there and what is not.

        Raises:
            Unusable: what is not there cannot be told, because the image is not in the file or an annotation of it is of
                nobody knows what.
        """
        if self.number not in self.file.images:
            raise Unusable("instances lack the image, so what it shows is unknown")
        if self.number in self.file.annotations and not self.file.annotations[self.number].is_whole:
            raise Unusable("annotations of the image share an identifier, so what is absent is unknown")
        instances, crowds, unclear = defaultdict(list), defaultdict(list), set()
        words = category_words_of(self.file.categories)
        for name, mask, annotation in self._annotations(size):
            if name is None and not _has_identity(annotation.get("category_id")):
                raise Unusable("an annotation of the image has no category, so what is absent is unknown")
            if (word := words.get(name)) is None:  # of no category that is asked about
                continue
            if mask is None:
                unclear.add(word)
            else:
                (crowds if annotation.get("iscrowd") else instances)[word].append(mask)
        return Shown(f"coco/{self.number}", {*words.values()}, instances, crowds, unclear, min_area)

    def _annotations(self, size: tuple[int, int]) -> list[tuple[str | None, MaskRLE | None, dict[str, Any]]]:
        if self._read is None:
            self._read = []
            for annotation in self.file.annotations_of(self.number):
                record = f"annotation {annotation.get('id')}"
                attempt = partial(self.rejects.attempt, record)
                mask = attempt(lambda item: segmentation_mask(item["segmentation"], *size), annotation)
                self._read.append((attempt(category_of, self.file, annotation), mask, annotation))
        return self._read


def category_of(file: CocoFile, annotation: Mapping[str, Any]) -> str:
    """The name of an annotation's category.

    Raises:
        Unusable: it has none that is known.
    """
    return file.categories.get(annotation["category_id"])


def category_words_of(categories: Index[str]) -> dict[str, str]:
    """Name of each category that can be a word of a question -> that word, in one line."""
    unreported = Rejects()
    words = {name: unreported.attempt(name, line, name) for _, name in categories.items()}
    return {name: word for name, word in words.items() if word is not None}


def _has_identity(value: Any) -> bool:
    try:
        return bool(identity(value))
    except Unusable:
        return False


@dataclass
class Asking:
    """What to ask about images for training, see `training_turns`. The statistics are of the training images.

    Raises:
        UserError: a number that cannot be.
    """

    questions: tuple[str, ...]
    per_kind: int
    min_area: float
    seed: int
    statistics: KindStatistics[str] = field(default_factory=KindStatistics)

    def __post_init__(self) -> None:
        check_numbers(per_kind=self.per_kind, min_area=self.min_area, seed=self.seed)

    def turns(self, things: Things, size: tuple[int, int]) -> list[Turn]:
        """The questions about one image of that width and height.

        Raises:
            Unusable: there is nothing to ask.
        """
        shown = things.shown(size, self.min_area)
        asked = training_turns(shown, self.statistics, self.questions, per_kind=self.per_kind, seed=self.seed)
        if not asked:
            raise Unusable("nothing is clear enough to ask about")
        return grounded(asked)


def grounded(asked: Iterable[AskedTurn]) -> list[Turn]:
    """Questions as turns of a chat, each with its category's word grounded where it is there."""
    return [
        Turn(turn.question, turn.answer, [] if turn.mask is None else [(*turn.span, turn.mask, None)]) for turn in asked
    ]


def check_numbers(*, min_area: float, seed: int, **counts: int) -> None:
    """Raises UserError, one sentence, for a number out of its range; `counts` are from 1 on."""
    for name, count in counts.items():
        if not _is_number(count, int) or count < 1:
            raise UserError(f"{name}: got {count!r}, expected a whole number from 1 on.")
    if not _is_number(min_area, (int, float)) or not 0 <= min_area < 1:
        raise UserError(f"min_area: got {min_area!r}, expected a share of the image, from 0 to below 1.")
    if not _is_number(seed, int) or seed < 0:
        raise UserError(f"seed: got {seed!r}, expected a whole number from 0 on.")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class Choice:
    """Which images are used: all, or those of a split.

    Args:
        split: one of `SPLITS`, or None for all images. An image's split depends on its identifier alone, so the image is
            in the same one in every file, whatever other images there are.
        held_out: share of the images that are not in `train`: half of it is `validation`, half `test`.

    Raises:
        UserError: an unknown split, or a share that is none.
    """

    def __init__(self, split: str | None = None, held_out: float = 0.2) -> None:
        if split is not None and split not in SPLITS:
            raise UserError(f"split: got {split!r}, expected {one_of(split, SPLITS)}, or None for all images.")
        if not _is_number(held_out, (int, float)) or not 0 < held_out < 1:
            raise UserError(f"held_out: got {held_out!r}, expected a share of the images, above 0 and below 1.")
        self.split, self.held_out = split, held_out

    def split_of(self, number: str) -> str:
        """The split of an image, by its `identity`."""
        share = int.from_bytes(hashlib.blake2b(number.encode(), digest_size=8).digest(), "big") / 2**64
        return "train" if share >= self.held_out else "test" if share < self.held_out / 2 else "validation"

    def is_trained(self, number: str) -> bool:
        """Whether statistics of training images are also of this one."""
        return self.split is None or self.split_of(number) == "train"

    def of(
        self, images: Mapping[str, Mapping[str, Any]], shard: tuple[int, int], folder: ImageFolder, rejects: Rejects
    ) -> Iterator[str]:
        """The images of a part of the split, without those whose file is, byte for byte, in a later split, too."""
        if self.split is None:
            yield from shard_of(images, shard)
            return
        splits = {number: self.split_of(number) for number in images}
        later = HeldOutImages()
        after = SPLITS[SPLITS.index(self.split) + 1 :]
        later.add(stored_image(images[number], folder) for number, split in splits.items() if split in after)
        for number in shard_of((number for number, split in splits.items() if split == self.split), shard):
            if len(later) and later.hold([stored_image(images[number], folder)]):
                rejects.add("image is held out under another identifier", number)
            else:
                yield number


def stored_image(image: Mapping[str, Any], folder: ImageFolder) -> StoredImage | None:
    """The file of an image of the annotations; None where it is not there."""
    # What cannot be found is said when its sample is made.
    path = Rejects().attempt("", lambda: folder.find(image_names(image["file_name"])))
    return None if path is None else StoredImage.of_file(path)


class Survey(NamedTuple):
    """What a whole file of instances lists, without what it outlines.

    Attributes:
        images: by `identity`.
        shown: `identity` of an image -> those of the categories annotated in it.
        categories: names by `identity`.
    """

    images: Index[dict[str, Any]]
    shown: dict[str, set[str]]
    categories: Index[str]

    def statistics(self, choice: Choice) -> KindStatistics[str]:
        """How often categories are annotated, alone and together, in the training images: as POPE counts, of any size."""
        words = category_words_of(self.categories)
        names = {number: words.get(name) for number, name in self.categories.items()}
        return KindStatistics.count(
            sorted({names[kind] for kind in self.shown.get(number, ()) if names.get(kind) is not None})
            for number, _ in self.images.items()
            if choice.is_trained(number)
        )


def survey(file: str | Path, argument: str) -> Survey:
    """Read a file of instances for what its images show. What cannot be used is passed over: `read_coco` counts it."""
    unreported = Rejects()
    seen = Survey(Index("image", unreported), defaultdict(set), Index("category", unreported))
    add: dict[str, Callable[[dict[str, Any]], Any]] = {
        "images": lambda item: seen.images.add(item["id"], item),
        "categories": lambda item: seen.categories.add(item["id"], line(item["name"]) and item["name"]),
        "annotations": lambda item: seen.shown[identity(item["image_id"])].add(identity(item["category_id"])),
    }
    for key, item in read_json(file, argument):
        if key in add:
            unreported.attempt(key, add[key], item)
    return seen
