"""One HTML file that shows phrases with their masks, so that a person can judge a teacher. It needs no network."""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

from ..atomic_files import write_whole
from ..data.masks import decode_mask
from ..data.schema import message_text
from ..html import render_page
from ..processing.images_agevlm import load_rgb
from .shards import ShardFolder


_TILE = 300
_DRAWN, _WEAKEST, _PER_REASON = 36, 12, 4
# Stays apart from the grey around a mask for readers with any colour vision (Okabe and Ito, 2008).
_OUTLINE, _BOX = (230, 159, 0), (86, 180, 233)
# Text around a phrase that helps to judge it, in characters.
_CONTEXT = 60
_AREAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

Chosen = tuple[int, dict[str, Any]]


def write_contact_sheet(path: str | Path, folder: ShardFolder) -> None:
    """Write the report of a finished run: what is left out and why, and phrases over masks.

    The phrases are chosen by a hash of their position, so a run that was interrupted has the same report as one that was not.
    """
    figures = _Figures()
    for shard, record in folder.records():
        figures.add(shard, record)
    samples = sum(pq.read_metadata(folder.samples(shard)).num_rows for shard in range(folder.shards))
    drawn, weakest, rejects = figures.chosen()
    tiles = _tiles(folder, [*drawn, *weakest, *rejects])
    page = render_page(
        "contact_sheet",
        {"percent": _percent, "number": lambda value: f"{value:,}"},
        figures=figures,
        samples=samples,
        scores=_bars(figures.scores, [f"{step / 20:.2f} to {(step + 1) / 20:.2f}" for step in range(20)]),
        areas=_bars(figures.areas, [f"up to {_percent(edge)} of the image" for edge in _AREAS]),
        drawn=tiles[: len(drawn)],
        weakest=tiles[len(drawn) : len(drawn) + len(weakest)],
        rejects=tiles[len(drawn) + len(weakest) :],
        manifest=folder.manifest,
    )
    write_whole(Path(path), page)


class _Figures:
    """Counts of a run, and the phrases to show of it, gathered in one pass over its records."""

    def __init__(self) -> None:
        self.kept = 0
        self.phrases: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()
        self.details: dict[str, str] = {}
        self.scores: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
        self.areas: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
        self.overlaps: list[float] = []
        self.score_range = (1.0, 0.0)
        self._drawn: list[tuple] = []
        self._weakest: list[tuple] = []
        self._rejects: dict[str, list[tuple]] = defaultdict(list)

    def add(self, shard: int, record: dict[str, Any]) -> None:
        reason = record["reason"]
        if record.get("detail"):
            self.details.setdefault(reason, record["detail"])
        if record["phrase"] is None:
            self.samples[reason] += 1
            return
        draw = hashlib.sha256(f"{shard} {record['row']} {record['grounding']}".encode()).hexdigest()
        if "score" in record:
            self.scores[reason is None][min(19, int(record["score"] * 20))] += 1
            self.areas[reason is None][sum(record["area"] > edge for edge in _AREAS)] += 1
        if "iou" in record:
            self.overlaps.append(record["iou"])
        if reason is None:
            self.kept += 1
            self.score_range = min(self.score_range[0], record["score"]), max(self.score_range[1], record["score"])
            _keep(self._drawn, _DRAWN, draw, shard, record)
            _keep(self._weakest, _WEAKEST, (record["score"], draw), shard, record)
        else:
            self.phrases[reason] += 1
            _keep(self._rejects[reason], _PER_REASON, draw, shard, record)

    @property
    def total(self) -> int:
        return self.kept + self.phrases.total()

    @property
    def overlap(self) -> float | None:
        return sum(self.overlaps) / len(self.overlaps) if self.overlaps else None

    def chosen(self) -> tuple[list[Chosen], list[Chosen], list[Chosen]]:
        """Kept phrases by the draw, kept phrases with the lowest scores, and phrases that were left out."""
        drawn, weakest = _least(self._drawn, _DRAWN), _least(self._weakest, _WEAKEST)
        # Where all scores are the same none is low, and in a small run the draw has shown them all.
        if self.score_range[0] >= self.score_range[1] or len(drawn) == self.kept:
            weakest = []
        reasons = [reason for reason, _ in self.phrases.most_common()]
        rejects = [entry for reason in reasons for entry in _least(self._rejects[reason], _PER_REASON)]
        return drawn, weakest, rejects


