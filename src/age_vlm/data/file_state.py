"""Whether files have changed since something was made of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def files_state(paths: Iterable[str | Path]) -> str:
    """A digest that changes with any file: at these paths and in these folders, at any depth and behind links.

    A file counts by its path, size and times, and is not read. The time of its last change cannot be set back by tools
    that keep the time of the content.
    """
    digest = hashlib.sha256()
    for path in sorted({os.path.abspath(path) for path in paths}):
        for file in _files(path, set()):
            try:
                state = os.stat(file)
            except OSError:  # a link to nothing
                continue
            digest.update(repr((file, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)).encode())
    return digest.hexdigest()


def _files(path: str, above: set[str]) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    real = os.path.realpath(path)
    if real in above:  # a link to a folder that it is in
        return
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(entry.path, above | {real})
        else:
            yield entry.path
