"""Referring expressions for objects of COCO: RefCOCO, RefCOCO+, RefCOCOg."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..left_out import LeftOut, Unusable, reported
from ..masks import MaskRLE
from ..schema import Sample
from .chats import REGION_REQUEST, Phrase, line, statements
from .geometry import segmentation_mask
from .pictures import find_picture, open_picture, require_size
from .records import Table, existing_file, existing_folder, part_of, read_coco, read_table


def refcoco(
    images: str | Path,
    refs: str | Path,
    instances: str | Path,
    split: str = "train",
    *,
    request: str = REGION_REQUEST,
    part: tuple[int, int] = (0, 1),
    left_out: LeftOut | None = None,
) -> Iterator[Sample]:
    """A sample for each object, in which each of its expressions answers `request` and is grounded in its mask.

    Args:
        images: the folder of COCO's `train2014`, or of `train2017`, which has the same pictures under other names.
        refs: `refs(unc).p`, `refs(google).p` or `refs(umd).p`.
        instances: `instances.json` from beside it.
        split: `"train"`, `"val"`, `"test"`, `"testA"` or `"testB"`.

    Raises UserError where no object is in the split.

    Source: https://github.com/lichengunc/refer
    """
    folder = existing_folder(images, "images")
    everything = _unpickled(existing_file(refs, "refs"))
    with reported(left_out, "refcoco") as left_out:
        everything = (left_out.attempt(f"ref {number}", _checked, ref) for number, ref in enumerate(everything))
        usable = [ref for ref in everything if ref is not None]
        if split not in (splits := {ref["split"] for ref in usable}):
            raise UserError(f"split must be one of {sorted(splits)}, got {split!r}.")
        chosen = list(part_of((ref for ref in usable if ref["split"] == split), part))
        file = read_coco(instances, "instances", left_out, {ref["image_id"] for ref in chosen})
        for ref in chosen:
            name = f"refcoco/{ref['ref_id']}"
            picture, objects = file.pictures.get(ref["image_id"]), file.annotations.get(ref["image_id"], [])
            annotation = next((item for item in objects if item.get("id") == ref["ann_id"]), None)
            arguments = name, ref, picture, annotation, folder, request, left_out
            if (sample := left_out.attempt(name, _sample, *arguments)) is not None:
                yield sample


def refcoco_hub(
    images: str | Path,
    data: Table = "jxu124/refcoco",
    subset: str | None = None,
    split: str = "train",
    *,
    request: str = REGION_REQUEST,
    part: tuple[int, int] = (0, 1),
    left_out: LeftOut | None = None,
) -> Iterator[Sample]:
    """The same from the tables `jxu124/refcoco`, `jxu124/refcocoplus` and `jxu124/refcocog` of the Hub.

    Args:
        images: the folder of COCO's `train2014` or `train2017`: the tables hold no pictures.
        data: a name on the Hub, a folder or file of parquet, or a loaded data set.
    """
    folder = existing_folder(images, "images")
    with reported(left_out, "refcoco_hub") as left_out:
        for number, row in enumerate(read_table(data, "data", part, subset, split)):
            name = f"refcoco/{row.get('ref_id', number)}"
            if (sample := left_out.attempt(name, _row_sample, name, row, folder, request, left_out)) is not None:
                yield sample


def picture_names(file_name: str) -> list[str]:
    """Where a picture of COCO may lie: the releases of 2014 and 2017 name the same pictures differently."""
    plain = Path(file_name).name
    number = plain.rsplit("_", 1)[-1]
    folders = ("", "train2014/", "train2017/", "val2014/", "val2017/")
    return [file_name, *(f"{folder}{name}" for folder in folders for name in dict.fromkeys((plain, number)))]


def _checked(ref: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(ref[key], (int, str)) for key in ("ref_id", "ann_id", "image_id", "split")):
        raise Unusable("ids of a reference are no numbers")
    return {**ref, "split": str(ref["split"])}


def _row_sample(name: str, row: dict[str, Any], folder: Path, request: str, left_out: LeftOut) -> Sample:
    picture, annotation = (_decoded(row[key]) for key in ("raw_image_info", "raw_anns"))
    return _sample(name, row, picture, annotation, folder, request, left_out)


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _sample(
    name: str,
    ref: dict[str, Any],
    picture: dict[str, Any] | None,
    annotation: dict[str, Any] | None,
    folder: Path,
    request: str,
    left_out: LeftOut,
) -> Sample:
    if picture is None or annotation is None:
        raise Unusable("instances lack its image or annotation")
    size = picture["width"], picture["height"]
    # The name in the reference itself carries the annotation's number and is no file.
    image = open_picture(find_picture(folder, picture_names(picture["file_name"])))
    require_size(image, *size)
    mask = segmentation_mask(annotation["segmentation"], *size)
    said = (left_out.attempt(f"expression of {name}", _said, sentence, mask) for sentence in ref["sentences"])
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
            raise UserError(f"refs must be a pickle of plain data, got {str(path)!r}: {error}.") from None
    if not isinstance(refs, list):
        raise UserError(f"refs must hold a list, got {str(path)!r} with a {type(refs).__name__}.")
    return refs
