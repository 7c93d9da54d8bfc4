"""Captions of Flickr30k with the boxes of what their phrases name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

from ..label_maps import CAPTION_REQUEST
from ..rejects import Rejects, Unusable, reported
from ..schema import Sample, upright_size
from .chats import Phrase, line, statements
from .geometry import clipped_box
from .images import ImageFolder, open_image, require_size
from .index import Index, identity
from .records import existing_file, shard_of


_PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]*)\]")
# Captions come in tokens: "a yard .", "a man 's hat".
_SPACED = re.compile(r" +(?=[.,;:!?](?:\s|$)|'s\b)")


def flickr30k_entities(
    images: str | Path,
    sentences: str | Path,
    annotations: str | Path,
    ids: str | Path | None = None,
    *,
    request: str = CAPTION_REQUEST,
    per_image: int | None = None,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> Iterator[Sample]:
    """A sample for each image, in which each of its captions answers `request`. Phrases have boxes and no mask yet.

    Where several boxes belong to a phrase ("three men"), it is grounded once for each of them.

    Args:
        images: the folder of `<image id>.jpg`.
        sentences, annotations: the folders `Sentences` (`<image id>.txt`) and `Annotations` (`<image id>.xml`).
        ids: a file with an image id a line, such as `train.txt`; all unless told.
        per_image: at most so many captions of an image, the first.
        allow_outside: see `ImageFolder`; for the three folders.

    Source: https://github.com/BryanPlummer/flickr30k_entities
    """
    folder = ImageFolder(images, "images", allow_outside)
    texts = ImageFolder(sentences, "sentences", allow_outside)
    boxes = ImageFolder(annotations, "annotations", allow_outside)
    if ids is None:
        names = sorted(path.stem for path in texts.path.glob("*.txt"))
    else:
        names = existing_file(ids, "ids").read_text("utf-8").split()
    with reported(rejects, "flickr30k_entities") as rejects:
        index: Index[None] = Index("image", rejects)
        for name in names:
            index.add(name, None)
        for name, _ in shard_of(index.items(), shard):
            captions = rejects.attempt(name, _captions, texts, name)
            if captions is None:
                continue
            arguments = name, folder, captions, boxes, request, per_image, rejects
            if (sample := rejects.attempt(name, _sample, *arguments)) is not None:
                yield sample


def caption_phrases(caption: str) -> tuple[str, list[tuple[int, int, str]]]:
    """A line of `Sentences` without its marks, and start, end and chain id of each marked phrase.

    Raises:
        Unusable: nothing is left of it.
    """
    caption = line(caption)
    text, phrases, end = "", [], 0
    for match in _PHRASE.finditer(caption):
        text += _SPACED.sub("", caption[end : match.start()])
        chain, phrase = match[1], _SPACED.sub("", match[2]).strip()
        phrases.append((len(text), len(text) + len(phrase), chain))
        text, end = text + phrase, match.end()
    if not (text := text + _SPACED.sub("", caption[end:])).strip():
        raise Unusable("text is empty")
    return text, [phrase for phrase in phrases if phrase[0] < phrase[1]]


def _captions(folder: ImageFolder, name: str) -> list[str]:
    return folder.find([f"{name}.txt"], "file of sentences").read_text("utf-8").splitlines()


def _sample(
    name: str,
    folder: ImageFolder,
    captions: list[str],
    annotations: ImageFolder,
    request: str,
    per_image: int | None,
    rejects: Rejects,
) -> Sample:
    image = open_image(folder.find([f"{name}.jpg"]))
    try:
        root = ElementTree.parse(annotations.find([f"{name}.xml"], "file of annotations")).getroot()
    except ElementTree.ParseError:
        raise Unusable("file of annotations is not XML") from None
    if Path(root.findtext("filename", name)).stem != name:
        raise Unusable("file of annotations is of another image")
    if (size := root.find("size")) is not None:
        require_size(image, int(size.findtext("width")), int(size.findtext("height")))
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    for item in root.iter("object"):
        # Without a box it is the whole scene, or cannot be seen.
        if (corners := item.find("bndbox")) is None:
            continue
        box = rejects.attempt(f"box of {name}", _box, corners, upright_size(image))
        for chain in {identity(chain.text) for chain in item.iter("name")} if box is not None else ():
            boxes[chain].append(box)
    said = (rejects.attempt(f"caption of {name}", _said, caption, boxes) for caption in captions)
    usable = (caption for caption in said if caption is not None)
    return statements(f"flickr30k/{name}", image, request, islice(usable, per_image))


def _box(corners: ElementTree.Element, size: tuple[int, int]) -> list[float]:
    x0, y0, x1, y1 = (int(corners.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax"))
    # They count pixels from 1, the last one included.
    return clipped_box([x0 - 1, y0 - 1, x1, y1], *size)


def _said(caption: str, boxes: dict[str, list[list[float]]]) -> tuple[str, list[Phrase]]:
    text, phrases = caption_phrases(caption)
    return text, [(start, end, None, box) for start, end, chain in phrases for box in boxes.get(chain, ())]
