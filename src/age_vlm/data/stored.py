"""Data sets by a name: what the command line and recipes call one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, one_of
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
            raise UserError(f"split: got '{split}', expected {one_of(split, data)}.")
        data = data[split]
    return data


def image_outside(samples: datasets.Dataset, name: str) -> str | None:
    """The first image that is stored as a path or URL which leads out of the folder that the data set was loaded from.

    Images of a data set on the Hub may lie where its files are kept on this machine.
    """
    import datasets
    import pyarrow.compute as pc
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [name] if Path(name).exists() else [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    inside = [os.path.realpath(folder) for folder in folders]
    for batch in samples.select_columns(["images"]).with_format("arrow").iter(batch_size=1000):
        images = pc.list_flatten(batch["images"])
        for path in pc.struct_field(images.filter(pc.is_null(pc.struct_field(images, "bytes"))), "path").to_pylist():
            if path is None:
                continue
            real = Path(os.path.realpath(path))
            if "://" in path or not any(real.is_relative_to(folder) for folder in inside):
                return path
    return None
