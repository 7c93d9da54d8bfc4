"""Saving and loading a checkpoint whole: weights, configuration, processor, chat template, code and model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import find_adapter_config_file, has_file

from .atomic_files import beside, unfinished, with_plain_modes
from .cards import THIS_REPOSITORY, components_card, is_local, keep_licenses
from .configuration import AgeVlmConfig
from .configuration.configuration_agevlm import unknown_option
from .errors import UserError
from .modeling_agevlm import AgeVlmForConditionalGeneration
from .processing import AgeVlmProcessor


# What transformers and PEFT write for a model and its processor, and what comes with it.
_OWN = re.compile(
    r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|\w+_agevlm\.py|README\.md|chat_template\.jinja"
    r"|additional_chat_templates|tokenizer\.(json|model)|vocab\.json|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|((adapter|generation|processor|preprocessor|video_preprocessor|tokenizer)_)?config\.json"
)


def save_checkpoint(model, processor, folder: str | Path, card: str | None = None, *, parts: str = "all") -> Path:
    """Writes everything beside `folder` first and moves it into place last: a failure leaves what was there before.

    Files in `folder` that are no part of a checkpoint stay. No path of this machine is written, but for that of an
    adapter's base model, which is relative to the adapter.

    Args:
        parts: `"new"` leaves out the pretrained components that training did not change, see
            `AgeVlmForConditionalGeneration.save_pretrained`.

    Raises:
        UserError: one sentence, where the disk is full or may not be written to.
    """
    folder = Path(folder)
    new = beside(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        keep_licenses(model.config)
        model.save_pretrained(new, **({} if parts == "all" else {"parts": parts}))
        processor.save_pretrained(new)
        if (new / "adapter_config.json").is_file():
            _name_base(new, folder)
        if card is not None:
            (new / "README.md").write_text(card, "utf-8")
        with_plain_modes(new)
        _swap(new, folder)
    except (OSError, SafetensorError) as error:
        kept = "; the checkpoint that was there is unchanged" if folder.is_dir() else ""
        raise UserError(f"checkpoint: '{folder}' could not be written: {error}{kept}.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def save_adapter(model, folder: str | Path) -> Path:
    """Writes the adapter of a `PeftModel` without its processor, see `save_checkpoint`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, save_embedding_layers=False)
    _name_base(folder, folder)
    return with_plain_modes(folder)


def _name_base(written: Path, folder: Path | None) -> None:
    """Names the local base model of the adapter in `written` by its path from `folder`, where the adapter will lie; or not
    at all, where there is no such folder or the path would begin at the root of this machine."""
    settings = json.loads((written / "adapter_config.json").read_text("utf-8"))
    base = settings["base_model_name_or_path"]
    if not base or not is_local(base):
        return
    if folder is None:
        settings["base_model_name_or_path"] = None
    else:
        ends = os.path.realpath(base), os.path.realpath(folder)
        apart = os.path.commonpath(ends) == Path(ends[0]).anchor
        settings["base_model_name_or_path"] = None if apart else os.path.relpath(*ends)
    (written / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), "utf-8")
    card = written / "README.md"
    if card.is_file():  # PEFT's own
        card.write_text("".join(line for line in card.open(encoding="utf-8") if base not in line), "utf-8")


def is_checkpoint_file(name: str) -> bool:
    """Whether that is the name of a file, or folder, which `save_checkpoint` writes; others are not ours to remove."""
    return _OWN.fullmatch(name) is not None


def recover_checkpoint(folder: Path) -> None:
    """Clears away what a process that was killed in `save_checkpoint` has left beside `folder`, which is there again."""
    for old in unfinished(folder.parent, [folder.name], "old."):
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    for new in unfinished(folder.parent, [folder.name]):
        shutil.rmtree(new)


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    for path in folder.iterdir():
        if not is_checkpoint_file(path.name) and not (new / path.name).exists():
            _link(path, new / path.name)
    shutil.copymode(folder, new)
    old = beside(folder, "old.")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _link(path: str | Path, other: str | Path) -> None:
    """The same file or folder under another name, too: it is at no time in one place only that may be removed."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.copytree(path, other, symlinks=True, copy_function=_link)
        return
    try:
        os.link(path, other, follow_symlinks=False)
    except OSError:  # not every disk has links
        shutil.copy2(path, other, follow_symlinks=False)


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
        card: Markdown in which `THIS/REPOSITORY` stands for `repository`; that of `model_card.components_card` when left out.
        private: whether a new repository is.
        revision: branch, made if it is not there.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    card = (card or components_card(model)).replace(THIS_REPOSITORY, repository)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_checkpoint(model, processor, Path(folder) / "checkpoint", card)
        if (saved / "adapter_config.json").is_file():
            _name_base(saved, None)
        files = sorted(saved.iterdir())
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
        # What was one file may now be shards, and transformers would read the file that is left of last time.
        stale = set(api.list_repo_files(repository, revision=revision)) - {file.name for file in files}
        operations += [CommitOperationDelete(name) for name in sorted(stale) if fnmatch(name, "*.safetensors*")]
        return api.create_commit(
            repository, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )


def load_checkpoint(
    name: str | Path, argument: str = "model", parts: Mapping[str, str | Path] | None = None, **config
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Model and processor from a folder or a Hub id. Of an adapter (LoRA, DoRA): its base model with the adapter merged in.

    Args:
        argument: what the error calls it.
        parts: folders or Hub ids of the pretrained components that the checkpoint leaves out, `text` and `vision`.
        config: fields of `AgeVlmConfig` to change.

    Raises:
        UserError: one sentence, where there is none, or something else than an AGE-VLM.
    """
    if unknown := unknown_option(config):
        raise UserError(unknown)
    try:
        adapter = find_adapter_config_file(name)
        if adapter is not None and not (Path(name) / "config.json").is_file():
            base = json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
            if not base:
                raise UserError("it is an adapter that does not name its base model")
            return _load_adapter(name, base, parts, config)
        # Looked at first: transformers would load any other model's file too, with random weights for what is missing.
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != AgeVlmConfig.model_type:
            raise UserError(f"it holds a model of type '{kind}'")
        model, report = AgeVlmForConditionalGeneration.from_pretrained(
            name, ignore_mismatched_sizes=True, output_loading_info=True, parts=parts, **config
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


def _load_adapter(
    name: str | Path, base: str, parts: Mapping[str, str | Path] | None, config: dict
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    from peft import PeftModel

    near = Path(name) / base
    model, processor = load_checkpoint(near if near.is_dir() else base, "its base model", parts, **config)
    if has_file(name, "tokenizer_config.json"):
        # An adapter may have learned new words.
        processor = AgeVlmProcessor.from_pretrained(name)
        if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(processor.tokenizer))
    return PeftModel.from_pretrained(model, str(name)).merge_and_unload(), processor
