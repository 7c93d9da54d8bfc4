"""Puts the code that a checkpoint needs beside its weights, flat, as `trust_remote_code=True` expects it.

The three folders of checkpoint code import one another as `..configuration.x`; in a Hub repository all files are
siblings, so those imports become `.x`. A checkpoint's own copy is flat already and is copied as it is: saving again
where age-vlm is not installed loses nothing.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


AUTO_MAP = {
    "AutoConfig": "configuration_agevlm.AgeVlmConfig",
    "AutoModel": "modeling_agevlm.AgeVlmModel",
    "AutoModelForImageTextToText": "modeling_agevlm.AgeVlmForConditionalGeneration",
    "AutoProcessor": "processing_agevlm.AgeVlmProcessor",
}

_FOLDERS = ("configuration", "modeling_agevlm", "processing")
_PARENT_IMPORT = re.compile(rf"^(\s*)from \.\.(?:{'|'.join(_FOLDERS)})\.(\w+) import", flags=re.MULTILINE)


def checkpoint_code() -> dict[str, str]:
    """File name -> source text of every checkpoint-code file, with flat imports."""
    here = Path(__file__).parent
    files = here.glob("*_agevlm.py")
    if __package__ and __package__.endswith(".configuration"):
        # Where the three folders lie is known to the import system alone: editable installs map them.
        from importlib import import_module

        package = __package__.rsplit(".", 1)[0]
        folders = [Path(import_module(f"{package}.{folder}").__file__).parent for folder in _FOLDERS]
        files = [file for folder in folders for file in folder.glob("*_agevlm.py")]
    return {file.name: _PARENT_IMPORT.sub(r"\1from .\2 import", file.read_text("utf-8")) for file in files}


def write_checkpoint_code(directory: str | os.PathLike) -> None:
    """Writes the checkpoint code into `directory`; each file appears whole or not at all."""
    for name, source in checkpoint_code().items():
        target = Path(directory) / name
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(source, "utf-8")
        os.replace(temporary, target)


def save_with_code(
    saved_object, save: Callable, save_directory: str | os.PathLike, push_to_hub: bool, **kwargs: Any
) -> Any:
    """`save`, the `save_pretrained` of transformers, with the checkpoint code beside what it writes.

    Args:
        push_to_hub: also upload all of it; `kwargs` are those of `saved_object.push_to_hub` then.
    """
    saved = save(os.fspath(save_directory), **({} if push_to_hub else kwargs))
    write_checkpoint_code(save_directory)
    if push_to_hub:
        # Not by `save`: it uploads what transformers wrote, and that alone.
        saved_object.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
    return saved
