"""Files and folders that are there whole or not at all, whenever what writes them is stopped or the disk is full.

What is unfinished lies beside them, under a name that nothing else has, with the mode that any file or folder has that the
user makes: Python's own temporary ones are for their owner alone.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


# How the name of one ends that was being written when its process was killed.
UNFINISHED = ".part"


def beside(path: Path, kind: str = "") -> Path:
    """A new name in the folder of `path`, for what becomes it, or what it was."""
    return path.with_name(f".{path.name}.{kind}{secrets.token_hex(4)}{UNFINISHED}")


def unfinished(folder: Path, names: Collection[str], kind: str = "") -> list[Path]:
    """What processes that were killed have left in a folder of files of these names; nothing that is only named alike."""
    ending = rf"\.{re.escape(kind)}[a-z0-9_]{{8}}{re.escape(UNFINISHED)}"
    parts = re.compile(rf"\.(.+){ending}", re.DOTALL)
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if (part := parts.fullmatch(path.name)) and part[1] in names]


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when it is whole and on the disk; until then that stays as it is."""
    part = beside(path)
    opened = open(part, "xb")
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    # The name of a file is on the disk only when its folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, text: str) -> None:
    """Writes text in UTF-8, see `replaced`."""
    with replaced(path) as file:
        file.write(text.encode())


def with_plain_modes(folder: Path) -> Path:
    """The folder, whose files have now the mode that `open` gives: safetensors writes weights for their owner alone.

    Args:
        folder: made by `mkdir`, whose mode tells that of files.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
    return folder
