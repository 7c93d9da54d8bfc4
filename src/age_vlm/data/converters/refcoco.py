"""Referring expressions for objects of COCO: RefCOCO, RefCOCO+, RefCOCOg."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError, one_of
from ..masks import MaskRLE
from ..rejects import Rejects, Unusable, reported
from ..schema import Sample
from .chats import REGION_REQUEST, Phrase, line, statements
from .geometry import segmentation_mask
from .images import ImageFolder, open_image, require_size
from .index import Index, identity
from .records import CocoFile, Table, existing_file, read_coco, read_table, shard_of


_LACKING = "instances lack its image or annotation"


def refcoco(
    images: str | Path,
    refs: str | Path,
    instances: str | Path,
    split: str = "train",
    *,
    request: str = REGION_REQUEST,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """A sample for each object, in which each of its expressions answers `request` and is grounded in its mask.

    For questions about its photographs, see `coco`: the expressions name only some of what is there.

    Args:
        images: the folder of COCO's `train2014`, or of `train2017`, which has the same images under other names.
        refs: `refs(unc).p`, `refs(google).p` or `refs(umd).p`.
        instances: `instances.json` from beside it.
        split: `"train"`, `"val"`, `"test"`, `"testA"` or `"testB"`.
        allow_outside: see `ImageFolder`.

    Raises UserError where no object is in the split.

    Source: https://github.com/lichengunc/refer
    """
    folder = ImageFolder(images, "images", allow_outside)
    everything = _unpickled(existing_file(refs, "refs"))
    with reported(rejects, "refcoco") as rejects:
        index: Index[dict[str, Any]] = Index("reference", rejects)
        for number, ref in enumerate(everything):
            if (ref := rejects.attempt(f"ref {number}", _checked, ref)) is not None:
                index.add(ref["ref_id"], ref)
        usable = [ref for _, ref in index.items()]
        if split not in (splits := {ref["split"] for ref in usable}):
            raise UserError(f"split: got {split!r}, expected {one_of(split, sorted(splits))}.")
        chosen = list(shard_of((ref for ref in usable if ref["split"] == split), shard))
        file = read_coco(instances, "instances", rejects, {ref["image_id"] for ref in chosen})
        for ref in chosen:
            name = f"refcoco/{ref['ref_id']}"
            if (
                sample := rejects.attempt(name, _indexed_sample, name, ref, file, folder, request, rejects)
            ) is not None:
                yield sample


def refcoco_hub(
    images: str | Path,
    data: Table = "jxu124/refcoco",
    subset: str | None = None,
    split: str = "train",
    *,
    request: str = REGION_REQUEST,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """The same from the tables `jxu124/refcoco`, `jxu124/refcocoplus` and `jxu124/refcocog` of the Hub.

    Args:
        images: the folder of COCO's `train2014` or `train2017`: the tables hold no images.
        data: a name on the Hub, a folder or file of parquet, or a loaded data set.
        allow_outside: see `ImageFolder`.
    """
    folder = ImageFolder(images, "images", allow_outside)
    with reported(rejects, "refcoco_hub") as rejects:
        seen: Index[None] = Index("reference", rejects)
        for number, row in enumerate(read_table(data, "data", shard, subset, split)):
            name = f"refcoco/{row.get('ref_id', number)}"
            sample = rejects.attempt(name, _row_sample, name, row, folder, request, rejects)
            if sample is not None and seen.add(row.get("ref_id", f"row {number}"), None):
                yield sample


def image_names(file_name: str) -> list[str]:
    """Where an image of COCO may lie: the releases of 2014 and 2017 name the same images differently."""
    if not isinstance(file_name, str):
        raise Unusable("name of an image is no text")
    plain = Path(file_name).name
    number = plain.rsplit("_", 1)[-1]
    folders = ("", "train2014/", "train2017/", "val2014/", "val2017/")
    return [file_name, *(f"{folder}{name}" for folder in folders for name in dict.fromkeys((plain, number)))]


def _checked(ref: dict[str, Any]) -> dict[str, Any]:
    return ref | {key: identity(ref[key]) for key in ("ref_id", "ann_id", "image_id", "split")}


def _indexed_sample(
    name: str, ref: dict[str, Any], file: CocoFile, folder: ImageFolder, request: str, rejects: Rejects
) -> Sample:
    annotations = file.annotations.get(ref["image_id"], ())
    if ref["image_id"] not in file.images or ref["ann_id"] not in annotations:
        raise Unusable(_LACKING)
    arguments = file.images.get(ref["image_id"]), annotations.get(ref["ann_id"]), folder, request, rejects
    return _sample(name, ref, *arguments)


def _row_sample(name: str, row: dict[str, Any], folder: ImageFolder, request: str, rejects: Rejects) -> Sample:
    if row.get("ref_id") is not None:
        identity(row["ref_id"])
    described, annotation = (_decoded(row[key]) for key in ("raw_image_info", "raw_anns"))
    if described is None or annotation is None:
        raise Unusable(_LACKING)
    pairs = (
        (row, "image_id", described, "id"),
        (row, "ann_id", annotation, "id"),
        (annotation, "image_id", described, "id"),
    )
    for one, key, other, same in pairs:
        if key in one and same in other and identity(one[key]) != identity(other[same]):
            raise Unusable("identifiers of the record do not agree")
    return _sample(name, row, described, annotation, folder, request, rejects)


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _sample(
    name: str,
    ref: dict[str, Any],
    described: dict[str, Any],
    annotation: dict[str, Any],
    folder: ImageFolder,
    request: str,
    rejects: Rejects,
) -> Sample:
    size = described["width"], described["height"]
    # The name in the reference itself carries the annotation's number and is no file.
    image = open_image(folder.find(image_names(described["file_name"])))
    require_size(image, *size)
    mask = segmentation_mask(annotation["segmentation"], *size)
    said = (rejects.attempt(f"expression of {name}", _said, sentence, mask) for sentence in ref["sentences"])
    return statements(name, image, request, (each for each in said if each is not None))


def _said(sentence: dict[str, Any], mask: MaskRLE) -> tuple[str, list[Phrase]]:
    text = line(sentence["sent"])
    return text, [(0, len(text), mask, None)]


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, texts and numbers only: a pickle that asks for a class could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(path: Path) -> list[Any]:
    with path.open("rb") as stream:
        try:
            # Written by Python 2: its byte strings are texts here.
            refs = _PlainUnpickler(stream, encoding="utf-8", errors="replace").load()
        # Damaged pickles raise nearly anything.
        except Exception as error:
            raise UserError(f"refs: got {str(path)!r}, expected a pickle of plain data: {error}.") from None
    if not isinstance(refs, list):
        raise UserError(f"refs: got {str(path)!r} with a {type(refs).__name__}, expected a list.")
    return refs
