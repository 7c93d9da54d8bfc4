"""Images that are held out, found again in other samples by their content, whatever their name or their sample's id."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm.auto import tqdm


if TYPE_CHECKING:
    import datasets
    import pyarrow


class StoredImage(NamedTuple):
    """An image as it is stored: its size in bytes, and what reads these."""

    size: int
    read: Callable[[], bytes]

    @classmethod
    def of_file(cls, path: str | Path) -> StoredImage | None:
        """The image in a file, or None where there is no such file."""
        try:
            return cls(os.path.getsize(path), Path(path).read_bytes)
        except OSError:
            return None


class HeldOutImages:
    """Images that must not be trained on. Two are the same where their encoded bytes are.

    Files of different size are different: most are never read.
    """

    def __init__(self) -> None:
        self._digests: dict[int, set[bytes]] = defaultdict(set)

    def __len__(self) -> int:
        return sum(map(len, self._digests.values()))

    def add(self, images: Iterable[StoredImage | None]) -> None:
        """Hold these out as well."""
        for image in images:
            if image is not None:
                self._digests[image.size].add(_digest(image))

    def hold(self, images: Iterable[StoredImage | None]) -> bool:
        """Whether any of these is held out."""
        return any(
            image is not None and image.size in self._digests and _digest(image) in self._digests[image.size]
            for image in images
        )

    def add_samples(self, samples: datasets.Dataset, numbers: Sequence[int]) -> None:
        """Hold out all images of these samples."""
        for _, images in _stored_images(samples, numbers):
            self.add(images)

    def others(self, samples: datasets.Dataset, numbers: Sequence[int]) -> list[int]:
        """Which of these samples show none of the images."""
        if not len(self):
            return list(numbers)
        return [number for number, images in _stored_images(samples, numbers) if not self.hold(images)]


def _digest(image: StoredImage) -> bytes:
    return hashlib.blake2b(image.read(), digest_size=20).digest()


def _stored_images(samples: datasets.Dataset, numbers: Sequence[int]) -> Iterator[tuple[int, list[StoredImage | None]]]:
    if not len(numbers):
        return
    # As storage has them: images are not decoded, and bytes stay in the file until they are read.
    rows = samples.select(numbers).select_columns(["images"]).with_format("arrow").iter(batch_size=256)
    images = (row for batch in rows for row in batch["images"])
    shown = tqdm(images, desc="looking for held-out images", total=len(numbers), unit="sample", leave=False, delay=2)
    for number, row in zip(numbers, shown):
        yield number, [_stored_image(image) for image in row.values or ()]


def _stored_image(image: pyarrow.StructScalar) -> StoredImage | None:
    content, path = image["bytes"], image["path"]
    if content.is_valid:
        return StoredImage(len(content.as_buffer()), content.as_py)
    return StoredImage.of_file(path.as_py()) if path.is_valid else None


def warn_of_held_out(number: int, name: str) -> None:
    """Says how many samples of the data called `name` are not trained on, if there are any."""
    if number:
        warnings.warn(
            f"{number} samples of '{name}' show images that are held out, and are not trained on.", stacklevel=4
        )
