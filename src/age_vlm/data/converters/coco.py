"""Captions of COCO, grounded where they literally name what instances or panoptic segments show, and questions about its
instances."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..instance_questions import ASKED, check_asked
from ..label_maps import CAPTION_REQUEST
from ..masks import MaskRLE, encode_mask, union
from ..rejects import Rejects, Unusable, reported
from ..schema import Sample
from .chats import Turn, line, sample_of
from .coco_instances import Asking, Choice, Things, category_of, survey
from .geometry import EMPTY
from .images import ImageFolder, open_image, require_size
from .index import Index, identity
from .mentions import Vocabulary
from .records import CocoFile, existing_file, read_coco
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
    captions: str | Path | None = None,
    instances: str | Path | None = None,
    panoptic: str | Path | None = None,
    segments: str | Path | None = None,
    *,
    request: str = CAPTION_REQUEST,
    per_image: int | None = None,
    questions: Sequence[str] = (),
    per_kind: int = 3,
    min_area: float = 0.005,
    seed: int = 0,
    split: str | None = None,
    held_out: float = 0.2,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """A sample for each image: each of its captions answers `request`, then come questions about its instances.

    A word that names a category of the image is grounded in all that is annotated of it, crowds included: "a dog" next
    to a second dog means both. Annotations of the part's images are read into memory, the images one by one. With
    questions, images without captions are used, too, and `instances` is read twice: what POPE asks depends on all images.

    Args:
        images: the folder of the images, such as `train2017`.
        captions: `captions_train2017.json`; without it there have to be questions.
        instances: `instances_train2017.json`: masks of things.
        panoptic: `panoptic_train2017.json`: masks of everything, used for what `instances` has no category for.
        segments: its folder of PNGs; beside the file and named like it, unless told.
        per_image: at most so many captions of an image, the first.
        questions: some of `presence`, `count` and `where`, see `training_turns` in `age_vlm.data.instance_questions`. They
            depend on `seed` and the image's identifier alone, and need `instances`, all of whose categories have to be
            annotated in all of its images.
        per_kind: at most so many questions of a kind about an image; of presence, so many with yes and so many with no.
        min_area: share of an image's area below which a category is neither asked about nor counted as absent, and below
            which an instance makes its category impossible to count.
        split: `train`, `validation` or `test`, by the image's identifier alone; all images unless told. POPE's statistics
            are of the training images where there is a split, and else of all that `instances` has.
        held_out: share of the images that are not in `train`, half of it `validation`, half `test`.
        allow_outside: see `ImageFolder`.

    Raises UserError for arguments that do not fit together.

    Source: https://cocodataset.org/#format-data; https://arxiv.org/abs/2305.10355 for the questions about presence.
    """
    asking = (
        Asking(tuple(questions), per_kind, min_area, seed) if _check(captions, instances, panoptic, questions) else None
    )
    choice = Choice(split, held_out)
    folder = ImageFolder(images, "images", allow_outside)
    pngs = None
    if panoptic is not None:
        beside = segments_beside(existing_file(panoptic, "panoptic"))
        pngs = ImageFolder(beside if segments is None else segments, "segments", allow_outside)
    with reported(rejects, "coco") as rejects:
        empty = CocoFile.empty(rejects)
        texts = empty if captions is None else read_coco(captions, "captions", rejects)
        listed = dict(texts.images.items())
        if asking:
            seen = survey(instances, "instances")
            asking.statistics = seen.statistics(choice)
            # An image that the captions list twice, differently, stays left out.
            listed |= {number: item for number, item in seen.images.items() if number not in texts.images}
        chosen = {number: listed[number] for number in choice.of(listed, shard, folder, rejects)}
        things = empty if instances is None else read_coco(instances, "instances", rejects, chosen)
        stuff = empty if panoptic is None else read_coco(panoptic, "panoptic", rejects, chosen)
        known = {name for _, name in things.categories.items()}
        categories = known | {name for _, name in stuff.categories.items()}
        vocabulary = Vocabulary({**{name: category_words(name) for name in sorted(categories)}, "": COMPOUNDS})
        for number, described in chosen.items():
            if number not in texts.annotations and asking is None:
                rejects.add("image has no captions", number)
                continue
            own = Things(things, number, rejects)
            stuff_of = partial(_stuff_masks, stuff, number, pngs, known, rejects)
            said = list(islice(texts.annotations_of(number), per_image))
            others = [file.images.get for file in (things, stuff) if number in file.images]
            arguments = number, described, others, said, own, stuff_of, vocabulary, folder, request, asking, rejects
            if (sample := rejects.attempt(number, _sample, *arguments)) is not None:
                yield sample


def _check(
    captions: str | Path | None, instances: str | Path | None, panoptic: str | Path | None, questions: Sequence[str]
) -> bool:
    """Whether questions are asked for.

    Raises:
        UserError: the arguments do not fit together.
    """
    check_asked(questions)
    if captions is None and instances is None:
        raise UserError("captions, instances: got neither, expected a file for at least one of them.")
    if questions and instances is None:
        raise UserError(f"questions: got {list(questions)} without instances, expected a file of what they are about.")
    if captions is None and not questions:
        raise UserError(f"questions: got none, and no captions, expected some of {', '.join(ASKED)}.")
    if captions is None and panoptic is not None:
        raise UserError("panoptic: got a file without captions, expected none: it grounds their words alone.")
    return bool(questions)


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
    captions: list[dict[str, Any]],
    things: Things,
    stuff_of: Callable[[tuple[int, int]], dict[str, list[MaskRLE]]],
    vocabulary: Vocabulary,
    folder: ImageFolder,
    request: str,
    asking: Asking | None,
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
        return things.masks(size) | stuff_of(size)

    @cache
    def mask_of(categories: frozenset[str]) -> MaskRLE | None:
        masks = [mask for name in sorted(categories) for mask in annotated().get(name, ())]
        return union(masks) if masks else None

    def said(caption: dict[str, Any]) -> Turn:
        text = line(caption["caption"])
        found = [(start, end, mask_of(categories), None) for start, end, categories in vocabulary.find(text)]
        return Turn(request, text, in_answer=[phrase for phrase in found if phrase[2] is not None])

    each = [rejects.attempt(f"caption of {number}", said, caption) for caption in captions]
    turns = [turn for turn in each if turn is not None]
    if asking and not turns:
        turns = asking.turns(things, size)
    elif asking:
        turns += rejects.attempt(f"questions of {number}", asking.turns, things, size) or ()
    return sample_of(f"coco/{number}", image, turns)


def _stuff_masks(
    stuff: CocoFile, number: str, folder: ImageFolder | None, known: set[str], rejects: Rejects, size: tuple[int, int]
) -> dict[str, list[MaskRLE]]:
    masks = defaultdict(list)
    for annotation in stuff.annotations_of(number):
        read = rejects.attempt(f"panoptic {number}", _read_segments, folder, annotation, size, rejects)
        ids, segments = (None, ()) if read is None else read
        for segment in segments:
            record = f"segment {segment.get('id')} of {number}"
            name = rejects.attempt(record, category_of, stuff, segment)
            if name is None or name in known:
                continue
            mask = rejects.attempt(record, _segment_mask, ids, segment)
            if mask is not None:
                masks[name].append(mask)
    return masks


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
