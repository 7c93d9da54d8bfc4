"""Data sets by a name: what the command line and recipes call one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .file_state import files_state


if TYPE_CHECKING:
    import datasets


def load_stored(name: str, split: str = "train", argument: str = "data") -> datasets.Dataset:
    """A data set from a folder of `save_to_disk`, another folder that `datasets` can load, or the Hub.

    Args:
        argument: what the name came as, for the error.

    Raises:
        UserError: one sentence, where there is none, or not that split.
    """
    import datasets

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            # `datasets` takes a file for unchanged as long as its time is.
            cache = (
                Path(datasets.config.HF_DATASETS_CACHE, f"folder-{files_state([name])}") if folder.exists() else None
            )
            data = datasets.load_dataset(name, split=split, cache_dir=None if cache is None else str(cache))
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        kind = "folder" if folder.exists() else "Hub id, and no folder here"
        raise UserError(f"{argument}: '{name}' (a {kind}) cannot be loaded as a data set: {reason}.") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"split: got '{split}', expected one that '{name}' has: {', '.join(data)}.")
        data = data[split]
    return data
