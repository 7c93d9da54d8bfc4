"""Photographs with a class index for every pixel, as training samples and evaluation questions.

A folder of images, a folder of single-channel PNGs with the same file stems, and a list of class names are enough: that
is the form of CamVid, Cityscapes, ADE20K and most segmentation tools. Whole photographs of one kind of scene show
nearly every class nearly always, so samples are random crops: they make presence a question about the image.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import UserError
from .byte_cache import MIB, ByteCache
from .label_frames import IGNORED, Frame, Frames, folder_files, index_table, read_frame
from .masks import encode_mask
from .plurals import plural
from .questions import NUMBER_WORDS
from .schema import Grounding, Message, Sample, assistant_message, grounding, user_message


CAPTION_REQUEST = "describe the picture."
# Random crops that are looked at for one with texts of the kinds that are wanted.
_TRIES = 200


@dataclass(frozen=True)
class Crop:
    """A cut-out of a frame at the size asked for, with labels (and instances) of the same height and width."""

    id: str
    image: Image.Image
    labels: np.ndarray
    instances: np.ndarray | None = None


class Splits(NamedTuple):
    """Parts of a `LabelMaps` that share no frame."""

    train: LabelMaps
    validation: LabelMaps
    test: LabelMaps


class LabelMaps:
    """Images with per-pixel class indices, all of them read once at the start, and then decoded when they are used.

    Args:
        images: folder of images, in any format Pillow reads.
        labels: folder of PNGs with one class index per pixel; a file belongs to the image with the same stem.
        classes: name of class 0, 1, ...; lower-cased, because they become words of questions.
        ignore: indices that stand for no class, such as "unlabelled".
        instances: optional folder of PNGs with one instance index per pixel, 0 for none; enables counting questions.
        present, absent: a class is present in a crop from this share of its area on, and absent up to that one. Between
            the two it is neither asked about nor mentioned.
        cache_bytes: decoded frames are kept in memory up to this, in each process, and decoded again beyond it.
        allow_outside: read files that are links to others outside of their folder.

    Raises UserError for a missing folder, no image with a label map, a file that cannot be read, a label map whose
    size is not its image's, an index that is neither a class nor ignored, or shares that are not 0 <= absent < present
    <= 1.
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        classes: Sequence[str],
        ignore: Sequence[int] = (),
        *,
        instances: str | Path | None = None,
        present: float = 0.004,
        absent: float = 0.0002,
        cache_bytes: int = 512 * MIB,
        allow_outside: bool = False,
    ) -> None:
        self.classes = _class_names(classes)
        if not 0 <= absent < present <= 1:
            raise UserError(
                f"present and absent: got {present}, {absent}, expected shares with 0 <= absent < present <= 1."
            )
        self.present, self.absent = present, absent
        image_files = folder_files(images, "images", allow_outside)
        label_files = folder_files(labels, "labels", allow_outside, suffix=".png")
        instance_files = {} if instances is None else folder_files(instances, "instances", allow_outside, suffix=".png")
        names = sorted(image_files.keys() & label_files.keys())
        if not names:
            raise UserError(
                f"images and labels must share file stems, got none among {len(image_files)} files of {images} "
                f"and {len(label_files)} PNGs of {labels}."
            )
        if len(names) < len(image_files):
            warnings.warn(
                f"{len(image_files) - len(names)} of {len(image_files)} images have no label map.", stacklevel=2
            )
        if instances is not None and (missing := [name for name in names if name not in instance_files]):
            raise UserError(f"instances: got none for {missing[0]!r} in {instances}, expected a PNG for every frame.")
        table = index_table(len(self.classes), ignore)
        files = tuple((name, image_files[name], label_files[name], instance_files.get(name)) for name in names)
        read = partial(read_frame, table=table, n_classes=len(self.classes))
        self.frames = Frames(files, read, ByteCache(cache_bytes))
        for number in tqdm(range(len(files)), desc="reading label maps", unit="image", leave=False, delay=2):
            self.frames.content(number)  # what cannot be read is said now, not in the middle of a training

    def __len__(self) -> int:
        return len(self.frames)

    def subset(self, frames: Sequence[Frame]) -> LabelMaps:
        """The same classes and options over some of the frames, a slice of `frames` for example, with the same cache."""
        part = object.__new__(LabelMaps)
        part.__dict__.update(self.__dict__, frames=frames)
        return part

    def split(self, fraction: float = 0.2, validation: float = 0.1) -> Splits:
        """Split by sorted name: the last `fraction` is the test split, the last `validation` of the rest for validation.

        Names, not chance, because neighbouring frames of a video are near copies and would leak from part to part. A frame
        that is in a later part too, under another name, leaves the earlier one, with a warning.

        Raises UserError when a share is not in (0, 1), or a part would be empty.
        """
        for name, share in (("fraction", fraction), ("validation", validation)):
            if not 0 < share < 1:
                raise UserError(f"{name}: got {share}, expected a number between 0 and 1.")
        n_test = max(1, round(len(self) * fraction))
        n_validation = max(1, round((len(self) - n_test) * validation))
        n_train = max(0, len(self) - n_test - n_validation)
        later: set[bytes] = set()
        parts: list[list[int]] = []
        for part in (range(len(self) - n_test, len(self)), range(n_train, len(self) - n_test), range(n_train)):
            contents = {number: self.frames.content(number) for number in part}
            parts.insert(0, [number for number in part if contents[number] not in later])
            later.update(contents.values())
        if not all(parts):
            raise UserError(f"a split needs a frame of its own for each of its three parts, got {len(self)} frames.")
        if repeated := len(self) - sum(map(len, parts)):
            warnings.warn(f"{repeated} frames repeat held-out ones under other names, and are left out.", stacklevel=2)
        return Splits(*(self.subset(self.frames.take(part)) for part in parts))

    def crop(
        self,
        index: int,
        rng: np.random.Generator,
        size: tuple[int, int] = (256, 192),
        min_side: float = 0.45,
        *,
        augment: bool = True,
        id: str | None = None,
    ) -> Crop:
        """A random cut-out of frame `index`, resized to `size` (width, height).

        Its sides are `min_side` to 1 times those of the largest box of that aspect ratio in the frame, so nothing is
        distorted. `augment` flips half of the crops left to right and jitters brightness, contrast and saturation.
        """
        frame = self.frames[index]
        left, top, right, bottom = random_box(frame.labels.shape, size, min_side, rng)
        window = (slice(top, bottom), slice(left, right))
        image = Image.fromarray(frame.image[window]).resize(size, Image.Resampling.BILINEAR)
        labels = _resize_nearest(frame.labels[window], size)
        instances = None if frame.instances is None else _resize_nearest(frame.instances[window], size)
        if augment:
            if rng.random() < 0.5:
                image = ImageOps.mirror(image)
                labels = np.ascontiguousarray(labels[:, ::-1])
                instances = None if instances is None else np.ascontiguousarray(instances[:, ::-1])
            for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhancer(image).enhance(rng.uniform(0.7, 1.3))
        return Crop(id or frame.name, image, labels, instances)

    def evaluation_crops(
        self, per_frame: int = 4, size: tuple[int, int] = (256, 192), min_side: float = 0.45, seed: int = 0
    ) -> Iterator[Crop]:
        """`per_frame` crops of every frame without augmentation; the same whichever other frames there are."""
        for index, frame in enumerate(self.frames):
            rng = np.random.default_rng([seed, zlib.crc32(frame.name.encode())])
            for number in range(per_frame):
                yield self.crop(index, rng, size, min_side, augment=False, id=f"{frame.name}/{number}")

    def presence(self, labels: np.ndarray) -> dict[str, bool]:
        """Class name to present (true) or absent (false), in class order, without the classes too small to tell.

        Args:
            labels: (height, width) uint8 class indices, 255 where no class counts.
        """
        areas = np.bincount(labels.reshape(-1), minlength=IGNORED + 1)[: len(self.classes)] / labels.size
        clear = (areas >= self.present) | (areas <= self.absent)
        return {self.classes[i]: bool(areas[i] >= self.present) for i in np.flatnonzero(clear)}

    def mask(self, crop: Crop, name: str) -> np.ndarray:
        """(height, width) bool: where the crop shows the class."""
        return crop.labels == self.classes.index(name)

    def counts(self, crop: Crop) -> dict[str, int]:
        """Instances of each present class, unless one is too small to tell; empty without instance maps."""
        if crop.instances is None:
            return {}
        counts = {}
        for name, is_present in self.presence(crop.labels).items():
            if not is_present:
                continue
            found = crop.instances[self.mask(crop, name)]
            areas = np.unique(found[found > 0], return_counts=True)[1] / crop.labels.size
            visible = areas[areas > self.absent]
            if len(visible) and (visible >= self.present).all() and len(visible) < len(NUMBER_WORDS):
                counts[name] = len(visible)
        return counts


