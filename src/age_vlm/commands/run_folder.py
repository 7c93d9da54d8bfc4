"""The folder of a run: which recipe it belongs to, what may be replaced or resumed, what a failed run restores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from ..atomic_files import beside, unfinished
from ..errors import UserError, check_new_folder, reading, writing
from ..training.loss_watch import BAD_BATCHES
from .environment import environment
from .recipe import WATCH_KEYS, Recipe
from .recipe_file import build
from .run_files import foreign_files, is_begun_only, last_checkpoint, remove_run


@contextmanager
def run_folder(folder: str | Path, overwrite: bool, resume: bool = False) -> Iterator[Path]:
    """The folder of a run, as a context. An earlier run in it is deleted only when this one is complete. If this one
    fails, the earlier run is restored, and gets the ids of the samples on which this one failed, if any. A failed run
    that replaced no other stays if it can be resumed, or has such ids.

    Raises:
        UserError: as `check_run_folder`.
    """
    folder = Path(folder)
    check_run_folder(folder, overwrite, resume)
    begun = (folder / "recipe.yaml").is_file()
    earlier = None
    with writing("run folder", folder):
        if begun and not resume:
            earlier = beside(folder, _EARLIER)
            folder.rename(earlier)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        if earlier is not None:
            if (folder / BAD_BATCHES).exists():  # the error has sent its reader there
                (folder / BAD_BATCHES).replace(earlier / BAD_BATCHES)
            remove_run(folder)
            if folder.exists():  # its user has put something there
                shutil.copytree(earlier, folder, dirs_exist_ok=True, copy_function=shutil.move)
                shutil.rmtree(earlier)
            else:
                earlier.rename(folder)
        elif not (
            (begun and resume)
            or (folder / "metrics.json").exists()
            or not (folder / "recipe.yaml").is_file()
            or last_checkpoint(folder)
            or (folder / BAD_BATCHES).exists()
        ):
            # Nothing has come of it yet: the next try need not ask to overwrite it.
            remove_run(folder)
        raise
    # Also those that a run which was killed would have replaced.
    for replaced in unfinished(folder.parent, [folder.name], _EARLIER):
        remove_run(replaced)


_EARLIER = "earlier."


def check_run_folder(folder: str | Path, overwrite: bool, resume: bool = False) -> None:
    """Raises UserError if the folder exists and neither `overwrite` nor `resume` is on, or if it is not one of ours, or if
    something else in it would be lost, or if it cannot be written."""
    folder = Path(folder)
    with reading("run folder", folder):
        new = not folder.exists() or is_begun_only(folder)
    if new:
        check_new_folder("run folder", folder)
        return
    ours = (folder / "recipe.yaml").is_file()
    if resume:
        if not ours:
            raise UserError(f"run folder: '{folder}' holds no run, expected one to resume, or a new folder.")
        return
    if not overwrite:
        other = "" if not ours or is_complete(folder) else ", --resume to continue it"
        raise UserError(f"run folder: '{folder}' exists, expected a new one (or --overwrite to replace it{other}).")
    if not ours:
        raise UserError(f"run folder: '{folder}' holds no earlier run, and is not replaced even with --overwrite.")
    if others := foreign_files(folder):
        raise UserError(
            f"run folder: '{folder}' also holds '{others[0].relative_to(folder)}', which is no part of a run, and is not "
            "replaced even with --overwrite: move that away, or name another folder."
        )


def is_complete(folder: Path) -> bool:
    """Whether the run in the folder has come to its end: the report is what is written last."""
    return (folder / "report.html").is_file()


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises UserError, one sentence with the first difference, if the run in the folder is of another recipe; what to do
    about a step that goes wrong, and who gets the log, may differ."""
    try:
        with reading("run folder", folder / "recipe.yaml"):
            begun = yaml.safe_load((folder / "recipe.yaml").read_bytes())
        # Of an earlier version, it lacks the keys that are new since.
        with suppress(UserError):
            begun = yaml.safe_load(build(Recipe, begun).to_yaml())
    except yaml.YAMLError:
        begun = None
    here, kept = yaml.safe_load(recipe.to_yaml()), (*WATCH_KEYS, "report_to")
    for each in (begun, here):
        if isinstance(each, dict) and isinstance(each.get("training"), dict):
            each["training"] = {key: value for key, value in each["training"].items() if key not in kept}
    difference = _difference(begun, here)
    if difference is not None:
        raise UserError(
            f"run folder: '{folder}' belongs to a different recipe ({difference}); use that recipe or a new folder."
        )


def check_same_processes(folder: Path) -> None:
    """Raises UserError, one sentence, if the run in the folder has checkpoints of another number of processes, or of another
    way to share the work: their steps are of other samples, or their files of another form."""
    try:
        begun = json.loads((folder / "environment.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return
    there, here = (
        (values.get("processes", 1), values.get("engine", "no launcher")) for values in (begun, environment())
    )
    if there != here and last_checkpoint(folder):
        raise UserError(
            f"run folder: '{folder}' was begun by {there[0]} process{'es' * (there[0] > 1)} ({there[1]}), expected the same "
            f"to resume it, got {here[0]} ({here[1]})."
        )


def _difference(there: Any, here: Any, where: str = "") -> str | None:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*here, *there])
        found = (
            _difference(there.get(key, "nothing"), here.get(key, "nothing"), f"{where}.{key}" if where else str(key))
            for key in keys
        )
        return next(filter(None, found), None)
    return None if there == here else f"{where or 'recipe'}: {there} there, {here} here"
