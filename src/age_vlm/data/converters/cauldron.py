"""Tables in the format of The Cauldron and FineVision: `images`, and `texts` of user and assistant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..left_out import LeftOut, reported
from ..schema import Sample
from .chats import chat
from .pictures import open_picture
from .records import Table, read_table


def cauldron(
    data: Table,
    subset: str | None = None,
    split: str = "train",
    *,
    part: tuple[int, int] = (0, 1),
    left_out: LeftOut | None = None,
) -> Iterator[Sample]:
    """Samples of a table with the columns `images` and `texts` (`{"user", "assistant"}`), streamed.

    Args:
        data: its name on the Hub, a folder or file of parquet, or a loaded data set.
        subset, split: of a data set on the Hub.

    Source: https://huggingface.co/datasets/HuggingFaceM4/the_cauldron and .../FineVision
    """
    with reported(left_out, "cauldron") as left_out:
        for number, row in enumerate(read_table(data, "data", part, subset, split)):
            name = f"{subset or 'cauldron'}/{split}/{part[0]}.{number}"
            if (sample := left_out.attempt(name, _sample, name, row)) is not None:
                yield sample


def _sample(name: str, row: dict[str, Any]) -> Sample:
    turns = [turn for text in row["texts"] for turn in (("user", text["user"]), ("assistant", text["assistant"]))]
    files = row.get("images") or []
    messages = chat(turns, len(files))
    return {"id": name, "images": [open_picture(file) for file in files], "messages": messages, "groundings": []}
