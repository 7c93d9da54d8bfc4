"""Annotation files and tables, read record by record: some are larger than memory."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
import ijson

from ...errors import UserError
from ..rejects import Rejects, Unusable
from .index import Index, identity


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
    def empty(cls, rejects: Rejects) -> CocoFile:
        """A file without any."""
        return cls(Index("image", rejects), {}, Index("category", rejects))

    def annotations_of(self, image: str) -> list[dict[str, Any]]:
        """All annotations of an image, by its `identity`, that can be used."""
        return [item for _, item in self.annotations[image].items()] if image in self.annotations else []


def existing_folder(folder: str | Path, argument: str) -> Path:
    """The folder as a path.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{argument}: got {str(folder)!r}, expected a folder.")
    return Path(folder)


def existing_file(file: str | Path, argument: str) -> Path:
    """The file as a path.

    Raises:
        UserError: there is no such file.
    """
    if not Path(file).is_file():
        raise UserError(f"{argument}: got {str(file)!r}, expected a file.")
    return Path(file)


def shard_of(records: Iterable[Any], shard: tuple[int, int]) -> Iterator[Any]:
    """Every `shard[1]`-th record, from number `shard[0]` on."""
    return islice(records, shard[0], None, shard[1])


def read_json(file: str | Path, argument: str) -> Iterator[tuple[str | None, Any]]:
    """The entries of a JSON file, read piece by piece.

    An object gives (key, value), and where the value is an array (key, element) for each of its elements; an array, and
    the lines of a file that ends in `.jsonl`, give (None, element). A line that is no JSON gives (None, None).

    Raises:
        UserError: there is no such file, or it is not JSON to its end.
    """
    path = existing_file(file, argument)
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as stream:
                yield from ((None, _parsed(line)) for line in stream if line.strip())
        else:
            with path.open("rb") as file:
                yield from _entries(file)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{argument}: got {str(path)!r}, expected a whole JSON file: {reason}.") from None


def read_coco(file: str | Path, argument: str, rejects: Rejects, wanted: Container[str] | None = None) -> CocoFile:
    """A file in the format of COCO, with the annotations of all images or of those whose `identity` is wanted."""
    result = CocoFile.empty(rejects)
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
                annotations = result.annotations.setdefault(image, Index("annotation", rejects))
                if item.get("id") is not None:
                    annotations.add(item["id"], item | {"id": identity(item["id"]), "image_id": image})
                else:
                    annotations.add("panoptic" if "segments_info" in item else name, item | {"image_id": image})
            if image not in result.images and (wanted is None or image not in wanted):
                unplaced[image].append(name)

    for number, (key, item) in enumerate(read_json(file, argument)):
        name = f"entry {number} of {Path(file).name}"
        rejects.attempt(name, add, name, key, item)
    for image, names in unplaced.items():
        for name in names if image not in result.images else ():
            rejects.add("image of an annotation is unknown", name)
    return result


def read_table(
    data: Table, argument: str, shard: tuple[int, int], subset: str | None = None, split: str = "train"
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
                f"{argument}: got {str(data)!r}, expected a data set of the Hub, or a folder or file of parquet: {reason}"
            ) from error
    elif isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset(num_shards=min(shard[1], max(1, len(data))))
    data = data.decode(False)
    if data.num_shards >= shard[1]:
        # Whole files each: otherwise every part would read all of them.
        return _rows(data.shard(num_shards=shard[1], index=shard[0]))
    return shard_of(_rows(data), shard)


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


def _entries(file: BinaryIO) -> Iterator[tuple[str | None, Any]]:
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    # Its own floats would do, but with them whole numbers of more than 64 bits are refused.
    events = (
        (event, float(value) if isinstance(value, Decimal) else value) for event, value in ijson.basic_parse(file)
    )
    opened, _ = next(events)
    if opened == "start_array":
        yield from ((None, element) for element in _elements(events))
    elif opened == "start_map":
        for event, key in events:
            if event == "end_map":
                break
            first = next(events)
            if first[0] == "start_array":
                yield from ((key, element) for element in _elements(events))
            else:
                yield key, _value(first, events)
    else:
        raise ijson.JSONError("expected an array or an object")
    for _ in events:  # nothing but blanks may follow
        pass


def _elements(events: Iterator[tuple[str, Any]]) -> Iterator[Any]:
    for event in events:
        if event[0] == "end_array":
            return
        yield _value(event, events)


def _value(first: tuple[str, Any], events: Iterator[tuple[str, Any]]) -> Any:
    builder, depth = ijson.ObjectBuilder(), 0
    for event, value in chain([first], events):
        builder.event(event, value)
        depth += event in ("start_map", "start_array")
        depth -= event in ("end_map", "end_array")
        if not depth:
            break
    return builder.value
