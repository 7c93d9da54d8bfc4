"""Data that is to be grounded: read row by row without decoding images, and made into samples and prompts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
from PIL import Image

from ..data.converters.geometry import clipped_box
from ..data.converters.images import open_image
from ..data.masks import MaskRLE, decode_mask
from ..data.rejects import MALFORMED, Unusable
from ..data.schema import FEATURES, assistant_message, grounding, message_text, user_message, validate_sample
from ..errors import UserError
from ..processing.images_agevlm import load_rgb
from .teacher import Prompt


REQUEST = "describe the picture."
"""What is asked of an image whose phrases come without a chat."""

Row = dict[str, Any]


@dataclass
class Phrase:
    """A phrase of a sample, as far as it is known before a teacher is asked.

    Attributes:
        number: place in the sample's own list of groundings.
        item: the grounding without its mask.
        prompt: what a teacher is told.
    """

    number: int
    item: dict[str, Any]
    prompt: Prompt


class Refusal(NamedTuple):
    """A phrase that cannot be asked about: its place in the sample's own list, its words, and why."""

    number: int
    phrase: str
    reason: str
    detail: str = ""


@dataclass
class Unit:
    """A sample with what it takes to ask a teacher about it.

    Attributes:
        sample: of the schema, with undecoded images and no groundings.
        images: its images, upright and RGB.
        phrases: what may be asked.
        refused: the others.
    """

    sample: Row
    images: list[Image.Image]
    phrases: list[Phrase]
    refused: list[Refusal]