def _class_names(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(str(name).strip().lower() for name in classes)
    if not 0 < len(names) <= IGNORED or not all(names) or len(set(names)) < len(names):
        raise UserError(f"classes: got {list(classes)!r}, expected 1 to {IGNORED} different names.")
    return names


def random_box(
    shape: tuple[int, ...], size: tuple[int, int], min_side: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    if min(size) < 1:
        raise UserError(f"size: got {size}, expected a positive width and height.")
    if not 0 < min_side <= 1:
        raise UserError(f"min_side: got {min_side}, expected a number in (0, 1].")
    height, width = shape[:2]
    scale = min(width / size[0], height / size[1]) * rng.uniform(min_side, 1)
    box_width = min(width, max(1, round(size[0] * scale)))
    box_height = min(height, max(1, round(size[1] * scale)))
    left = int(rng.integers(width - box_width + 1))
    top = int(rng.integers(height - box_height + 1))
    return left, top, left + box_width, top + box_height


def _resize_nearest(indices: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(indices).resize(size, Image.Resampling.NEAREST))


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def existence_question(name: str) -> tuple[str, tuple[int, int]]:
    """The question whether a class is there, and the character span of the class in it."""
    start = f"is there {_article(name)} "
    return f"{start}{name} in the picture?", (len(start), len(start) + len(name))


def count_question(name: str) -> tuple[str, tuple[int, int]]:
    """The question how many instances of a class there are, and the character span of its plural in it."""
    start, noun = "how many ", plural(name)
    return f"{start}{noun} are in the picture?", (len(start), len(start) + len(noun))


def caption(names: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """A list of the classes in words, and the character span of each."""
    text, spans = "", []
    for number, name in enumerate(names):
        if number:
            text += " and " if number == len(names) - 1 else ", "
        text += f"{_article(name)} {name}"
        spans.append((len(text) - len(name), len(text)))
    return text or "nothing", spans


def label_map_texts(classes: Sequence[str]) -> Iterator[str]:
    """Texts that together hold every word label maps with these classes can say: for `build_word_tokenizer`."""
    yield from (CAPTION_REQUEST, caption(list(classes) * 2)[0], "yes", "no", "nothing", *NUMBER_WORDS)
    for name in classes:
        yield from (caption([name])[0], existence_question(name)[0], count_question(name)[0])


def label_map_sample(
    maps: LabelMaps,
    crop: Crop,
    rng: np.random.Generator,
    questions: int | Literal["all"] = "all",
    texts: Collection[str] | None = None,
) -> Sample:
    """One crop as a training sample of the schema in `age_vlm.data.schema`.

    The first turn asks for a caption, which names every present class, each grounded in its mask. Then come existence
    questions in random order: about every class that is clearly present or absent, or `questions` of them; the phrase
    is grounded where the class is present. With instance maps, one counting question ends the chat where one can be
    asked. `texts` keeps some of these kinds only, of `caption`, `existence` and `count`; there may be nothing to keep.

    Raises UserError when `questions` is neither "all" nor a number from 0 on.
    """
    if questions != "all" and not (isinstance(questions, int) and questions >= 0):
        raise UserError(f"questions: got {questions!r}, expected 'all' or a number from 0 on.")
    presence = maps.presence(crop.labels)
    shown = [name for name, is_present in presence.items() if is_present]
    masks = {name: encode_mask(maps.mask(crop, name)) for name in shown}

    messages: list[Message] = []
    groundings: list[Grounding] = []

    def say(
        kind: str, question: str, answer: str, message: int = 0, spans: Sequence = (), names: Sequence = ()
    ) -> None:
        """One turn; the spans of the classes named are in its question (message 0) or its answer (1)."""
        if texts is not None and kind not in texts:
            return
        groundings.extend(grounding(len(messages) + message, *s, 0, masks[n]) for n, s in zip(names, spans))
        messages.extend((user_message(question, images=0 if messages else 1), assistant_message(answer)))

    text, spans = caption(shown)
    say("caption", CAPTION_REQUEST, text, 1, spans, shown)

    asked = [list(presence)[i] for i in rng.permutation(len(presence))]
    for name in asked if questions == "all" else asked[:questions]:
        text, span = existence_question(name)
        say("existence", text, "yes" if presence[name] else "no", 0, [span], [name] if presence[name] else [])

    if counts := maps.counts(crop):
        name = list(counts)[rng.integers(len(counts))]
        text, span = count_question(name)
        say("count", text, NUMBER_WORDS[counts[name]], 0, [span], [name])
    return {"id": crop.id, "images": [crop.image], "messages": messages, "groundings": groundings}


class LabelMapsDataset(Dataset):
    """Random crops as training samples, map-style: an index always gives the same sample, for a given seed.

    Every run of `len(maps)` indices visits each frame once. `length` only bounds the indices: it costs nothing. Where
    `texts` leaves a crop without any, one from beyond these indices takes its place.

    Raises:
        UserError: `length` is below 1; on access, where no crop has texts of these kinds.
    """

    def __init__(
        self,
        maps: LabelMaps,
        *,
        length: int = 100_000,
        seed: int = 0,
        size: tuple[int, int] = (256, 192),
        min_side: float = 0.45,
        augment: bool = True,
        questions: int | Literal["all"] = "all",
        texts: Collection[str] | None = None,
    ) -> None:
        if length < 1:
            raise UserError(f"length: got {length}, expected at least 1.")
        self.texts = texts
        self.maps, self.length, self.seed = maps, length, seed
        self.size, self.min_side, self.augment, self.questions = size, min_side, augment, questions

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"index: got {index}, expected a number below {self.length}.")
        index = int(index) % self.length
        for number in range(index, index + _TRIES * self.length, self.length):
            sample = self._sample(number)
            if sample["messages"]:
                return sample
        raise UserError(f"texts: got {self.texts}, which {_TRIES} crops had none of, expected kinds that crops have.")

    def _sample(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self.maps))
        frame = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.maps))[position]
        rng = np.random.default_rng([self.seed, 1, index])
        name = f"{self.maps.frames[frame].name}/{self.seed}.{index}"
        crop = self.maps.crop(frame, rng, self.size, self.min_side, augment=self.augment, id=name)
        return label_map_sample(self.maps, crop, rng, self.questions, self.texts)
