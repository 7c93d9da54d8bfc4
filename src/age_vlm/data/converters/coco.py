"""Captions of COCO, grounded where they literally name what instances or panoptic segments show."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..label_maps import CAPTION_REQUEST
from ..masks import MaskRLE, encode_mask
from ..rejects import Rejects, Unusable, reported
from ..schema import Sample
from .chats import Phrase, line, statements
from .geometry import EMPTY, segmentation_mask, union
from .images import ImageFolder, open_image, require_size
from .index import Index, identity
from .mentions import Vocabulary
from .records import CocoFile, existing_file, read_coco, shard_of
from .refcoco import image_names


SYNONYMS = {
    "person": "man woman boy girl child kid baby toddler guy lady gentleman adult player skier snowboarder surfer "
    "skateboarder rider pedestrian".split(),
    "bicycle": ["bike"],
    "motorcycle": ["motorbike", "bike"],
    "airplane": ["plane", "aeroplane", "jet", "aircraft"],
    "boat": ["ship", "sailboat", "canoe", "kayak"],
    "traffic light": ["stoplight", "traffic signal"],
    "fire hydrant": ["hydrant"],
    "cat": ["kitten"],
    "dog": ["puppy"],
    "horse": ["pony"],
    "sheep": ["lamb"],
    "cow": ["cattle", "calf", "bull"],
    "handbag": ["purse"],
    "tie": ["necktie"],
    "suitcase": ["luggage"],
    "skis": ["ski"],
    "sports ball": ["ball", "soccer ball", "tennis ball"],
    "baseball glove": ["mitt", "catcher's mitt"],
    "tennis racket": ["racket", "tennis racquet", "racquet"],
    "wine glass": ["wineglass"],
    "donut": ["doughnut"],
    "couch": ["sofa"],
    "potted plant": ["houseplant", "plant"],
    "dining table": ["table"],
    "tv": ["television", "monitor"],
    "cell phone": ["phone", "cellphone", "mobile phone", "smartphone"],
    "remote": ["remote control"],
    "refrigerator": ["fridge"],
    "teddy bear": ["stuffed bear", "teddy"],
    "hair drier": ["hair dryer", "hairdryer", "blow dryer"],
    "mountain": ["hill"],
    "pavement": ["sidewalk"],
    "playingfield": ["playing field", "field"],
    "railroad": ["railroad track", "railway", "train track"],
    "road": ["street"],
    "rug": ["carpet"],
    "sea": ["ocean"],
    "window-blind": ["blind"],
}
"""Category, without what panoptic names append -> other words for it."""

COMPOUNDS = (
    "toilet paper",
    "train station",
    "train track",
    "bus stop",
    "bus station",
    "car park",
    "bird house",
    "dog house",
)
"""Words that hold the name of a category, and mean something else."""


def coco(
    images: str | Path,
    captions: str | Path,
    instances: str | Path | None = None,
    panoptic: str | Path | None = None,
    segments: str | Path | None = None,
    *,
    request: str = CAPTION_REQUEST,
    per_image: int | None = None,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """A sample for each image, in which each of its captions answers `request`.

    A word that names a category of the image is grounded in all that is annotated of it, crowds included: "a dog" next
    to a second dog means both. Annotations of the part's images are read into memory, the images one by one.

    Args:
        images: the folder of the images, such as `train2017`.
        captions: `captions_train2017.json`.
        instances: `instances_train2017.json`: masks of things.
        panoptic: `panoptic_train2017.json`: masks of everything, used for what `instances` has no category for.
        segments: its folder of PNGs; beside the file and named like it, unless told.
        per_image: at most so many captions of an image, the first.
        allow_outside: see `ImageFolder`.

    Source: https://cocodataset.org/#format-data
    """
    folder = ImageFolder(images, "images", allow_outside)
    pngs = None
    if panoptic is not None:
        beside = segments_beside(existing_file(panoptic, "panoptic"))
        pngs = ImageFolder(beside if segments is None else segments, "segments", allow_outside)
    with reported(rejects, "coco") as rejects:
        texts = read_coco(captions, "captions", rejects)
        chosen = dict(shard_of(texts.images.items(), shard))
        empty = CocoFile.empty(rejects)
        things = empty if instances is None else read_coco(instances, "instances", rejects, chosen)
        stuff = empty if panoptic is None else read_coco(panoptic, "panoptic", rejects, chosen)
        known = {name for _, name in things.categories.items()}
        categories = known | {name for _, name in stuff.categories.items()}
        vocabulary = Vocabulary({**{name: category_words(name) for name in sorted(categories)}, "": COMPOUNDS})
        for number, described in chosen.items():
            if number not in texts.annotations:
                rejects.add("image has no captions", number)
                continue
            masks_of = (
                partial(_thing_masks, things, number, rejects),
                partial(_stuff_masks, stuff, number, pngs, known, rejects),
            )
            said = islice(texts.annotations_of(number), per_image)
            others = [file.images.get for file in (things, stuff) if number in file.images]
            arguments = number, described, others, said, masks_of, vocabulary, folder, request, rejects
            if (sample := rejects.attempt(number, _sample, *arguments)) is not None:
                yield sample


def segments_beside(panoptic: Path) -> Path:
    """Where the PNGs of a panoptic file are, unless told."""
    return panoptic.with_suffix("")


def category_words(category: str) -> list[str]:
    """What a category is called in a text: "wall-brick" -> "brick wall", "wall"; "tree-merged" -> "tree"."""
    name = re.sub(r"(-(other|merged|stuff))+$", "", category)
    kind, _, material = name.partition("-")
    own = [f"{material} {kind}", kind] if material else [name]
    return [*own, *SYNONYMS.get(name, ())]


def segment_ids(colors: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 colours of a panoptic PNG -> (height, width) int32 segment ids, R + 256 G + 256^2 B."""
    return colors.astype(np.int32) @ np.array([1, 256, 256**2], np.int32)


