"""Saving and loading a checkpoint whole: weights, configuration, processor, chat template, code and model card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig

from .configuration import AgeVlmConfig
from .configuration.configuration_agevlm import unknown_option
from .modeling_agevlm import AgeVlmForConditionalGeneration
from .processing import AgeVlmProcessor


def save_checkpoint(model, processor, folder: str | Path, card: str | None = None) -> Path:
    """Writes everything beside `folder` first and moves it into place last: a failure leaves what was there before.

    Raises:
        ValueError: one sentence, where the disk is full or may not be written to.
    """
    folder = Path(folder)
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
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
    except BaseException:
        (old / "checkpoint").rename(folder)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    name: str | Path, argument: str = "model", **config
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Model and processor from a folder or a Hub id.

    Args:
        argument: what the error calls it.
        config: fields of `AgeVlmConfig` to change.

    Raises:
        ValueError: one sentence, where there is none, or something else than an AGE-VLM.
    """
    if unknown := unknown_option(config):
        raise ValueError(unknown)
    try:
        # Looked at first: transformers would load any other model's file too, with random weights for what is missing.
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != AgeVlmConfig.model_type:
            raise ValueError(f"it holds a model of type '{kind}'")
        return AgeVlmForConditionalGeneration.from_pretrained(name, **config), AgeVlmProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"{argument}: '{name}' could not be loaded as an AGE-VLM: {reason}.") from error
