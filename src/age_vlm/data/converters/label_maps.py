"""Photographs with a class index per pixel: `age_vlm.data.label_maps` as a converter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..label_maps import LabelMaps, LabelMapsDataset
from ..rejects import Rejects
from ..schema import Sample


def label_maps(
    images: str | Path,
    labels: str | Path,
    classes: Sequence[str],
    ignore: Sequence[int] = (),
    instances: str | Path | None = None,
    length: int | None = None,
    *,
    seed: int = 0,
    size: tuple[int, int] = (256, 192),
    min_side: float = 0.45,
    augment: bool = True,
    questions: int | Literal["all"] = "all",
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """Random crops of label maps, each with a caption and questions: see `LabelMaps` and `LabelMapsDataset`.

    Args:
        length: number of crops; as many as there are photographs unless told.
        rejects: stays empty: a file that does not fit is refused, because an index without a name is a mistake in
            `classes`, not in the file.

    The decoded photographs stay in memory, unlike those of the other converters.
    """
    maps = LabelMaps(images, labels, classes, ignore, instances=instances, allow_outside=allow_outside)
    crops = LabelMapsDataset(
        maps,
        length=len(maps) if length is None else length,
        seed=seed,
        size=tuple(size),
        min_side=min_side,
        augment=augment,
        questions=questions,
    )
    for index in range(shard[0], len(crops), shard[1]):
        yield crops[index]
