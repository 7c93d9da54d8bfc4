"""Images of samples: found, opened when a sample is made, and stored as the file they came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..rejects import Unusable
from ..schema import upright_size
from .records import existing_folder


OUTSIDE = "image lies outside of its folder, which needs allow_outside"
URL = re.compile(r"[a-z][a-z0-9+.-]*://|(?:data|file|https?):", re.IGNORECASE)
"""How what is no path of a file begins."""


class ImageFolder:
    """A folder of files that records name.

    Args:
        folder, argument: the folder, and which argument it came as.
        allow_outside: open what a record names, also where it lies outside of the folder: by an absolute path, by `..`,
            or through a symbolic link.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, folder: str | Path, argument: str, allow_outside: bool = False) -> None:
        self.path, self.allow_outside = existing_folder(folder, argument), allow_outside

    def find(self, names: Iterable[str], what: str = "image file") -> Path:
        """The first of these files that is there.

        Raises:
            Unusable: none is, or one is asked for that lies outside of the folder or is a URL.
        """
        for name in names:
            # Unlike `Path.is_file`, false for what cannot be a name at all.
            if os.path.isfile(self._inside(name)):
                return self.path / name
        raise Unusable(f"{what} is missing")

    def _inside(self, name: str) -> Path:
        if not isinstance(name, str):
            raise Unusable("name of an image is no text")
        if URL.match(name):
            raise Unusable("image is a URL")
        path = self.path / name
        if self.allow_outside or "\0" in name:
            return path
        if os.path.isabs(name) or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.path)):
            raise Unusable(OUTSIDE)
        return path


def open_image(source: str | Path | Mapping[str, Any]) -> Image.Image:
    """Open and decode an image: a path, or `{"bytes", "path"}` as `datasets` gives what it does not decode.

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
        image = Image.open(BytesIO(Path(path).read_bytes() if encoded is None else encoded))
        image.load()
    except FileNotFoundError:
        raise Unusable("image file is missing") from None
    # Decoders of damaged files raise nearly anything, and a run over millions of files has to survive each of them.
    except Exception:
        raise Unusable("image cannot be read") from None
    # Read back by `stored_image`: encoding the pixels again would lose quality, and size with PNG.
    image.encoded = encoded
    image.filename = str(Path(path).absolute()) if encoded is None else ""
    return image


def stored_image(image: Image.Image) -> Image.Image | dict[str, Any]:
    """What storage takes of an image from `open_image`, its path or its bytes; other images as they are."""
    if getattr(image, "encoded", None) is not None:
        return {"path": None, "bytes": image.encoded}
    return {"path": image.filename, "bytes": None} if getattr(image, "filename", "") else image


def open_named(source: Any, folder: ImageFolder | None) -> Image.Image:
    """An image as a record has it: the name of a file in `folder`, or `{"bytes", "path"}`, of which the bytes count.

    Raises:
        Unusable: as `ImageFolder.find` and `open_image`, or it is a name and there is no folder.
    """
    is_table = isinstance(source, Mapping)
    name = source.get("path") if is_table and source.get("bytes") is None else source
    if not isinstance(name, str) or (is_table and not name):
        return open_image(source)
    if folder is None:
        raise Unusable("image is a path, and no folder of images was given")
    return open_image(folder.find([name]))


def require_size(image: Image.Image, width: int, height: int) -> None:
    """Refuse annotations that count pixels of a differently sized image.

    Raises:
        Unusable: the upright image is not of this size.
    """
    if upright_size(image) != (width, height):
        raise Unusable("image is not of the size that its annotations are for")
