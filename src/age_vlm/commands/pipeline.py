"""A folder of recipes, one stage of training each: run in the order of their names, each from the checkpoint before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError, one_of, reading
from .recipe import PREVIOUS, Recipe
from .recipe_file import load_recipe


def load_stages(folder: str | Path, overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """Name of the stage -> its recipe, for every YAML file of the folder in the order of the names.

    Args:
        overrides: `section.key=value` for all of them, `NAME:section.key=value` for one.

    Raises:
        UserError: one sentence that names the file, for no recipes, one that does not load, an override for a stage that
            is not there, or a first stage that wants to start from the one before.
    """
    folder = Path(folder)
    with reading("recipes", folder):
        if not folder.is_dir():
            raise UserError(f"recipes: '{folder}' is not a folder, expected one with a YAML file for each stage.")
        files = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    if not files:
        raise UserError(f"recipes: '{folder}' has no YAML files, expected one for each stage.")
    own: dict[str, list[str]] = {path.stem: [] for path in files}
    if len(own) < len(files):
        raise UserError(f"recipes: '{folder}' has two files of one name, expected names that differ.")
    for override in overrides:
        name, colon, _ = override.partition("=")[0].partition(":")
        if colon and name not in own:
            raise UserError(f"override: '{override}' is for '{name}', expected {one_of(name, own)}.")
        for stage in [name] if colon else own:
            own[stage].append(override.partition(":")[2] if colon else override)
    stages = {}
    for path in files:
        try:
            stages[path.stem] = load_recipe(path, own[path.stem])
        except UserError as error:
            raise UserError(f"{path.name}: {error}") from None
    first = next(iter(stages))
    if stages[first].model.checkpoint == PREVIOUS:
        raise UserError(
            f"{files[0].name}: model.checkpoint: got '{PREVIOUS}', expected something to start from: no recipe is before it."
        )
    return stages


def run_stages(
    stages: dict[str, Recipe],
    output: str | Path,
    *,
    on_stage: Callable[[str, str], None] = lambda name, state: None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Runs each stage in a folder of its own, or goes on where an earlier call stopped.

    Args:
        stages: as `load_stages` gives them.
        on_stage: is told the name of each stage and what becomes of it: `complete already`, `resumed` or `started`.

    Returns:
        Stage -> metrics of its model on the test split of its data.

    Raises:
        UserError: one sentence, before anything runs for a stage whose recipe is not the one it was begun with, one that
            was made from another run of the stage before it, or data that is not there.
    """
    from ..training.distributed import from_main
    from .run_folder import is_complete
    from .train import run_recipe

    output = Path(output)
    from_main(_check, stages, output)
    metrics, previous = {}, None
    for name, recipe in stages.items():
        folder = output / name
        begun = (folder / "recipe.yaml").is_file()
        on_stage(name, "complete already" if is_complete(folder) else "resumed" if begun else "started")
        metrics[name] = run_recipe(recipe, folder, resume=True, previous=previous, progress=progress)["model"]
        previous = folder / "checkpoint"
    return metrics


def _check(stages: dict[str, Recipe], output: Path) -> None:
    from .run_folder import check_run_folder, check_same_recipe, is_complete
    from .sources import check_paths

    unfinished = None
    for name, recipe in stages.items():
        folder = output / name
        try:
            check_paths(recipe)
            check_run_folder(folder, overwrite=False, resume=True)
            begun = (folder / "recipe.yaml").is_file()
            if begun:
                check_same_recipe(folder, recipe)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if begun and unfinished is not None and recipe.model.checkpoint == PREVIOUS:
            raise UserError(
                f"{name}: '{folder}' was not made from '{unfinished}', which is not complete, expected none: remove it, or name "
                "another folder."
            )
        unfinished = None if is_complete(folder) else folder
