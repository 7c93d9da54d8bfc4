"""Pictures of samples: found, opened when a sample is made, and stored as the file they came from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..left_out import Unusable
from ..schema import upright_size


def open_picture(source: str | Path | Mapping[str, Any]) -> Image.Image:
    """Open and decode a picture: a path, or `{"bytes", "path"}` as `datasets` gives what it does not decode.

    Raises:
        Unusable: the file is missing, or it cannot be decoded to its end.
    """
    if isinstance(source, Mapping):
        encoded, path = source.get("bytes"), source.get("path")
    else:
        encoded, path = None, source
    if encoded is None and not path:
        raise Unusable("image is missing")
    try:
        picture = Image.open(BytesIO(Path(path).read_bytes() if encoded is None else encoded))
        picture.load()
    except FileNotFoundError:
        raise Unusable("image file is missing") from None
    # Decoders of damaged files raise nearly anything, and a run over millions of files has to survive each of them.
    except Exception:
        raise Unusable("image cannot be read") from None
    # Read back by `stored_picture`: encoding the pixels again would lose quality, and size with PNG.
    picture.encoded = encoded
    picture.filename = str(Path(path).absolute()) if encoded is None else ""
    return picture


def stored_picture(picture: Image.Image) -> Image.Image | dict[str, Any]:
    """What storage takes of a picture from `open_picture`, its path or its bytes; other pictures as they are."""
    if getattr(picture, "encoded", None) is not None:
        return {"path": None, "bytes": picture.encoded}
    return {"path": picture.filename, "bytes": None} if getattr(picture, "filename", "") else picture


def find_picture(folder: Path, names: Iterable[str]) -> Path:
    """The first of these files of the folder that is there.

    Raises:
        Unusable: none is.
    """
    for name in names:
        # Unlike `Path.is_file`, false for what cannot be a name at all.
        if os.path.isfile(folder / name):
            return folder / name
    raise Unusable("image file is missing")


def require_size(picture: Image.Image, width: int, height: int) -> None:
    """Refuse annotations that count pixels of a differently sized picture.

    Raises:
        Unusable: the upright picture is not of this size.
    """
    if upright_size(picture) != (width, height):
        raise Unusable("image is not of the size that its annotations are for")