def _sample(
    number: str,
    described: dict[str, Any],
    others: list[Callable[[str], dict[str, Any]]],
    captions: Iterator[dict[str, Any]],
    masks_of: tuple[Callable[[tuple[int, int]], dict[str, list[MaskRLE]]], ...],
    vocabulary: Vocabulary,
    folder: ImageFolder,
    request: str,
    rejects: Rejects,
) -> Sample:
    names = {image_names(found["file_name"])[-1] for found in (described, *(find(number) for find in others))}
    if len(names) > 1:
        raise Unusable("files name different images for one identifier")
    image = open_image(folder.find(image_names(described["file_name"])))
    size = described["width"], described["height"]
    require_size(image, *size)

    @cache
    def annotated() -> dict[str, list[MaskRLE]]:
        return {name: masks for find in masks_of for name, masks in find(size).items()}

    @cache
    def mask_of(categories: frozenset[str]) -> MaskRLE | None:
        masks = [mask for name in sorted(categories) for mask in annotated().get(name, ())]
        return union(masks) if masks else None

    def said(caption: dict[str, Any]) -> tuple[str, list[Phrase]]:
        text = line(caption["caption"])
        found = [(start, end, mask_of(categories), None) for start, end, categories in vocabulary.find(text)]
        return text, [phrase for phrase in found if phrase[2] is not None]

    each = (rejects.attempt(f"caption of {number}", said, caption) for caption in captions)
    return statements(f"coco/{number}", image, request, (caption for caption in each if caption is not None))


def _thing_masks(things: CocoFile, number: str, rejects: Rejects, size: tuple[int, int]) -> dict[str, list[MaskRLE]]:
    masks = defaultdict(list)
    for annotation in things.annotations_of(number):
        record = f"annotation {annotation.get('id')}"
        mask = rejects.attempt(record, lambda item: segmentation_mask(item["segmentation"], *size), annotation)
        name = rejects.attempt(record, _category, things, annotation)
        if mask is not None and name is not None:
            masks[name].append(mask)
    return masks


def _stuff_masks(
    stuff: CocoFile, number: str, folder: ImageFolder | None, known: set[str], rejects: Rejects, size: tuple[int, int]
) -> dict[str, list[MaskRLE]]:
    masks = defaultdict(list)
    for annotation in stuff.annotations_of(number):
        read = rejects.attempt(f"panoptic {number}", _read_segments, folder, annotation, size, rejects)
        ids, segments = (None, ()) if read is None else read
        for segment in segments:
            record = f"segment {segment.get('id')} of {number}"
            name = rejects.attempt(record, _category, stuff, segment)
            if name is None or name in known:
                continue
            mask = rejects.attempt(record, _segment_mask, ids, segment)
            if mask is not None:
                masks[name].append(mask)
    return masks


def _category(file: CocoFile, annotation: dict[str, Any]) -> str:
    return file.categories.get(annotation["category_id"])


def _read_segments(
    folder: ImageFolder, annotation: dict[str, Any], size: tuple[int, int], rejects: Rejects
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The segment id of every pixel, and what is said of each segment."""
    segments: Index[dict[str, Any]] = Index("segment", rejects)
    for segment in annotation["segments_info"]:
        segments.add(segment["id"], segment)
    png = open_image(folder.find([annotation["file_name"]]))
    require_size(png, *size)
    return segment_ids(np.asarray(png.convert("RGB"))), [segment for _, segment in segments.items()]


def _segment_mask(ids: np.ndarray, segment: dict[str, Any]) -> MaskRLE:
    mask = ids == int(identity(segment["id"]))
    if not mask.any():
        raise Unusable(EMPTY)
    return encode_mask(mask)
