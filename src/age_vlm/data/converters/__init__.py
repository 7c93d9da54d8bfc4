"""Data sets as people have them -> samples of `age_vlm.data.schema`: one generator function for each source."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from ...errors import UserError, one_of
from ..file_state import files_state
from ..rejects import Rejects
from ..schema import FEATURES, Sample
from .cauldron import cauldron
from .coco import coco, segments_beside
from .flickr30k_entities import flickr30k_entities
from .images import stored_image
from .label_maps import label_maps
from .llava import llava
from .refcoco import refcoco, refcoco_hub
from .visual_genome import visual_genome


CONVERTERS: dict[str, Callable[..., Iterator[Sample]]] = {
    "llava": llava,
    "coco": coco,
    "refcoco": refcoco,
    "refcoco_hub": refcoco_hub,
    "flickr30k_entities": flickr30k_entities,
    "visual_genome": visual_genome,
    "cauldron": cauldron,
    "label_maps": label_maps,
}
"""Name of a source -> its converter. All take `shard=(number, shards)`, one of so many interleaved shards of
the records, and `rejects`, which counts what could not be used; without it, they warn at the end about what they left out."""


def convert(
    name: str,
    *,
    streaming: bool = False,
    shards: int = 1,
    cache_dir: str | Path | None = None,
    **arguments: Any,
) -> Dataset | IterableDataset:
    """A data set of the schema, with the features `FEATURES`.

    Args:
        name: a key of `CONVERTERS`; `arguments` are those of its converter.
        streaming: make samples as they are asked for, anew in each pass, and keep nothing. Otherwise they are made once
            and kept in the cache of `datasets`: text and masks, and the paths of images that are files. Files that
            have not changed since are not converted again; with `allow_outside`, all are. Of a data set on the Hub only
            the name counts.
        shards: parts of a stream, for as many workers of a data loader. Each reads the annotations of its own part.
        cache_dir: where the cache is, if not where `datasets` has it.

    What is left out is said in a warning at the end of a conversion, by the process that made it.

    Raises:
        UserError: an unknown name or argument, what the converter says of its arguments, or that nothing could be used.
    """
    if name not in CONVERTERS:
        raise UserError(f"name: got {name!r}, expected {one_of(name, sorted(CONVERTERS))}.")
    if not isinstance(shards, int) or shards < 1 or (shards > 1 and not streaming):
        raise UserError(f"shards: got {shards!r}, expected a number from 1 on, and 1 unless streaming.")
    known = inspect.signature(CONVERTERS[name]).parameters.keys() - {"shard", "rejects"}
    needed = {
        key for key in known if inspect.signature(CONVERTERS[name]).parameters[key].default is inspect.Parameter.empty
    }
    if wrong := sorted(arguments.keys() - known) or sorted(needed - arguments.keys()):
        raise UserError(
            f"{wrong[0]}: {'unknown' if wrong[0] in arguments else 'missing'} argument of {name!r}, expected "
            f"{', '.join(sorted(needed))} and optionally {', '.join(sorted(known - needed))}."
        )
    # Not a list, which `datasets` would take for shards and deal out to workers.
    settings = {"name": name, "arguments": arguments, "shards": shards}
    if streaming:
        return IterableDataset.from_generator(
            _stored_samples, features=FEATURES, gen_kwargs={**settings, "numbers": list(range(shards))}
        )
    try:
        return Dataset.from_generator(
            _stored_samples,
            features=FEATURES,
            cache_dir=None if cache_dir is None else str(cache_dir),
            gen_kwargs={**settings, "numbers": (0,), "state": _state(name, arguments)},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _stored_samples(
    name: str, arguments: dict[str, Any], shards: int, numbers: Sequence[int], state: str = ""
) -> Iterator[dict[str, Any]]:
    """`state` only tells the cache of `datasets` apart what is made of files before and after a change."""
    rejects, made = Rejects(), 0
    for number in numbers:
        for sample in CONVERTERS[name](**arguments, shard=(number, shards), rejects=rejects):
            made += 1
            yield {**sample, "images": [stored_image(image) for image in sample["images"]]}
    if rejects.total and not made and len(numbers) == shards:
        raise UserError(f"{name}: nothing could be used, {rejects}.")
    rejects.warn(name)


def _state(name: str, arguments: dict[str, Any]) -> str:
    """Changes with any file that the converter reads."""
    from age_vlm import __version__

    if arguments.get("allow_outside"):
        # Which files these are only their records say.
        return uuid4().hex
    parameters = inspect.signature(CONVERTERS[name]).parameters
    paths = {
        key: Path(value)
        for key, value in arguments.items()
        if isinstance(value, (str, Path)) and re.search("Path|Table", str(parameters[key].annotation))
    }
    if name == "coco" and "panoptic" in paths and "segments" not in paths:
        paths["segments"] = segments_beside(paths["panoptic"])
    return f"{__version__} {files_state(paths.values())}"
