"""Conversations in the format of LLaVA: pretraining captions, instructions, text-only chats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..left_out import LeftOut, Unusable, reported
from ..schema import Sample
from .chats import chat
from .pictures import open_picture
from .records import Table, existing_folder, part_of, read_json, read_table


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def llava(
    conversations: Table,
    images: str | Path | None = None,
    subset: str | None = None,
    split: str = "train",
    *,
    part: tuple[int, int] = (0, 1),
    left_out: LeftOut | None = None,
) -> Iterator[Sample]:
    """Samples of a LLaVA file, in its order.

    Args:
        conversations: a `.json` or `.jsonl` file of `{"id", "image", "conversations": [{"from", "value"}]}`, or a table
            with these columns as `read_table` takes it, its pictures inside; `subset` and `split` are of the latter.
        images: the folder that the paths in `image` start from.

    Source: https://github.com/haotian-liu/LLaVA/blob/main/docs/Data.md
    """
    folder = None if images is None else existing_folder(images, "images")
    if isinstance(conversations, (str, Path)) and Path(conversations).suffix in (".json", ".jsonl"):
        records = part_of((record for _, record in read_json(conversations, "conversations")), part)
    else:
        records = read_table(conversations, "conversations", part, subset, split)
    with reported(left_out, "llava") as left_out:
        for number, record in enumerate(records):
            name = f"{part[0] + number * part[1]}"
            if (sample := left_out.attempt(name, _sample, name, record, folder)) is not None:
                yield sample


def _sample(name: str, record: dict[str, Any], folder: Path | None) -> Sample:
    turns = [(_ROLES.get(turn["from"], turn["from"]), turn["value"]) for turn in record["conversations"]]
    shown = record.get("image")
    files = shown if isinstance(shown, list) else [] if shown is None else [shown]
    messages = chat(turns, len(files))
    if folder is None and any(isinstance(file, str) for file in files):
        raise Unusable("image is a path, and no folder of images was given")
    pictures = [open_picture(folder / file if isinstance(file, str) else file) for file in files]
    # Ids repeat within these files, where one picture has several conversations.
    return {"id": f"{record.get('id', 'llava')}/{name}", "images": pictures, "messages": messages, "groundings": []}
