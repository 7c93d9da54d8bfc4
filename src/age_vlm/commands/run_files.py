"""Which files of a run folder are the run's own: no others are ever removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..atomic_files import unfinished
from ..hub import is_checkpoint_file, recover_checkpoint
from ..training.loss_watch import BAD_BATCHES


# In a run folder: the model, images to ask it about, the adapter of parts that were trained by LoRA, TensorBoard's files,
# and resumable checkpoints while it trains.
CHECKPOINT_FOLDER = "checkpoint"
EXAMPLES_FOLDER = "examples"
ADAPTER_FOLDER = "adapter"
TENSORBOARD_FOLDER = "tensorboard"
TRAINER_FOLDER = "trainer"
# Written last into a resumable checkpoint.
WHOLE = "whole"

_FILES = ("recipe.yaml", "environment.json", "log.jsonl", "metrics.json", "report.html", BAD_BATCHES)
_FOLDERS = {
    CHECKPOINT_FOLDER: is_checkpoint_file,
    ADAPTER_FOLDER: is_checkpoint_file,
    EXAMPLES_FOLDER: re.compile(r"\d+\.png").fullmatch,
    # What was logged, and the settings in a folder that is named by the time.
    TENSORBOARD_FOLDER: re.compile(r"events\.out\.tfevents\..+|\d+(\.\d+)?").fullmatch,
    TRAINER_FOLDER: re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+").fullmatch,
}


def foreign_files(folder: Path) -> list[Path]:
    """What lies in a run folder that no run has written."""
    return [path for path, own in _sorted(folder) if not own]


def remove_run(folder: Path) -> None:
    """Removes what a run has written into a folder, and the folder where it is empty then."""
    for path, own in list(_sorted(folder)):
        if own:
            _remove(path)
    for each in (*(folder / name for name in _FOLDERS), folder):
        _remove_if_empty(each)


def remove_resumable(folder: Path, but: Path | None = None) -> None:
    """Removes the resumable checkpoints of a run, all but one, and their folder where it is empty then."""
    trainer = folder / TRAINER_FOLDER
    for path in _of(trainer):
        if path != but and _FOLDERS[TRAINER_FOLDER](path.name):
            _remove(path)
    _remove_if_empty(trainer)


def remove_unfinished(folder: Path) -> None:
    """Clears away what a run that was killed was writing."""
    recover_checkpoint(folder / CHECKPOINT_FOLDER)
    for path in unfinished(folder, _FILES):
        path.unlink()


def is_begun_only(folder: Path) -> bool:
    """Whether a folder holds nothing, or all there may be of a run that was killed at its first file."""
    return folder.is_dir() and set(folder.iterdir()) <= set(unfinished(folder, ["recipe.yaml"]))


def _sorted(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Files and folders of a run folder, and whether each is the run's own."""
    parts = {*unfinished(folder, [*_FILES, CHECKPOINT_FOLDER])}
    if (folder / CHECKPOINT_FOLDER).exists():
        parts |= {*unfinished(folder, [CHECKPOINT_FOLDER], "old.")}
    for path in _of(folder):
        if path.name in _FOLDERS and path.is_dir() and not path.is_symlink():
            yield from ((inner, bool(_FOLDERS[path.name](inner.name))) for inner in _of(path))
        else:
            yield path, path.name in _FILES or path in parts


def _of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a run folder, if there is one."""
    whole = [mark.parent for mark in (folder / TRAINER_FOLDER).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
