"""Photographs and their label maps as files, decoded when they are used."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError, reading
from .byte_cache import ByteCache


IGNORED = 255
_INDEX_MODES = ("1", "L", "P", "I", "I;16")


@dataclass(frozen=True)
class Frame:
    """One photograph: `image` (height, width, 3) uint8, `labels` (height, width) uint8 with 255 where no class counts,
    `instances` (height, width) int32 with 0 where no instance counts, or None."""

    name: str
    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray | None = None


@dataclass(frozen=True)
class Frames(Sequence[Frame]):
    """Frames that are decoded on access, the last used of them kept in `cache`; a slice shares it.

    Attributes:
        files: name, image, label map and instance map (or None) of each.
        read: makes a `Frame` of these.
    """

    files: tuple[tuple[str, Path, Path, Path | None], ...]
    read: Callable[..., Frame]
    cache: ByteCache[Frame]
    _contents: dict[tuple, bytes] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Frames(self.files[index], self.read, self.cache, self._contents)
        files = self.files[index]
        return self.cache.get(files, partial(self.read, *files))

    def take(self, numbers: Sequence[int]) -> Frames:
        """Some of the frames, with the same cache."""
        return Frames(tuple(self.files[number] for number in numbers), self.read, self.cache, self._contents)

    def content(self, number: int) -> bytes:
        """Digest of the pixels of a frame, whatever its name and format."""
        files = self.files[number]
        if files not in self._contents:
            image = self[number].image
            shape = repr(image.shape).encode()
            self._contents[files] = hashlib.blake2b(image.tobytes() + shape, digest_size=20).digest()
        return self._contents[files]


def folder_files(
    folder: str | Path, argument: str, allow_outside: bool = False, suffix: str | None = None
) -> dict[str, Path]:
    """Stem -> file of a folder.

    Raises:
        UserError: there is no such folder, a stem is there twice, or (unless allowed) a file is a link that leads out.
    """
    folder = Path(folder)
    with reading(argument, folder):
        if not folder.is_dir():
            raise UserError(f"{argument}: got {str(folder)!r}, expected a folder.")
        paths = sorted(folder.iterdir())
    files: dict[str, Path] = {}
    for path in paths:
        if path.name.startswith(".") or not path.is_file() or (suffix and path.suffix.lower() != suffix):
            continue
        if path.stem in files:
            raise UserError(f"{argument}: got {files[path.stem].name} and {path.name}, expected one file per stem.")
        if path.is_symlink() and not allow_outside and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{argument}: got {path.name}, a link that leads out of the folder, expected files, or allow_outside=True."
            )
        files[path.stem] = path
    return files


def index_table(n_classes: int, ignore: Sequence[int]) -> np.ndarray:
    """(65536,) int32: stored index -> class, IGNORED, or -1 for an index that has no name."""
    table = np.full(65536, -1, np.int32)
    table[:n_classes] = np.arange(n_classes)
    for index in ignore:
        if not 0 <= index < len(table):
            raise UserError(f"ignore: got {index}, expected indices of 0 to {len(table) - 1}.")
        table[index] = IGNORED
    return table


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    # Pillow's decoders report broken files by any of these.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: could not be read, expected an image: {error}.") from None


def _read_indices(path: Path, image_path: Path, size: tuple[int, int]) -> np.ndarray:
    opened = _open(path)
    if opened.mode not in _INDEX_MODES:
        raise UserError(f"{path}: got an image of mode {opened.mode}, expected one index per pixel.")
    if opened.size != size:
        raise UserError(
            f"{path}: got {opened.size[0]} x {opened.size[1]} pixels, expected the size of its image {image_path.name}, "
            f"{size[0]} x {size[1]}."
        )
    return np.asarray(opened).astype(np.int32)


def read_frame(
    name: str, image_path: Path, label_path: Path, instance_path: Path | None, table: np.ndarray, n_classes: int
) -> Frame:
    image = _open(image_path).convert("RGB")
    indices = _read_indices(label_path, image_path, image.size)
    labels = table[indices]
    if (labels < 0).any():
        raise UserError(
            f"{label_path} holds the class index {indices[labels < 0][0]}, "
            f"expected 0 to {n_classes - 1} (one per name in classes) or an index listed in ignore."
        )
    instances = None if instance_path is None else _read_indices(instance_path, image_path, image.size)
    return Frame(name, np.array(image), labels.astype(np.uint8), instances)
