"""Saving and loading a checkpoint whole: weights, configuration, processor, chat template, code and model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import find_adapter_config_file, has_file

from .configuration import AgeVlmConfig
from .configuration.configuration_agevlm import unknown_option
from .errors import UserError
from .model_card import THIS_REPOSITORY, parts_card
from .modeling_agevlm import AgeVlmForConditionalGeneration
from .processing import AgeVlmProcessor


def save_checkpoint(model, processor, folder: str | Path, card: str | None = None) -> Path:
    """Writes everything beside `folder` first and moves it into place last: a failure leaves what was there before.

    Raises:
        UserError: one sentence, where the disk is full or may not be written to.
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
        for file in unfinished.iterdir():  # safetensors 0.8 writes weights for their owner alone
            file.chmod(0o644)
        _swap(unfinished, folder)
    except (OSError, SafetensorError) as error:
        kept = "; the checkpoint that was there is unchanged" if folder.exists() else ""
        raise UserError(f"checkpoint: '{folder}' could not be written: {error}{kept}.") from error
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


def push_checkpoint(
    model,
    processor,
    repository: str,
    card: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload checkpoint",
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Uploads what `save_checkpoint` writes in one commit: nobody can download half of a checkpoint.

    Args:
        repository: Hub id, made if it is not there.
        card: Markdown in which `THIS/REPOSITORY` stands for `repository`; that of `model_card.parts_card` when left out.
        private: whether a new repository is.
        revision: branch, made if it is not there.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    card = (card or parts_card(model)).replace(THIS_REPOSITORY, repository)
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(save_checkpoint(model, processor, Path(folder) / "checkpoint", card).iterdir())
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
        # What was one file may now be shards, and transformers would read the file that is left of last time.
        stale = set(api.list_repo_files(repository, revision=revision)) - {file.name for file in files}
        operations += [CommitOperationDelete(name) for name in sorted(stale) if fnmatch(name, "*.safetensors*")]
        return api.create_commit(
            repository, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )


def load_checkpoint(
    name: str | Path, argument: str = "model", **config
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Model and processor from a folder or a Hub id. Of an adapter (LoRA, DoRA): its base model with the adapter merged in.

    Args:
        argument: what the error calls it.
        config: fields of `AgeVlmConfig` to change.

    Raises:
        UserError: one sentence, where there is none, or something else than an AGE-VLM.
    """
    if unknown := unknown_option(config):
        raise UserError(unknown)
    try:
        adapter = find_adapter_config_file(name)
        if adapter is not None and not (Path(name) / "config.json").is_file():
            return _load_adapter(name, json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"], config)
        # Looked at first: transformers would load any other model's file too, with random weights for what is missing.
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != AgeVlmConfig.model_type:
            raise UserError(f"it holds a model of type '{kind}'")
        model, report = AgeVlmForConditionalGeneration.from_pretrained(
            name, ignore_mismatched_sizes=True, output_loading_info=True, **config
        )
        check_weights(report)
        return model, AgeVlmProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"{argument}: '{name}' could not be loaded as an AGE-VLM: {reason}.") from error


def check_weights(report: dict) -> None:
    """Raises UserError, without the name of the checkpoint, where weights are missing or of another shape."""
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"it lacks {len(missing)} weights, first '{missing[0]}'")
    if mismatched := sorted(report["mismatched_keys"]):
        name, saved, expected = mismatched[0]
        raise UserError(f"its '{name}' has shape {tuple(saved)}, expected {tuple(expected)}")


def _load_adapter(name: str | Path, base: str, config: dict) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    from peft import PeftModel

    model, processor = load_checkpoint(base, "its base model", **config)
    if has_file(name, "tokenizer_config.json"):
        # An adapter may have learned new words.
        processor = AgeVlmProcessor.from_pretrained(name)
        if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(processor.tokenizer))
    return PeftModel.from_pretrained(model, str(name)).merge_and_unload(), processor
