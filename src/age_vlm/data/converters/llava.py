"""Conversations in the format of LLaVA: pretraining captions, instructions, text-only chats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..rejects import Rejects, reported
from ..schema import Sample
from .chats import chat, require_only
from .images import ImageFolder, open_named
from .records import Table, read_json, read_table, shard_of


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def llava(
    conversations: Table,
    images: str | Path | None = None,
    subset: str | None = None,
    split: str = "train",
    *,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """Samples of a LLaVA file, in its order.

    Args:
        conversations: a `.json` or `.jsonl` file of `{"id", "image", "conversations": [{"from", "value"}]}`, or a table
            with these columns as `read_table` takes it, its images inside; `subset` and `split` are of the latter.
        images: the folder that the paths in `image` start from.
        allow_outside: see `ImageFolder`; without `images`, paths start from the working directory.

    Source: https://github.com/haotian-liu/LLaVA/blob/main/docs/Data.md
    """
    if images is None and allow_outside:
        images = "."
    folder = None if images is None else ImageFolder(images, "images", allow_outside)
    if isinstance(conversations, (str, Path)) and Path(conversations).suffix in (".json", ".jsonl"):
        records = shard_of((record for _, record in read_json(conversations, "conversations")), shard)
    else:
        records = read_table(conversations, "conversations", shard, subset, split)
    with reported(rejects, "llava") as rejects:
        for number, record in enumerate(records):
            name = f"{shard[0] + number * shard[1]}"
            if (sample := rejects.attempt(name, _sample, name, record, folder)) is not None:
                yield sample


def _sample(name: str, record: dict[str, Any], folder: ImageFolder | None) -> Sample:
    turns = [(_ROLES.get(turn["from"], turn["from"]), turn["value"]) for turn in record["conversations"]]
    require_only(record, "image")
    for turn in record["conversations"]:
        require_only(turn, None)
    shown = record.get("image")
    files = shown if isinstance(shown, list) else [] if shown is None else [shown]
    messages = chat(turns, len(files))
    opened = [open_named(file, folder) for file in files]
    # Ids repeat within these files, where one image has several conversations.
    return {"id": f"{record.get('id', 'llava')}/{name}", "images": opened, "messages": messages, "groundings": []}
