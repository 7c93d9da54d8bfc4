"""Tables in the format of The Cauldron and FineVision: `images`, and `texts` of user and assistant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..rejects import Rejects, Unusable, reported
from ..schema import Sample
from .chats import chat, require_only
from .images import ImageFolder, open_named
from .records import Table, read_table


def cauldron(
    data: Table,
    subset: str | None = None,
    split: str = "train",
    *,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """Samples of a table with the columns `images` and `texts` (`{"user", "assistant"}`), streamed.

    Args:
        data: its name on the Hub, a folder or file of parquet, or a loaded data set.
        subset, split: of a data set on the Hub.
        allow_outside: open images that the table does not hold, but names by a path on this machine.

    Source: https://huggingface.co/datasets/HuggingFaceM4/the_cauldron and .../FineVision
    """
    folder = ImageFolder(".", "data", allow_outside) if allow_outside else None
    with reported(rejects, "cauldron") as rejects:
        for number, row in enumerate(read_table(data, "data", shard, subset, split)):
            name = f"{subset or 'cauldron'}/{split}/{shard[0]}.{number}"
            if (sample := rejects.attempt(name, _sample, name, row, folder)) is not None:
                yield sample


def _sample(name: str, row: dict[str, Any], folder: ImageFolder | None) -> Sample:
    turns = [turn for text in row["texts"] for turn in (("user", text["user"]), ("assistant", text["assistant"]))]
    require_only(row, "images")
    for text in row["texts"]:
        require_only(text, None)
    files = row.get("images") or []
    if not isinstance(files, list):
        raise Unusable("images are no list")
    messages = chat(turns, len(files))
    return {"id": name, "images": [open_named(file, folder) for file in files], "messages": messages, "groundings": []}
