"""Saving a checkpoint whole: weights, configuration, processor, chat template, code and model card, or nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError


def save_checkpoint(model, processor, folder: str | Path, card: str | None = None) -> Path:
    """Writes everything beside `folder` first and moves it into place last: a failure leaves what was there before.

    Raises:
        ValueError: one sentence, where the disk is full or may not be written to.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = None
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        if card is not None:
            (unfinished / "README.md").write_text(card, "utf-8")
        unfinished.chmod(0o755)
        _swap(unfinished, folder)
    except (OSError, SafetensorError) as error:
        kept = "; the checkpoint that was there is unchanged" if folder.exists() else ""
        raise ValueError(f"checkpoint: '{folder}' could not be written: {error}{kept}.") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old / "checkpoint")
    try:
        new.rename(folder)
    except OSError:
        (old / "checkpoint").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
