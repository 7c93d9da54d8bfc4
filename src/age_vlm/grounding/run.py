"""Phrases of a data set -> masks, in shards that survive a kill: what `age-vlm ground` does."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from pycocotools import mask as coco
from tqdm.auto import tqdm

from ..atomic_files import replaced
from ..data.masks import MaskRLE, encode_mask
from ..data.rejects import Rejects, Unusable
from ..data.schema import FEATURES
from ..errors import UserError, check_new_folder, filling, writing
from ..grounding.inputs import Phrase, Refusal, Source, Unit, make_unit
from ..grounding.teacher import Masks, Teacher, process_state
from .contact_sheet import write_contact_sheet
from .shards import REPORT, ShardFolder


_FORMAT = 1


@dataclass(frozen=True)
class GroundSettings:
    """What is kept of what a teacher finds, and how it is cut into files.

    Attributes:
        min_score: least score of a mask, 0 to 1.
        min_area, max_area: least and largest share of the image that a mask may cover; an empty one is never kept.
        shard_size: samples in a file. A killed run loses at most the files it was writing.

    Raises:
        UserError: a value is outside of these ranges.
    """

    min_score: float = 0.5
    min_area: float = 0.0
    max_area: float = 1.0
    shard_size: int = 200

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise UserError(f"min_score: got {self.min_score}, expected 0 to 1.")
        if not 0 <= self.min_area < self.max_area <= 1:
            raise UserError(
                f"min_area, max_area: got {self.min_area} and {self.max_area}, expected shares of the image with "
                "0 <= min_area < max_area <= 1."
            )
        if self.shard_size < 1:
            raise UserError(f"shard_size: got {self.shard_size}, expected at least 1.")

    def objection(self, area: float, score: float) -> str | None:
        """Why a mask that covers this share of its image is not kept; None where it is."""
        if area == 0:
            return "its mask is empty"
        if not score >= self.min_score:
            return f"its score is below {self.min_score:g}"
        if area < self.min_area:
            return f"its mask covers less than {self.min_area:g} of the image"
        if area > self.max_area:
            return f"its mask covers more than {self.max_area:g} of the image"
        return None


@dataclass
class GroundSummary:
    """What a run made.

    Attributes:
        folder: holds `data/*.parquet`, `phrases/*.jsonl`, `manifest.json` and `report.html`.
        samples, phrases: written, and phrases with a mask.
        rejected_samples, rejected_phrases: what is missing of the data, by reason.
        iou: mean intersection over union of the teacher's masks with those that the data has, over phrases where both
            are; None where there are none.
    """

    folder: Path
    samples: int = 0
    phrases: int = 0
    rejected_samples: Rejects = field(default_factory=Rejects)
    rejected_phrases: Rejects = field(default_factory=Rejects)
    iou: float | None = None

    @property
    def report(self) -> Path:
        return self.folder / REPORT


def ground(
    data: Any,
    output: str | Path,
    teacher: Teacher,
    settings: GroundSettings | None = None,
    *,
    batch_size: int = 8,
    fingerprint: str | None = None,
    progress: bool = True,
) -> GroundSummary | None:
    """Give every phrase of a data set the mask that a teacher finds for it, and store the samples.

    The same call continues a run that was stopped at any moment. Under `accelerate launch` the processes share the
    shards; which process makes one, and in which run, does not change its bytes.

    Args:
        data: see `samples.Source`.
        output: folder of this run.
        batch_size: images that are encoded at once.
        fingerprint: names the content of `data` where reading it through to make one takes too long.
        progress: whether to show a bar.

    Returns:
        What was made; None in all processes but the first.

    Raises:
        UserError: one sentence, for settings or data that cannot be used, or a folder with something else in it.
    """
    settings = settings or GroundSettings()
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}, expected at least 1.")
    check_new_folder("output", output)
    state = process_state()
    source = Source(data, fingerprint)
    manifest = {
        "format": _FORMAT,
        "data": {"samples": len(source), "fingerprint": source.fingerprint},
        "teacher": teacher.identity(),
        "settings": {name: getattr(settings, name) for name in ("min_score", "min_area", "max_area", "shard_size")},
        "shards": math.ceil(len(source) / settings.shard_size),
    }
    folder = ShardFolder(output, manifest)
    with filling("output", output):
        return _make_missing(folder, source, teacher, settings, batch_size, progress, state)


def _make_missing(
    folder: ShardFolder,
    source: Source,
    teacher: Teacher,
    settings: GroundSettings,
    batch_size: int,
    progress: bool,
    state: PartialState,
) -> GroundSummary | None:
    missing = _begin(folder, state)
    own = missing[state.process_index :: state.num_processes]
    sizes = {shard: len(_rows_of(shard, source, settings)) for shard in own}
    with tqdm(
        total=sum(sizes.values()),
        desc="grounding" if state.num_processes == 1 else f"grounding (process 1 of {state.num_processes})",
        unit="sample",
        disable=not (progress and own and state.is_main_process),
    ) as bar:
        for shard in own:
            rows = _rows_of(shard, source, settings)
            _make_shard(
                folder, shard, source.rows(rows.start, rows.stop), rows.start, teacher, settings, batch_size, bar
            )
    if not state.is_main_process:
        return None
    # A barrier would give up after some minutes, and the others may need hours longer.
    elsewhere = folder.missing()
    while elsewhere:
        time.sleep(0.5)
        elsewhere = [shard for shard in elsewhere if not folder.samples(shard).exists()]
    summary = _summarise(folder)
    write_contact_sheet(summary.report, folder)
    return summary


def _rows_of(shard: int, source: Source, settings: GroundSettings) -> range:
    start = shard * settings.shard_size
    return range(start, min(start + settings.shard_size, len(source)))


def _begin(folder: ShardFolder, state: PartialState) -> list[int]:
    """Shards to be made, the same list in all processes, however quickly the first of them are at work."""
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            with writing("output", folder.folder):
                folder.claim()
            answer = [folder.missing()]
        except Exception as error:  # it ends the other processes too
            answer = [error]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        if state.is_main_process:
            raise answer[0]
        raise SystemExit(2)
    return answer[0]


def _make_shard(
    folder: ShardFolder,
    shard: int,
    rows: list[dict[str, Any]],
    first: int,
    teacher: Teacher,
    settings: GroundSettings,
    batch_size: int,
    bar: tqdm,
) -> None:
    samples: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for units in _batches(rows, first, batch_size, records, bar):
        _ground_units(units, teacher, settings, samples, records)
    with replaced(folder.phrases(shard)) as file:
        for record in records:
            file.write(f"{json.dumps(record)}\n".encode())
    with replaced(folder.samples(shard)) as file:
        columns = {name: [sample[name] for sample in samples] for name in FEATURES}
        table = datasets.Dataset.from_dict(columns, features=FEATURES).data.table
        with pq.ParquetWriter(file, table.schema) as writer:
            # `load_dataset` trips over an empty row group, not over none.
            if len(table):
                writer.write_table(table, row_group_size=50)


def _batches(
    rows: list[dict[str, Any]], first: int, batch_size: int, records: list[dict[str, Any]], bar: tqdm
) -> Iterator[list[Unit]]:
    """Samples that together have at least `batch_size` images; those that cannot be used become records."""
    units: list[Unit] = []
    for number, row in enumerate(rows, start=first):
        name = str(row["id"]) if row.get("id") is not None else str(number)
        try:
            units.append(make_unit(row, name))
        except Unusable as error:
            detail = "" if error.__cause__ is None else str(error.__cause__)
            records.append(_record(name, None, reason=str(error), detail=detail))
        bar.update()
        if sum(len(unit.images) for unit in units) >= batch_size:
            yield units
            units = []
    if units:
        yield units


def _ground_units(
    units: list[Unit],
    teacher: Teacher,
    settings: GroundSettings,
    samples: list[dict[str, Any]],
    records: list[dict[str, Any]],
) -> None:
    for unit in units:
        for phrase in list(unit.phrases):
            if reason := teacher.lacks(phrase.prompt):
                unit.phrases.remove(phrase)
                unit.refused.append(Refusal(phrase.number, phrase.prompt.phrase, reason))
    images = [(unit, number) for unit in units for number in range(len(unit.images))]
    asked = [[phrase for phrase in unit.phrases if phrase.item["image"] == number] for unit, number in images]
    try:
        answers = teacher.ground(
            [unit.images[number] for unit, number in images],
            [[phrase.prompt for phrase in phrases] for phrases in asked],
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"batch_size: {len(images)} images at once do not fit into the memory of the device, expected fewer, or a "
            "smaller dtype or model."
        ) from error
    found = {id(phrase): masks for phrases, own in zip(asked, answers) for phrase, masks in zip(phrases, own)}
    for unit in units:
        row = len(samples)
        own = [_decide(unit, phrase, found[id(phrase)], settings, row, teacher) for phrase in unit.phrases]
        own += [
            _record(unit.sample["id"], row, number=number, phrase=words, reason=reason, detail=detail)
            for number, words, reason, detail in unit.refused
        ]
        records += sorted(own, key=lambda record: record["grounding"])
        samples.append(unit.sample)


def _decide(
    unit: Unit, phrase: Phrase, masks: Masks, settings: GroundSettings, row: int, teacher: Teacher
) -> dict[str, Any]:
    """The record of a phrase; where its mask is kept, the sample gets the grounding."""
    prompt = phrase.prompt
    record = _record(unit.sample["id"], row, number=phrase.number, phrase=prompt.phrase)
    record["image"] = phrase.item["image"]
    if teacher.uses_place:
        record |= {name: told for name in ("box", "points") if (told := getattr(prompt, name))}
    united = masks.union(settings.min_score)
    if united is None:
        return record | {"reason": "nothing was found"}
    mask, score = united
    area = float(mask.mean())
    rle = encode_mask(mask)
    record |= {"score": round(score, 6), "area": round(area, 6), "reason": settings.objection(area, score)}
    if prompt.mask is not None and teacher.name != "annotated":
        record["iou"] = round(_iou(rle, prompt.mask), 6)
    if record["reason"] is None:
        record["kept"] = len(unit.sample["groundings"])
        unit.sample["groundings"].append({**phrase.item, "mask": rle})
    else:
        record["mask"] = rle
    return record


def _record(
    sample: str, row: int | None, *, number: int = -1, phrase: str | None = None, reason: str | None = None, detail=""
) -> dict[str, Any]:
    """Of a phrase; or, without one, of a sample that is left out.

    `row` counts the samples of the shard's file, `grounding` the sample's phrases as the data has them, `kept` as the file
    has them.
    """
    record = {"sample": sample, "row": row, "grounding": number, "phrase": phrase, "reason": reason}
    return record | {"detail": " ".join(detail.split())} if detail else record


def _iou(mask: MaskRLE, other: MaskRLE) -> float:
    coded = [{"size": rle["size"], "counts": rle["counts"].encode("ascii")} for rle in (mask, other)]
    return float(coco.iou(coded[:1], coded[1:], [0])[0, 0])


def _summarise(folder: ShardFolder) -> GroundSummary:
    summary = GroundSummary(folder.folder)
    summary.samples = sum(pq.read_metadata(folder.samples(shard)).num_rows for shard in range(folder.shards))
    overlaps = []
    for _, record in folder.records():
        if record["phrase"] is None:
            summary.rejected_samples.add(record["reason"], record["sample"])
        elif record["reason"] is not None:
            summary.rejected_phrases.add(record["reason"], f"'{record['phrase']}' of {record['sample']}")
        else:
            summary.phrases += 1
        if "iou" in record:
            overlaps.append(record["iou"])
    summary.iou = sum(overlaps) / len(overlaps) if overlaps else None
    return summary