def _keep(entries: list[tuple], most: int, key: Any, shard: int, record: dict[str, Any]) -> None:
    entries.append((key, shard, record))
    # Now and then is often enough, and cheaper than each time.
    if len(entries) > 2 * most:
        entries[:] = heapq.nsmallest(most, entries, key=lambda entry: entry[0])


def _least(entries: list[tuple], most: int) -> list[Chosen]:
    return [entry[1:] for entry in heapq.nsmallest(most, entries, key=lambda entry: entry[0])]


def _bars(counts: Mapping[bool, Counter[int]], labels: list[str]) -> list[dict[str, Any]]:
    """Of a histogram: label, kept and left out phrases, and their heights in percent of the highest bar."""
    highest = max((counts[True][index] + counts[False][index] for index in range(len(labels))), default=0) or 1
    return [
        {
            "label": label,
            "kept": counts[True][index],
            "rejects": counts[False][index],
            "kept_height": round(100 * counts[True][index] / highest, 2),
            "rejected_height": round(100 * counts[False][index] / highest, 2),
        }
        for index, label in enumerate(labels)
    ]


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 or percent == round(percent) else f"{percent:.2g} %"


def _tiles(folder: ShardFolder, chosen: Iterable[Chosen]) -> list[dict[str, Any]]:
    wanted = defaultdict(list)
    chosen = list(chosen)
    for index, (shard, _) in enumerate(chosen):
        wanted[shard].append(index)
    tiles: list[dict[str, Any]] = [{}] * len(chosen)
    for shard, places in wanted.items():
        table = pq.read_table(folder.samples(shard), columns=["images", "messages", "groundings"])
        for index in places:
            record = chosen[index][1]
            tiles[index] = _tile(table.slice(record["row"], 1).to_pylist()[0], record)
    return tiles


def _tile(sample: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    kept = sample["groundings"][record["kept"]] if "kept" in record else None
    images = sample["images"]
    # Of a phrase that does not follow the schema, only the sample is known.
    number = kept["image"] if kept else record.get("image", 0 if len(images) == 1 else None)
    rle = kept["mask"] if kept else record.get("mask")
    image = None if number is None else load_rgb(Image.open(io.BytesIO(images[number]["bytes"])))
    before = after = ""
    if kept:
        text = message_text(sample["messages"][kept["message"]])
        before, after = _before(text[: kept["start"]]), _after(text[kept["end"] :])
    return {
        "phrase": record["phrase"],
        "before": before,
        "after": after,
        "sample": record["sample"],
        "score": record.get("score"),
        "area": record.get("area"),
        "iou": record.get("iou"),
        "reason": record["reason"],
        "source": None if image is None else _data_url(_painted(image, rle, record)),
    }


def _before(text: str) -> str:
    return text if len(text) <= _CONTEXT else f"… {text[-_CONTEXT:].partition(' ')[2]}"


def _after(text: str) -> str:
    return text if len(text) <= _CONTEXT else f"{text[:_CONTEXT].rpartition(' ')[0]} …"


def _painted(image: Image.Image, rle: dict[str, Any] | None, record: dict[str, Any]) -> Image.Image:
    """The image at the size of a tile: grey and dimmed outside of the mask, which has an outline, and with the prompt."""
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # A small drawn image keeps its pixels when enlarged; a photograph is smoothed down.
    image = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
    if rle is not None:
        mask = Image.fromarray(decode_mask(rle)).convert("L").resize(size, Image.Resampling.BOX)
        mask = mask.point(lambda share: 255 if share >= 128 else 0)
        grey = np.asarray(image.convert("L"), np.float32)[..., None].repeat(3, -1)
        dimmed = Image.fromarray((0.55 * grey + 0.45 * 40).round().astype(np.uint8))
        image = Image.composite(image, dimmed, mask)
        # The image's border does not erode a mask that reaches it.
        grown, shrunk = (
            np.asarray(mask.filter(kind(3))) > 0 for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
        )
        image.paste(_OUTLINE, (0, 0), Image.fromarray(grown & ~shrunk))
    pen = ImageDraw.Draw(image)
    if record.get("box"):
        last = [side - 1 for side in size] * 2
        pen.rectangle([min(value * scale, most) for value, most in zip(record["box"], last)], outline=_BOX, width=2)
    for x, y in record.get("points") or ():
        pen.ellipse((x * scale - 4, y * scale - 4, x * scale + 4, y * scale + 4), fill=_BOX, outline=(255, 255, 255))
    return image


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
