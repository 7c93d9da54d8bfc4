"""Photographs with a class index for every pixel, as training samples and evaluation questions.

A folder of images, a folder of single-channel PNGs with the same file stems, and a list of class names are enough: that
is the form of CamVid, Cityscapes, ADE20K and most segmentation tools. Whole photographs of one kind of scene show
nearly every class nearly always, so samples are random crops: they make presence a question about the picture.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from age_vlm.data.masks import encode_mask
from age_vlm.data.plurals import plural
from age_vlm.data.questions import MODES, NUMBER_WORDS, EvaluationItem, KindStatistics, Question, existence_negatives
from age_vlm.data.schema import Grounding, Message, Sample, assistant_message, grounding, user_message

from ..errors import UserError


CAPTION_REQUEST = "describe the picture."
IGNORED = 255
# Random crops that are looked at for one with texts of the kinds that are wanted.
_TRIES = 200
_INDEX_MODES = ("1", "L", "P", "I", "I;16")


@dataclass(frozen=True)
class Frame:
    """One photograph: `image` (height, width, 3) uint8, `labels` (height, width) uint8 with 255 where no class counts,
    `instances` (height, width) int32 with 0 where no instance counts, or None; `path` is the file of the image."""

    name: str
    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray | None = None
    path: Path | None = None

    @property
    def content(self) -> bytes:
        """Digest of the pixels."""
        return hashlib.blake2b(self.image.tobytes() + repr(self.image.shape).encode(), digest_size=20).digest()


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
    """Images with per-pixel class indices, decoded once and kept in memory.

    Args:
        images: folder of images, in any format Pillow reads.
        labels: folder of PNGs with one class index per pixel; a file belongs to the image with the same stem.
        classes: name of class 0, 1, ...; lower-cased, because they become words of questions.
        ignore: indices that stand for no class, such as "unlabelled".
        instances: optional folder of PNGs with one instance index per pixel, 0 for none; enables counting questions.
        present, absent: a class is present in a crop from this share of its area on, and absent up to that one. Between
            the two it is neither asked about nor mentioned.
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
        allow_outside: bool = False,
    ) -> None:
        self.classes = _class_names(classes)
        if not 0 <= absent < present <= 1:
            raise UserError(
                f"present and absent must be shares with 0 <= absent < present <= 1, got {present}, {absent}."
            )
        self.present, self.absent = present, absent
        image_files = _files(images, "images", allow_outside)
        label_files = _files(labels, "labels", allow_outside, suffix=".png")
        instance_files = _files(instances, "instances", allow_outside, suffix=".png") if instances is not None else {}
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
            raise UserError(f"instances must hold a PNG for every frame, got none for {missing[0]!r} in {instances}.")
        table = _index_table(len(self.classes), ignore)
        self.frames: tuple[Frame, ...] = tuple(
            _read_frame(name, image_files[name], label_files[name], instance_files.get(name), table, len(self.classes))
            for name in tqdm(names, desc="reading label maps", unit="image", leave=False, delay=2)
        )

    def __len__(self) -> int:
        return len(self.frames)

    def subset(self, frames: Sequence[Frame]) -> LabelMaps:
        """The same classes and options over some of the frames, without copying pixels."""
        part = object.__new__(LabelMaps)
        part.__dict__.update(self.__dict__, frames=tuple(frames))
        return part

    def split(self, fraction: float = 0.2, validation: float = 0.1) -> Splits:
        """Split by sorted name: the last `fraction` is the test part, the last `validation` of the rest for validation.

        Names, not chance, because neighbouring frames of a video are near copies and would leak from part to part. A frame
        that is in a later part too, under another name, leaves the earlier one, with a warning.

        Raises UserError when a share is not in (0, 1), or a part would be empty.
        """
        for name, share in (("fraction", fraction), ("validation", validation)):
            if not 0 < share < 1:
                raise UserError(f"{name} must lie between 0 and 1, got {share}.")
        n_test = max(1, round(len(self) * fraction))
        n_validation = max(1, round((len(self) - n_test) * validation))
        n_train = len(self) - n_test - n_validation
        parts = (self.frames[:n_train], self.frames[n_train : len(self) - n_test], self.frames[len(self) - n_test :])
        later: set[bytes] = set()
        subsets = []
        for part in reversed(parts if n_train > 0 else ((),)):
            subsets.insert(0, self.subset([frame for frame in part if frame.content not in later]))
            later |= {frame.content for frame in part}
        if not all(map(len, subsets)):
            raise UserError(f"a split needs a frame of its own for each of its three parts, got {len(self)} frames.")
        if repeated := len(self) - sum(map(len, subsets)):
            warnings.warn(f"{repeated} frames repeat held-out ones under other names, and are left out.", stacklevel=2)
        return Splits(*subsets)

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
        left, top, right, bottom = _random_box(frame.labels.shape, size, min_side, rng)
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
        raise UserError(f"classes must be 1 to {IGNORED} different names, got {list(classes)!r}.")
    return names


