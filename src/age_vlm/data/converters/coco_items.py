"""Evaluation images with questions, from annotations in COCO's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..instance_questions import evaluation_questions
from ..questions import EvaluationItem, KindStatistics
from ..rejects import Rejects, Unusable, reported
from .coco_instances import Choice, Things, check_numbers, survey
from .images import ImageFolder, open_image, require_size
from .records import read_coco
from .refcoco import image_names


def coco_statistics(instances: str | Path, *, split: str | None = None, held_out: float = 0.2) -> KindStatistics[str]:
    """How often categories are annotated, alone and together: what POPE chooses absent objects by.

    Args:
        instances: `instances_train2017.json`.
        split: where it is given, whichever it is, only training images count; else all images of the file.
        held_out: see `coco`.
    """
    return survey(instances, "instances").statistics(Choice(split, held_out))


def coco_items(
    images: str | Path,
    instances: str | Path,
    *,
    statistics: KindStatistics[str] | None = None,
    split: str | None = None,
    held_out: float = 0.2,
    min_area: float = 0.005,
    per_mode: int = 3,
    seed: int = 0,
    allow_outside: bool = False,
    shard: tuple[int, int] = (0, 1),
    rejects: Rejects | None = None,
) -> list[EvaluationItem]:
    """Evaluation images with their questions, see `evaluation_questions` in `age_vlm.data.instance_questions`.

    The images are in memory, about 1 MB each: take a `shard` of many.

    Args:
        images, instances: as for `coco`.
        statistics: of the images that were trained on, from `coco_statistics`. With a split they are, unless told, those
            of the training images of `instances`; without either there are no POPE questions.
        split, held_out: the images, as for `coco`: those of `test` are in no other split.
        min_area: as for `coco`.
        per_mode: at most so many questions with yes, and so many with no, for an image and mode.
        seed: of the choice of POPE questions.
        part: every `shard[1]`-th image, from number `shard[0]` on.
        rejects: counts what could not be used; without it a warning says so.

    Raises:
        UserError: an argument that is not as described.
    """
    check_numbers(per_mode=per_mode, min_area=min_area, seed=seed)
    choice, folder = Choice(split, held_out), ImageFolder(images, "images", allow_outside)
    with reported(rejects, "coco_items") as rejects:
        seen = survey(instances, "instances")
        if statistics is None and split is not None:
            statistics = seen.statistics(choice)
        listed = dict(seen.images.items())
        chosen = list(choice.of(listed, shard, folder, rejects))
        things = read_coco(instances, "instances", rejects, set(chosen))

        def item(number: str, described: dict[str, Any]) -> EvaluationItem:
            image = open_image(folder.find(image_names(described["file_name"])))
            size = described["width"], described["height"]
            require_size(image, *size)
            shown = Things(things, number, rejects).shown(size, min_area)
            questions = evaluation_questions(shown, statistics, per_mode=per_mode, seed=seed)
            if not questions:
                raise Unusable("nothing is clear enough to ask about")
            return EvaluationItem(shown.id, image, questions)

        made = (rejects.attempt(number, item, number, listed[number]) for number in chosen)
        return [each for each in made if each is not None]
