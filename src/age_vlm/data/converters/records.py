"""Annotation files and tables, read record by record: some are larger than memory."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import datasets

from ...errors import UserError
from ..rejects import LeftOut, Unusable
from .index import Index, identity


_CHUNK = 1 << 20  # characters
_IN_NUMBERS = frozenset("0123456789.eE+-")
_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()

Table = str | Path | datasets.Dataset | datasets.IterableDataset


class CocoFile(NamedTuple):
    """The parts of a file in the format of COCO: images, annotations of each image, names of categories.

    The keys of `annotations` are an image's `identity`. An image has at most one panoptic annotation, which has no
    identifier of its own.
    """

    images: Index[dict[str, Any]]
    annotations: dict[str, Index[dict[str, Any]]]
    categories: Index[str]

    @classmethod
    def empty(cls, left_out: LeftOut) -> CocoFile:
        """A file without any."""
        return cls(Index("image", left_out), {}, Index("category", left_out))

    def annotations_of(self, image: str) -> list[dict[str, Any]]:
        """All annotations of an image, by its `identity`, that can be used."""
        return [item for _, item in self.annotations[image].items()] if image in self.annotations else []


def existing_folder(folder: str | Path, argument: str) -> Path:
    """The folder as a path.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{argument} must be a folder, got {str(folder)!r}, which is none.")
    return Path(folder)


def existing_file(file: str | Path, argument: str) -> Path:
    """The file as a path.

    Raises:
        UserError: there is no such file.
    """
    if not Path(file).is_file():
        raise UserError(f"{argument} must be a file, got {str(file)!r}, which is none.")
    return Path(file)


def part_of(records: Iterable[Any], part: tuple[int, int]) -> Iterator[Any]:
    """Every `part[1]`-th record, from number `part[0]` on."""
    return islice(records, part[0], None, part[1])


def read_json(file: str | Path, argument: str) -> Iterator[tuple[str | None, Any]]:
    """The entries of a JSON file, read piece by piece.

    An object gives (key, value), and where the value is an array (key, element) for each of its elements; an array, and
    the lines of a file that ends in `.jsonl`, give (None, element). A line that is no JSON gives (None, None).

    Raises:
        UserError: there is no such file, or it is not JSON to its end.
    """
    path = existing_file(file, argument)
    with path.open(encoding="utf-8-sig") as stream:
        try:
            if path.suffix == ".jsonl":
                yield from ((None, _parsed(line)) for line in stream if line.strip())
            else:
                yield from _Reader(stream).entries()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{argument} must be a whole JSON file, got {str(path)!r}: {error}.") from None


def read_coco(file: str | Path, argument: str, left_out: LeftOut, wanted: Container[str] | None = None) -> CocoFile:
    """A file in the format of COCO, with the annotations of all images or of those whose `identity` is wanted."""
    result = CocoFile.empty(left_out)
    # The images may come after the annotations.
    unplaced: dict[str, list[str]] = defaultdict(list)

    def add(name: str, key: str | None, item: Any) -> None:
        if key == "images":
            result.images.add(item["id"], item | {"id": identity(item["id"])})
        elif key == "categories":
            if not isinstance(item["name"], str):
                raise Unusable("name of a category is no text")
            result.categories.add(item["id"], item["name"])
        elif key == "annotations":
            image = identity(item["image_id"])
            if wanted is None or image in wanted:
                annotations = result.annotations.setdefault(image, Index("annotation", left_out))
                if item.get("id") is not None:
                    annotations.add(item["id"], item | {"id": identity(item["id"]), "image_id": image})
                else:
                    annotations.add("panoptic" if "segments_info" in item else name, item | {"image_id": image})
            if image not in result.images and (wanted is None or image not in wanted):
                unplaced[image].append(name)

    for number, (key, item) in enumerate(read_json(file, argument)):
        name = f"entry {number} of {Path(file).name}"
        left_out.attempt(name, add, name, key, item)
    for image, names in unplaced.items():
        for name in names if image not in result.images else ():
            left_out.add("image of an annotation is unknown", name)
    return result


def read_table(
    data: Table, argument: str, part: tuple[int, int], subset: str | None = None, split: str = "train"
) -> Iterator[dict[str, Any]]:
    """The rows of a part of a data set, streamed: its name on the Hub, a folder or file of parquet, or a loaded one.

    Images come as `{"bytes", "path"}`: one that cannot be decoded shall cost its row, not the run.

    Raises:
        UserError: there is no such data set.
    """
    if isinstance(data, (str, Path)):
        try:
            if Path(data).is_file():
                data = datasets.load_dataset("parquet", data_files=str(data), split="train", streaming=True)
            else:
                data = datasets.load_dataset(str(data), subset, split=split, streaming=True)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{argument} must be a data set of the Hub, or a folder or file of parquet, got {str(data)!r}: {reason}"
            ) from error
    elif isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset(num_shards=min(part[1], max(1, len(data))))
    data = data.decode(False)
    if data.num_shards >= part[1]:
        # Whole files each: otherwise every part would read all of them.
        return _rows(data.shard(num_shards=part[1], index=part[0]))
    return part_of(_rows(data), part)


def _rows(data: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    # In a worker of a data loader, a data set that is simply iterated keeps to that worker's share of its files; but this
    # one is a part already, and all of it is wanted.
    for batch in data.iter(batch_size=1):
        yield {key: values[0] for key, values in batch.items()}


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class _Reader:
    """A window that moves over a JSON text."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.window, self.position, self.ended = stream, "", 0, False

    def entries(self) -> Iterator[tuple[str | None, Any]]:
        if self._next() == "[":
            for element in self._elements():
                yield None, element
        elif self._next() == "{":
            for _ in self._items("}"):
                key = self._value()
                self._require(":")
                if self._next() == "[":
                    for element in self._elements():
                        yield key, element
                else:
                    yield key, self._value()
        else:
            raise json.JSONDecodeError("Expecting an array or an object", self.window, self.position)
        if self._next():
            raise json.JSONDecodeError("Extra data", self.window, self.position)

    def _elements(self) -> Iterator[Any]:
        for _ in self._items("]"):
            yield self._value()

    def _items(self, end: str) -> Iterator[None]:
        """Stops before each item of an array or object, and behind its end."""
        self.position += 1
        first = True
        while self._next() != end:
            if not first:
                self._require(",")
            first = False
            yield
        self.position += 1

    def _require(self, character: str) -> None:
        if self._next() != character:
            raise json.JSONDecodeError(f"Expecting '{character}'", self.window, self.position)
        self.position += 1

    def _next(self) -> str:
        """The next character that is not blank; none at the end."""
        while True:
            self.position = _BLANKS.match(self.window, self.position).end()
            if self.position < len(self.window) or not self._read():
                return self.window[self.position : self.position + 1]

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.window, self.position)
            except json.JSONDecodeError as error:
                # Cut off by the window's end, unless the fault is well before it.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.window) - 16
                if not cut or not self._read():
                    raise
            else:
                # A number may go on behind the window's end, at which "1." and "1e-" are read as 1.
                whole = end < len(self.window) and self.window[end] not in _IN_NUMBERS
                if whole or not self._read():
                    self.position = end
                    return value

    def _read(self) -> bool:
        rest = self.window[self.position :]
        # As much as is there already: a long value is not parsed anew for each megabyte of it.
        more = "" if self.ended else self.stream.read(max(_CHUNK, len(rest)))
        self.window, self.position, self.ended = rest + more, 0, not more
        return bool(more)