def _files(folder: str | Path, argument: str, allow_outside: bool, suffix: str | None = None) -> dict[str, Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{argument} must be a folder, got {str(folder)!r}, which is none.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or (suffix and path.suffix.lower() != suffix):
            continue
        if path.stem in files:
            raise UserError(f"{argument} must hold one file per stem, got {files[path.stem].name} and {path.name}.")
        if path.is_symlink() and not allow_outside and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{argument}: got {path.name}, a link that leads out of the folder, expected files, or allow_outside=True."
            )
        files[path.stem] = path
    return files


def _index_table(n_classes: int, ignore: Sequence[int]) -> np.ndarray:
    """(65536,) int32: stored index -> class, IGNORED, or -1 for an index that has no name."""
    table = np.full(65536, -1, np.int32)
    table[:n_classes] = np.arange(n_classes)
    for index in ignore:
        if not 0 <= index < len(table):
            raise UserError(f"ignore must hold indices of 0 to {len(table) - 1}, got {index}.")
        table[index] = IGNORED
    return table


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    # Pillow's decoders report broken files by any of these.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} must be an image that can be read, got: {error}.") from None


def _read_indices(path: Path, image_path: Path, size: tuple[int, int]) -> np.ndarray:
    picture = _open(path)
    if picture.mode not in _INDEX_MODES:
        raise UserError(f"{path} must hold one index per pixel, got a picture of mode {picture.mode}.")
    if picture.size != size:
        raise UserError(
            f"{path} must have the size of its image {image_path.name}, {size[0]} x {size[1]}, "
            f"got {picture.size[0]} x {picture.size[1]}."
        )
    return np.asarray(picture).astype(np.int32)


def _read_frame(
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
    return Frame(name, np.array(image), labels.astype(np.uint8), instances, image_path)


def _random_box(
    shape: tuple[int, ...], size: tuple[int, int], min_side: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    if min(size) < 1:
        raise UserError(f"size must be a positive width and height, got {size}.")
    if not 0 < min_side <= 1:
        raise UserError(f"min_side must lie in (0, 1], got {min_side}.")
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
        raise UserError(f"questions must be 'all' or a number from 0 on, got {questions!r}.")
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
            raise UserError(f"length must be at least 1, got {length}.")
        self.texts = texts
        self.maps, self.length, self.seed = maps, length, seed
        self.size, self.min_side, self.augment, self.questions = size, min_side, augment, questions

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"index must lie below {self.length}, got {index}.")
        index = int(index) % self.length
        for number in range(index, index + _TRIES * self.length, self.length):
            sample = self._sample(number)
            if sample["messages"]:
                return sample
        raise UserError(f"texts must be of a kind that crops have, got {self.texts}, which {_TRIES} crops had none of.")

    def _sample(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self.maps))
        frame = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.maps))[position]
        rng = np.random.default_rng([self.seed, 1, index])
        name = f"{self.maps.frames[frame].name}/{self.seed}.{index}"
        crop = self.maps.crop(frame, rng, self.size, self.min_side, augment=self.augment, id=name)
        return label_map_sample(self.maps, crop, rng, self.questions, self.texts)


