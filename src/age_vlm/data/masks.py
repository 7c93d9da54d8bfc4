"""Binary masks as COCO run-length encodings, the form in which every dataset of this package stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from pycocotools import mask as coco

from ..errors import UserError


class MaskRLE(TypedDict):
    """A compressed COCO RLE: `size` is [height, width] in pixels, `counts` the runs as ASCII text."""

    size: list[int]
    counts: str


def encode_mask(mask: np.ndarray) -> MaskRLE:
    """Encode a boolean mask of shape (height, width), both at least 1.

    Raises:
        UserError: the mask is not a two-dimensional boolean array, or it has no pixels.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.size == 0:
        raise UserError(
            f"mask is an array of shape {mask.shape} and type {mask.dtype}, expected bool of shape (height, width)."
        )
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: MaskRLE | dict[str, Any]) -> np.ndarray:
    """Decode a COCO RLE to a boolean array of shape (height, width).

    Raises:
        UserError: `size` or `counts` is missing or malformed, or the runs do not fill the size exactly.
    """
    height, width = mask_size(rle)
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = counts.encode("ascii", errors="replace")
    if not isinstance(counts, bytes):
        raise UserError(f"mask counts: got {type(counts).__name__}, expected the ASCII text of a compressed COCO RLE.")
    # The C decoder trusts its input: runs that end too soon would leave pixels unset, so they are added up here first.
    if _total_run_length(counts) != height * width:
        raise UserError(f"mask counts does not describe {height} x {width} pixels, expected runs that fill the size.")
    return coco.decode({"size": [height, width], "counts": counts}).astype(bool)


def union(masks: Sequence[MaskRLE]) -> MaskRLE:
    """The mask of all pixels in any of these masks, at least one, of one size."""
    if len(masks) == 1:
        return masks[0]
    rle = coco.merge([_bytes(mask) for mask in masks])
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mask_share(rle: MaskRLE) -> float:
    """The share of the image's pixels that lie in the mask, 0 to 1, without decoding it."""
    return int(coco.area(_bytes(rle))) / (rle["size"][0] * rle["size"][1])


def _bytes(rle: MaskRLE) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def mask_size(rle: MaskRLE | dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of an RLE, without decoding it.

    Raises:
        UserError: there is no `size`, or it is not two positive integers.
    """
    size = rle.get("size") if isinstance(rle, dict) else None
    if (
        not isinstance(size, (list, tuple, np.ndarray))
        or len(size) != 2
        or not all(isinstance(side, (int, np.integer)) and side > 0 for side in size)
    ):
        raise UserError(f"mask size: got {size!r}, expected [height, width] as two positive integers.")
    return int(size[0]), int(size[1])


def _total_run_length(counts: bytes) -> int:
    """Sum of the runs of a compressed COCO RLE; -1 when it is cut off or has a negative run.

    The format (maskApi.c of the COCO API): runs are base-32 digits, least significant first, offset by 48, with 0x20 as
    the "more follows" bit; from the fourth run on, the value is the difference to the run two places before.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for byte in counts:
        digit = byte - 48
        if not 0 <= digit < 64:
            return -1
        value |= (digit & 0x1F) << (5 * shift)
        shift += 1
        if digit & 0x20:
            continue
        if digit & 0x10:
            value |= -1 << (5 * shift)
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            return -1
        runs.append(value)
        value, shift = 0, 0
    return sum(runs) if shift == 0 else -1
