"""Polygons, run-length encodings and boxes of other formats as masks and boxes of the schema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

from ..masks import MaskRLE, decode_mask, mask_size
from ..rejects import Unusable


EMPTY = "annotation covers nothing of the image"


def segmentation_mask(segmentation: Any, width: int, height: int) -> MaskRLE:
    """A COCO `segmentation` as a compressed RLE of that size in pixels: polygons, an uncompressed RLE (crowds), or a
    compressed one.

    Raises:
        Unusable: it is malformed, of another size, or covers no pixel.
    """
    if isinstance(segmentation, dict):
        rle = _encoded(segmentation, width, height)
    else:
        rle = coco.merge(coco.frPyObjects(_polygons(segmentation, width, height), height, width))
    if coco.area(rle) == 0:
        raise Unusable(EMPTY)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def clipped_box(box: Sequence[float], width: int, height: int) -> list[float]:
    """The part of a box [x0, y0, x1, y1] in pixels that lies in an image of that size.

    Raises:
        Unusable: it is not four numbers, or lies outside.
    """
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise Unusable("box is malformed")
    x0, y0, x1, y1 = (min(max(float(value), 0.0), float(side)) for value, side in zip(box, [width, height] * 2))
    if not (x0 < x1 and y0 < y1):
        raise Unusable(EMPTY)
    return [x0, y0, x1, y1]


def _polygons(polygons: Any, width: int, height: int) -> list[list[float]]:
    # The C code of pycocotools takes four numbers for a box, and draws along edges however far out they lead.
    if not isinstance(polygons, (list, tuple)) or not all(isinstance(part, (list, tuple)) for part in polygons):
        raise Unusable("polygon is malformed")
    parts = [[float(value) for value in part] for part in polygons if len(part) >= 6]
    if not parts or any(len(part) % 2 or not all(map(math.isfinite, part)) for part in parts):
        raise Unusable("polygon is malformed")
    for part in parts:
        if not all(-side <= value <= 2 * side for axis, side in ((0, width), (1, height)) for value in part[axis::2]):
            raise Unusable(EMPTY)
    return parts


def _encoded(rle: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    try:
        size = mask_size(rle)
    except ValueError:
        raise Unusable("mask is malformed") from None
    if size != (height, width):
        raise Unusable("image is not of the size that its annotations are for")
    counts = rle.get("counts")
    if isinstance(counts, (list, tuple, np.ndarray)):
        # It trusts the runs as well: what they leave open would be memory of other things.
        if any(not isinstance(run, (int, np.integer)) or run < 0 for run in counts) or sum(counts) != height * width:
            raise Unusable("mask is malformed")
        return coco.frPyObjects({"size": [height, width], "counts": [int(run) for run in counts]}, height, width)
    try:
        decode_mask(rle)
    except ValueError:
        raise Unusable("mask is malformed") from None
    return {"size": [height, width], "counts": counts.encode("ascii") if isinstance(counts, str) else counts}