def _sampled_presence(
    maps: LabelMaps, crops: int, size: tuple[int, int], min_side: float, seed: int
) -> Iterator[dict[str, bool]]:
    rng = np.random.default_rng([seed, 2])
    for number in range(crops):
        labels = maps.frames[number % len(maps)].labels
        left, top, right, bottom = _random_box(labels.shape, size, min_side, rng)
        yield maps.presence(labels[top:bottom, left:right])


def class_statistics(
    maps: LabelMaps, crops: int = 2000, size: tuple[int, int] = (256, 192), min_side: float = 0.45, seed: int = 0
) -> KindStatistics[str]:
    """How often classes are present, and present together, in random crops of the training frames."""
    sampled = _sampled_presence(maps, crops, size, min_side, seed)
    return KindStatistics.count([name for name, there in presence.items() if there] for presence in sampled)


def class_prior(
    maps: LabelMaps, crops: int = 2000, size: tuple[int, int] = (256, 192), min_side: float = 0.45, seed: int = 0
) -> dict[str, float]:
    """P(class is present) over random crops of the training frames in which it is clearly present or absent.

    This is all that a model can know without looking: report it beside any figure about presence.
    """
    there, asked = dict.fromkeys(maps.classes, 0), dict.fromkeys(maps.classes, 0)
    for presence in _sampled_presence(maps, crops, size, min_side, seed):
        for name, is_present in presence.items():
            asked[name] += 1
            there[name] += is_present
    return {name: there[name] / asked[name] if asked[name] else 0.0 for name in maps.classes}


def label_map_items(
    maps: LabelMaps,
    statistics: KindStatistics[str] | None = None,
    *,
    per_frame: int = 4,
    size: tuple[int, int] = (256, 192),
    min_side: float = 0.45,
    seed: int = 0,
    negatives: int = 2,
    pool: int | None = 4,
) -> list[EvaluationItem]:
    """Evaluation pictures with their questions: deterministic crops of every frame.

    Each has existence questions without a mode about every class that is clearly present or absent (for AUC), counting
    questions where there are instances, and, given `statistics` of the training frames, as many positive as negative
    existence questions (up to `negatives`) for each of POPE's three modes. A question's `phrase` spans the class name,
    its `mask` is None where the class is absent.

    Args:
        statistics: from `class_statistics` of the *training* part; without it there are no POPE questions.
        pool: popular negatives are drawn from this many of the most frequent absent classes, see `existence_negatives`.
    """
    items = []
    for crop in maps.evaluation_crops(per_frame, size, min_side, seed):
        presence = maps.presence(crop.labels)
        shown = [name for name, is_present in presence.items() if is_present]
        masks = {name: encode_mask(maps.mask(crop, name)) for name in shown}

        def ask(
            name: str, mode: str | None, crop: Crop = crop, presence: dict = presence, masks: dict = masks
        ) -> Question:
            text, span = existence_question(name)
            answer = "yes" if presence[name] else "no"
            key = f"{crop.id}:{mode or 'existence'}:{name}"
            return Question(key, crop.id, text, answer, "existence", mode, span, masks.get(name))

        questions = [ask(name, None) for name in presence]
        for name, number in maps.counts(crop).items():
            text, span = count_question(name)
            key = f"{crop.id}:count:{name}"
            questions.append(Question(key, crop.id, text, NUMBER_WORDS[number], "count", None, span, masks[name]))
        k = min(negatives, len(shown), len(presence) - len(shown))
        if statistics is not None and k > 0:
            rng = np.random.default_rng([seed, 3, zlib.crc32(crop.id.encode())])
            positives = [shown[i] for i in rng.permutation(len(shown))[:k]]
            chosen = existence_negatives(
                shown,
                list(presence),
                frequency=statistics.frequency,
                affinity=statistics.affinity(shown),
                rng=rng,
                count=k,
                pool=None if pool is None else max(pool, k),
            )
            questions += [ask(name, mode) for mode in MODES for name in positives + chosen[mode]]
        items.append(EvaluationItem(crop.id, crop.image, tuple(questions)))
    return items