class Source:
    """Rows by number, from a `datasets.Dataset`, a sequence, or anything that can be iterated more than once.

    Args:
        data: rows of the schema (whose groundings need no mask), or rows with `image` and `phrases`, see `make_unit`.
        fingerprint: names the content. By default that of the data set; other data is read once to make one.

    Raises:
        UserError: there are no rows, or they can be read only once.
    """

    def __init__(self, data: Any, fingerprint: str | None = None) -> None:
        if isinstance(data, datasets.Dataset):
            # Storage instead of values: an image stays the file it was, and a damaged one stops nothing.
            data, fingerprint = data.with_format("arrow"), fingerprint or data._fingerprint
            _require_columns(data.column_names)
        elif isinstance(data, datasets.IterableDataset):
            data = data.decode(False)
        elif not isinstance(data, Iterable) and not _is_sequence(data):
            raise UserError(f"data: got a {type(data).__name__}, expected a data set, a list of rows or the like.")
        elif isinstance(data, Iterator):
            raise UserError(
                f"data: got a {type(data).__name__}, which can be read only once, expected a list, a data set or another "
                "thing that can be read again when a run continues."
            )
        self._data = data
        self._stream, self._position = iter(()), 0
        self._length, self.fingerprint = len(data) if _is_sequence(data) else -1, fingerprint or ""
        if self._length < 0 or not self.fingerprint:
            self._read_through()
        if self._length == 0:
            raise UserError("data: got no rows, expected at least one.")

    def __len__(self) -> int:
        return self._length

    def _read_through(self) -> None:
        digest, rows = hashlib.sha256(), 0
        for rows, row in enumerate(self._all(), start=1):
            if rows == 1:
                _require_columns(row)
            digest.update(_digest(row))
        self._length = rows
        self.fingerprint = self.fingerprint or digest.hexdigest()

    def _all(self) -> Iterator[Row]:
        return (self._data[place] for place in range(len(self._data))) if _is_sequence(self._data) else iter(self._data)

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows [start, stop)."""
        if isinstance(self._data, datasets.Dataset):
            return self._data[start:stop].to_pylist()
        if _is_sequence(self._data):
            return [self._data[place] for place in range(start, stop)]
        if start < self._position:
            self._position = 0
        if self._position == 0:
            self._stream = iter(self._data)
        rows = list(itertools.islice(self._stream, start - self._position, stop - self._position))
        self._position = stop
        return rows


def _is_sequence(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _require_columns(columns: Iterable[str]) -> None:
    columns = set(columns)
    if not set(FEATURES) <= columns and not {"image", "phrases"} <= columns:
        raise UserError(
            f"data: got the columns {', '.join(sorted(columns))}, expected those of the schema "
            f"({', '.join(sorted(FEATURES))}), or image and phrases."
        )


def _digest(row: Row) -> bytes:
    """Of all that is read of a row; an image counts by its file, or by its pixels where it has none."""
    said = {name: row.get(name) for name in ("id", "messages", "groundings", "phrases", "boxes", "caption")}
    digest = hashlib.sha256(json.dumps(said, default=repr).encode())
    for image in row.get("images") or [row.get("image")]:
        try:
            stored = _stored(image)
        except Unusable as error:
            digest.update(str(error).encode())
        else:
            digest.update(stored.get("bytes") or str(stored.get("path")).encode())
    return digest.digest()


def make_unit(row: Row, name: str) -> Unit:
    """A row as a sample with prompts.

    Rows are of the schema; or they have `image` and `phrases`, a list of texts, and where known `boxes`, a list of
    [x0, y0, x1, y1] or None for each phrase, `caption`, a text in which the phrases stand, and `id`. A grounding may
    also have `points`, a list of [x, y], and `labels`, a list of 1 or 0 for each.

    Args:
        name: the id of a row that has none.

    Raises:
        Unusable: an image cannot be read, or the row follows neither form.
    """
    try:
        refused: list[Refusal] = []
        sample = dict(row) if "messages" in row else _from_phrases(row, name, refused)
        stored = [_embedded(image) for image in sample["images"] or []]
        opened = [open_image(image) for image in stored]
        items = sample["groundings"] or []
        sample = {"id": sample["id"], "images": opened, "messages": sample["messages"], "groundings": []}
        validate_sample(sample)
        images = [_upright(image) for image in opened]
        unit = Unit({**sample, "images": stored}, images, [], refused)
        for number, item in enumerate(items):
            if item is None:
                continue
            try:
                unit.phrases.append(_make_phrase(sample, number, item, images))
            except Unusable as error:
                detail = "" if error.__cause__ is None else str(error.__cause__)
                refused.append(Refusal(number, _words(sample, item), str(error), detail))
        return unit
    except MALFORMED as error:
        raise Unusable("it does not follow the schema") from error


def _from_phrases(row: Row, name: str, refused: list[Refusal]) -> Row:
    phrases = [" ".join(phrase.split()) for phrase in row["phrases"] or []]
    boxes = row.get("boxes") or [None] * len(phrases)
    if len(boxes) != len(phrases):
        raise UserError(f"{len(boxes)} boxes for {len(phrases)} phrases")
    text = row.get("caption") or ", ".join(phrases)
    if not text:
        raise Unusable("it has neither phrases nor a caption")
    groundings: list[Row | None] = []
    # From left to right, so that the second "a man" of a text is the second of the phrases.
    reached: dict[str, int] = {}
    for number, (phrase, box) in enumerate(zip(phrases, boxes)):
        start = text.lower().find(phrase.lower(), reached.get(phrase.lower(), 0)) if phrase else -1
        if start < 0:
            refused.append(Refusal(number, phrase, "it is not in the caption" if phrase else "it has no words"))
            groundings.append(None)
            continue
        reached[phrase.lower()] = start + len(phrase)
        groundings.append(grounding(1, start, start + len(phrase), 0, None, box))
    return {
        "id": name if row.get("id") is None else str(row["id"]),
        "images": [row["image"]],
        "messages": [user_message(REQUEST, images=1), assistant_message(text)],
        "groundings": groundings,
    }


def _make_phrase(sample: Row, number: int, item: Row, images: list[Image.Image]) -> Phrase:
    """Raises `Unusable` with the reason why the phrase cannot be asked about."""
    try:
        place = (item["message"], item["start"], item["end"], item["image"])
        image, box, mask = images[item["image"]], item.get("box"), item.get("mask")
        # Some tools write a missing mask as one whose parts are missing.
        mask = None if mask == {"size": None, "counts": None} else mask
        box = None if box is None else clipped_box(box, image.width, image.height)
        validate_sample({**sample, "groundings": [grounding(*place, mask, box)]})
        prompt = Prompt(
            phrase=message_text(sample["messages"][item["message"]])[item["start"] : item["end"]],
            box=_bounds(mask) if box is None else tuple(box),
            points=tuple((float(x), float(y)) for x, y in item.get("points") or ()),
            labels=tuple(item["labels"]) if item.get("labels") else None,
            mask=mask,
        )
        if mask is not None:
            decode_mask(mask)
    except MALFORMED as error:
        raise Unusable("it does not follow the schema") from error
    return Phrase(number, grounding(*place, None, box), prompt)


def _bounds(mask: MaskRLE | None) -> tuple[float, float, float, float] | None:
    """The box of a mask that the data already has, None for an empty one: a teacher is told the place by it."""
    if mask is None:
        return None
    rows, columns = (np.flatnonzero(decode_mask(mask).any(axis)) for axis in (1, 0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)) if len(rows) else None


def _words(sample: Row, item: Row) -> str:
    try:
        return message_text(sample["messages"][item["message"]])[item["start"] : item["end"]]
    except MALFORMED:
        return ""


def _upright(image: Image.Image) -> Image.Image:
    try:
        return load_rgb(image)
    except ValueError as error:
        raise Unusable("image cannot be read") from error


def _stored(image: Any) -> dict[str, Any]:
    """An image as storage has it, `{"bytes", "path"}`: its file, or where it has none a lossless new one."""
    if image is None:
        raise Unusable("image is missing")
    if isinstance(image, dict):
        return image
    try:
        # datasets 4.0 knows paths as text alone.
        return datasets.Image().encode_example(str(image) if isinstance(image, Path) else image)
    # Values of any type come here, and Pillow raises nearly anything for an image it cannot write.
    except Exception:
        raise Unusable("image cannot be read") from None


def _embedded(image: Any) -> dict[str, Any]:
    """The same with its bytes, so that the output needs no other file."""
    stored = _stored(image)
    path = stored.get("path") or None
    content = stored.get("bytes")
    if content is None:
        if path is None:
            raise Unusable("image is missing")
        try:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            raise Unusable("image file is missing") from None
        except ImportError as error:
            raise Unusable("image path needs a package that is not installed") from error
        # A path can be of any storage that fsspec knows, and each raises errors of its own.
        except Exception:
            raise Unusable("image file cannot be read") from None
    # Only the name: where the file lay is nobody's business.
    return {"bytes": content, "path": path and path.rpartition("/")[2]}
