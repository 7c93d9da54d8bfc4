"""Region descriptions of Visual Genome: a phrase and a box each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..rejects import Rejects, Unusable, reported
from ..schema import Sample, upright_size
from .chats import REGION_REQUEST, Phrase, line, statements
from .geometry import clipped_box
from .images import ImageFolder, open_image
from .index import Index, identity
from .records import read_json, shard_of


_FOLDERS = ("", "VG_100K/", "VG_100K_2/", "images/", "images2/")


def visual_genome(
    images: str | Path,
    regions: str | Path,
    *,
    request: str = REGION_REQUEST,
    per_image: int | None = None,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """A sample for each image, in which each region description answers `request`, with a box and no mask yet.

    There are no questions such as `coco` asks: nobody looked for everything, so what is not named may be there.

    Args:
        images: the folder of `<image id>.jpg`, or that of `VG_100K` and `VG_100K_2`.
        regions: `region_descriptions.json`.
        per_image: at most so many regions of an image, the first; there are 50 on average.
        allow_outside: see `ImageFolder`.

    Source: https://homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html
    """
    folder = ImageFolder(images, "images", allow_outside)
    records = shard_of((record for _, record in read_json(regions, "regions")), shard)
    with reported(rejects, "visual_genome") as rejects:
        seen: Index[None] = Index("image", rejects)
        for number, record in enumerate(records):
            name = f"record {shard[0] + number * shard[1]}"
            sample = rejects.attempt(name, _sample, record, folder, request, per_image, rejects)
            if sample is not None and seen.add(_number(record), None):
                yield sample


def _number(record: dict[str, Any]) -> str:
    # Both keys stand for the image; older releases have only `id`.
    numbers = {identity(record[key]) for key in ("image_id", "id") if key in record} or {identity(record["id"])}
    if len(numbers) > 1:
        raise Unusable("identifiers of the record do not agree")
    return numbers.pop()


def _sample(
    record: dict[str, Any], folder: ImageFolder, request: str, per_image: int | None, rejects: Rejects
) -> Sample:
    number = _number(record)
    image = open_image(folder.find(f"{folder_name}{number}.jpg" for folder_name in _FOLDERS))
    size = upright_size(image)
    said = (rejects.attempt(f"region of {number}", _region, region, number, size) for region in record["regions"])
    usable = (region for region in said if region is not None)
    return statements(f"visual_genome/{number}", image, request, islice(usable, per_image))


def _region(region: dict[str, Any], number: str, size: tuple[int, int]) -> tuple[str, list[Phrase]]:
    if "image_id" in region and identity(region["image_id"]) != number:
        raise Unusable("region is of another image")
    text = line(region["phrase"])
    x, y = region["x"], region["y"]
    return text, [(0, len(text), None, clipped_box([x, y, x + region["width"], y + region["height"]], *size))]
