"""What a recipe's `data` section of the kind `coco` means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..data.coco_crops import CocoCrops
from ..data.converters.coco_instances import stored_image
from ..data.converters.coco_items import coco_items
from ..data.held_out import HeldOutImages, warn_of_held_out
from ..data.instance_questions import ASKED
from ..data.questions import EvaluationItem
from ..errors import UserError
from .recipe import DataRecipe


def coco_splits(
    recipe: DataRecipe, seed: int, evaluation: bool, held_out: HeldOutImages
) -> tuple[CocoCrops, list[EvaluationItem], list[EvaluationItem], HeldOutImages]:
    """Training crops, validation and test images with questions, and the images behind the last two.

    Raises:
        UserError: one sentence, for files that are not as they should be.
    """
    files = {"images": recipe.images, "instances": recipe.instances, "allow_outside": recipe.allow_outside}
    train = CocoCrops(
        **files,
        held_out=recipe.held_out,
        length=recipe.train,
        seed=seed,
        questions=recipe.texts or ASKED,
        min_side=recipe.min_side,
    )
    train.rejects.warn("coco")
    own = HeldOutImages()
    kept = [
        number for number in train.numbers if not held_out.hold([stored_image(train.described[number], train.folder)])
    ]
    if not kept:
        raise UserError(f"mix: all photographs of '{recipe.images}' are held out by `data`, expected one to train on.")
    train.numbers, dropped = kept, len(train.numbers) - len(kept)
    warn_of_held_out(dropped, recipe.images)
    items: dict[str, list[EvaluationItem]] = {"validation": [], "test": []}
    if evaluation:
        for split, number in (("validation", recipe.validation), ("test", recipe.test)):
            made = coco_items(**files, split=split, held_out=recipe.held_out, seed=recipe.test_seed)
            items[split] = list(_asked(made[:number], recipe.texts or ASKED))
            numbers = (item.image_id.removeprefix("coco/") for item in made)
            own.add(stored_image(train.described[number], train.folder) for number in numbers)
    return train, items["validation"], items["test"], own


_KINDS = {"presence": "existence", "count": "count", "where": "where"}


def _asked(items: Iterable[EvaluationItem], texts: Iterable[str]) -> Iterable[EvaluationItem]:
    """Of presence the questions of POPE's modes: those about every category are many, and say little more."""
    kinds = {_KINDS[text] for text in texts}
    for item in items:
        questions = tuple(q for q in item.questions if q.kind in kinds and (q.kind != "existence" or q.mode))
        if questions:
            yield dataclasses.replace(item, questions=questions)
