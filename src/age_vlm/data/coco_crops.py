"""Random crops of photographs in COCO's format as training samples, with questions about what each crop shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from torch.utils.data import Dataset

from ..errors import UserError
from .converters.chats import sample_of
from .converters.coco_instances import Choice, Things, check_numbers, grounded, survey
from .converters.images import ImageFolder, open_image, require_size
from .converters.records import read_coco
from .converters.refcoco import image_names
from .instance_questions import ASKED, Shown, check_asked, training_turns
from .masks import MaskRLE, decode_mask, encode_mask
from .rejects import Rejects, Unusable
from .schema import Sample


_TRIES = 20


class CocoCrops(Dataset):
    """Map-style: an index always gives the same crop with the same questions, for a given seed.

    Every run of `len(numbers)` indices visits each photograph once. `length` only bounds the indices. What a crop cuts off
    is absent from it, and what it leaves too little of is neither asked about nor absent.

    Attributes:
        numbers: identities of the photographs.
        statistics: of the training images, what POPE chooses absent objects by.
        rejects: what could not be used so far.

    Args:
        images: folder of the photographs.
        instances: file of their instances, all of whose categories have to be annotated in all of them.
        split, held_out, min_area, per_kind: see `coco`.
        questions: kinds of them, some of `ASKED`.
        min_side: smallest side of a crop, as a share of that of the photograph; 1 is no crop.
        augment: crop and mirror; otherwise the whole photograph each time.

    Raises:
        UserError: one sentence, for an argument that is not as described; on access, where no crop can be asked about.
    """

    def __init__(
        self,
        images: str | Path,
        instances: str | Path,
        *,
        split: str = "train",
        held_out: float = 0.2,
        length: int = 100_000,
        seed: int = 0,
        questions: Collection[str] = ASKED,
        per_kind: int = 3,
        min_area: float = 0.005,
        min_side: float = 0.6,
        augment: bool = True,
        allow_outside: bool = False,
    ) -> None:
        check_asked(list(questions))
        check_numbers(per_kind=per_kind, min_area=min_area, seed=seed, length=length)
        if not 0 < min_side <= 1:
            raise UserError(f"min_side: got {min_side}, expected a number in (0, 1].")
        choice = Choice(split, held_out)
        self.folder = ImageFolder(images, "images", allow_outside)
        self.rejects = Rejects()
        self._shown: dict[str, Shown] = {}
        seen = survey(instances, "instances")
        self.described = dict(seen.images.items())
        self.statistics = seen.statistics(choice)
        self.categories = sorted(name for _, name in seen.categories.items())
        self.numbers = list(choice.of(self.described, (0, 1), self.folder, self.rejects))
        if not self.numbers:
            raise UserError(f"instances: got '{instances}' with no image of the split '{split}', expected some.")
        self.things = read_coco(instances, "instances", self.rejects, set(self.numbers))
        self.length, self.seed, self.questions, self.per_kind = length, seed, tuple(questions), per_kind
        self.min_area, self.min_side, self.augment = min_area, min_side, augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"index: got {index}, expected a number below {self.length}.")
        index = int(index) % self.length
        for number in range(index, index + _TRIES * self.length, self.length):
            sample = self.rejects.attempt(number, self._sample, number)
            if sample is not None:
                return sample
        raise UserError(f"images: {_TRIES} crops could not be asked about, {self.rejects}.")

    def file(self, number: str) -> Path:
        """Where a photograph is, by its identity."""
        return self.folder.find(image_names(self.described[number]["file_name"]))

    def _sample(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self.numbers))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.numbers))
        number = self.numbers[order[position]]
        described, rng = self.described[number], np.random.default_rng([self.seed, 1, index])
        image = open_image(self.file(number))
        size = described["width"], described["height"]
        require_size(image, *size)
        if number not in self._shown:  # outlines become masks once, not for each crop
            self._shown[number] = Things(self.things, number, self.rejects).shown(size, self.min_area)
        shown = self._shown[number]
        name = f"{shown.id}/{self.seed}.{index}"
        if self.augment:
            image, shown = _crop(image.convert("RGB"), shown, name, self.min_side, rng)
        turns = training_turns(shown, self.statistics, self.questions, per_kind=self.per_kind, seed=self.seed)
        if not turns:
            raise Unusable("nothing is clear enough to ask about")
        return sample_of(name, image, grounded(turns))


def _crop(
    image: PIL.Image.Image, shown: Shown, name: str, min_side: float, rng: np.random.Generator
) -> tuple[PIL.Image.Image, Shown]:
    """A random box of the photograph's own shape, mirrored half of the time, and what is left in it."""
    share, mirrored = rng.uniform(min_side, 1), rng.random() < 0.5
    width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
    left, top = (int(rng.integers(whole - kept + 1)) for whole, kept in ((image.width, width), (image.height, height)))
    box = left, top, left + width, top + height

    def kept(masks: Mapping[str, Sequence[MaskRLE]]) -> dict[str, list[MaskRLE]]:
        cut = {
            name: [decode_mask(mask)[box[1] : box[3], box[0] : box[2]] for mask in each] for name, each in masks.items()
        }
        left = {name: [pixels for pixels in each if pixels.any()] for name, each in cut.items()}
        return {
            name: [encode_mask(pixels[:, ::-1] if mirrored else pixels) for pixels in each]
            for name, each in left.items()
            if each
        }

    image = image.crop(box)
    if mirrored:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image, Shown(
        name, shown.candidates, kept(shown.instances), kept(shown.crowds), shown.unclear, shown.min_area
    )
