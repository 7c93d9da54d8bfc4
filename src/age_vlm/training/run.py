"""One training run, from a recipe to a folder with everything that came of it."""

from __future__ import annotations

import glob
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration import IMAGE_SIZES, preset_config
from ..data.collator import AgeVlmCollator, token_grid_size
from ..data.sources import DataSource
from ..hub import load_checkpoint
from ..modeling_agevlm import AgeVlmForConditionalGeneration
from ..modeling_agevlm.modeling_agevlm import reserved_image_token
from ..processing import AgeVlmProcessor, whole_image_processor
from .parts import part_of
from .recipe import PREVIOUS, ModelRecipe, Recipe, TrainingRecipe
from .trainer import AgeVlmTrainer
from .warm_start import warm_start


if TYPE_CHECKING:
    from peft import PeftModel

# In a run folder: resumable checkpoints while it trains, the adapter of parts that were trained by LoRA.
TRAINER_FOLDER = "trainer"
ADAPTER_FOLDER = "adapter"
# Written last into a resumable checkpoint.
_WHOLE = "whole"


def build_model(
    recipe: ModelRecipe, source: DataSource, previous: Path | None = None
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """The model and processor that a recipe starts from; `previous` is the checkpoint of the recipe before it."""
    if recipe.checkpoint == PREVIOUS and previous is None:
        raise ValueError(
            f"model.checkpoint: got '{PREVIOUS}', expected a folder or Hub id: only `age-vlm pipeline` knows the recipe before."
        )
    if recipe.checkpoint is not None:
        checkpoint = previous if recipe.checkpoint == PREVIOUS else recipe.checkpoint
        model, processor = load_checkpoint(checkpoint, "model.checkpoint", **recipe.config)
    elif recipe.text is not None:
        dtype = recipe.dtype and getattr(torch, recipe.dtype)
        model = AgeVlmForConditionalGeneration.from_backbones(recipe.text, recipe.vision, dtype=dtype, **recipe.config)
        processor = AgeVlmProcessor.from_backbones(recipe.text, recipe.vision, image_size=recipe.image_size)
    else:
        model, processor = _model_from_preset(recipe, source)
    model.set_attn_implementation({"text_config": recipe.attention})
    return model, processor


def _model_from_preset(
    recipe: ModelRecipe, source: DataSource
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    if "image_token_id" in recipe.config:
        raise ValueError("model.config.image_token_id: got one, expected none: the tokenizer is made with the model.")
    tokenizer = source.tokenizer
    image_token, image_token_id = reserved_image_token(tokenizer)
    config = preset_config(recipe.preset, image_token_id=image_token_id, **recipe.config)
    text = config.text_config
    text.vocab_size = len(tokenizer)
    text.bos_token_id, text.eos_token_id, text.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    size = recipe.image_size or IMAGE_SIZES[recipe.preset]
    processor = AgeVlmProcessor(whole_image_processor(size), tokenizer, image_token=image_token)
    return AgeVlmForConditionalGeneration(config), processor


def set_trainable(model: AgeVlmForConditionalGeneration, recipe: TrainingRecipe) -> PeftModel | None:
    """Freezes what the recipe does not train, and puts adapters into what it trains by LoRA.

    Returns:
        The model as PEFT wraps it, where there are adapters, to save and merge them. They are in `model` itself, too: it is
        what is trained and stored on the way, since an adapter's own file lacks the parts that are trained in full.
    """
    adapted = None
    targets = [part for part, mode in recipe.modes.items() if mode == "lora"]
    if targets:
        from peft import get_peft_model

        from .lora import lora_config

        lora = recipe.lora
        config = lora_config(
            targets[0] if len(targets) == 1 else "both",
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            use_dora=lora.dora,
            gates="cross_attention" in targets,
        )
        adapted = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        mode = recipe.modes[part_of(name)]
        if mode != "lora":
            parameter.requires_grad_(mode == "full")
    return adapted


def training_arguments(recipe: TrainingRecipe, seed: int, folder: str | Path, progress: bool) -> TrainingArguments:
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointing = checkpointing if recipe.gradient_checkpointing else {}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        warmup_steps=max(1, round(recipe.warmup * recipe.steps)),
        lr_scheduler_type=recipe.schedule,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=recipe.log_every,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or recipe.steps,
        # The newer of the two may be unfinished.
        save_total_limit=2,
        **checkpointing,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        seed=seed,
        disable_tqdm=not progress,
    )


class CurveCallback(TrainerCallback, ExportableState):
    """Measures the model every so many steps, and at the end, and keeps the figures, also in resumable checkpoints."""

    def __init__(self, measure: Callable[[PreTrainedModel], dict[str, float]], every: int):
        self.measure, self.every = measure, every
        self.points: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"points": self.points}}

    def on_train_begin(self, args, state, control, **kwargs):
        # Not restored by the trainer, which would make a new callback, and from what JSON can hold.
        stored = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.points = list(stored["attributes"]["points"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.points.append({"step": state.global_step, **self.measure(model)})


class ResumableCallback(TrainerCallback):
    """Marks the checkpoints that are whole, and sees to it that a resumed run logs what one in one piece would have."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            # From here a trainer would go one step too far; what comes next is the model's own checkpoint.
            control.should_save = False
        control.should_log = control.should_log or control.should_save
        return control

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _WHOLE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a run folder, if there is one."""
    whole = [mark.parent for mark in (folder / TRAINER_FOLDER).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def environment() -> dict[str, str | int]:
    """What a figure depends on besides the code: versions, processor, threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def run_folder(folder: str | Path, overwrite: bool, resume: bool = False) -> Iterator[Path]:
    """The folder of a run, as a context. An earlier run in it is gone only once this one is complete: where this one
    fails, the earlier one is put back as it was. One that fails and could be resumed stays, if it replaces no other.

    Raises:
        ValueError: as `check_run_folder`.
    """
    folder = Path(folder)
    check_run_folder(folder, overwrite, resume)
    begun = (folder / "recipe.yaml").is_file()
    earlier = None
    if begun and not resume:
        earlier = Path(tempfile.mkdtemp(prefix=_earlier(folder), dir=folder.parent)) / folder.name
        folder.rename(earlier)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException:
        if earlier is not None:
            shutil.rmtree(folder, ignore_errors=True)
            earlier.rename(folder)
            earlier.parent.rmdir()
        elif not (
            (begun and resume)
            or (folder / "metrics.json").exists()
            or not (folder / "recipe.yaml").is_file()
            or last_checkpoint(folder)
        ):
            # Nothing has come of it yet: the next try need not ask to overwrite it.
            shutil.rmtree(folder, ignore_errors=True)
        raise
    # Also those that a run which was killed would have replaced.
    for replaced in folder.parent.glob(f"{glob.escape(_earlier(folder))}*"):
        shutil.rmtree(replaced)


def _earlier(folder: Path) -> str:
    return f".{folder.name}.earlier-"


def check_run_folder(folder: str | Path, overwrite: bool, resume: bool = False) -> None:
    """Raises ValueError if the folder exists and neither `overwrite` nor `resume` is on, or if it is not one of ours."""
    folder = Path(folder)
    # All there is of a run that was killed at its first file.
    nothing = {"recipe.yaml.tmp"}
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= nothing):
        return
    ours = (folder / "recipe.yaml").is_file()
    if resume:
        if not ours:
            raise ValueError(f"run folder: '{folder}' holds no run, expected one to resume, or a new folder.")
        return
    if not overwrite:
        other = "" if not ours or is_complete(folder) else ", --resume to continue it"
        raise ValueError(f"run folder: '{folder}' exists, expected a new one (or --overwrite to replace it{other}).")
    if not ours:
        raise ValueError(f"run folder: '{folder}' holds no earlier run, and is not replaced even with --overwrite.")


def is_complete(folder: Path) -> bool:
    """Whether the run in the folder has come to its end: the report is what is written last."""
    return (folder / "report.html").is_file()


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises ValueError, one sentence with the first difference, if the run in the folder is of another recipe."""
    try:
        begun = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        begun = None
    difference = _difference(begun, yaml.safe_load(recipe.to_yaml()))
    if difference is not None:
        raise ValueError(
            f"run folder: '{folder}' is of another recipe ({difference}), expected the same one, or a new folder."
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


def warm_vision(
    recipe: Recipe, source: DataSource, vision_tower, image_processor, scratch: str, progress: bool
) -> None:
    """Warms the vision encoder up as the recipe says."""
    if not recipe.warm_start.steps:
        return
    if source.pictures is None:
        raise ValueError(
            f"warm_start.steps: got {recipe.warm_start.steps}, but this data has no single pictures, expected 0."
        )
    pictures, labels = source.pictures
    warm_start(
        vision_tower,
        image_processor,
        pictures,
        labels,
        steps=recipe.warm_start.steps,
        batch_size=recipe.warm_start.batch_size,
        learning_rate=recipe.warm_start.learning_rate,
        seed=recipe.seed,
        folder=scratch,
        progress=progress,
    )


def train(trainer: Trainer, progress: bool, checkpoint: Path | None = None) -> list[dict[str, float]]:
    """Runs a trainer, from a checkpoint of its own where one is given, and returns what it logged."""
    for callback in () if progress else (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer.state.log_history


def fit(
    recipe: Recipe,
    source: DataSource,
    folder: str | Path,
    *,
    measure: Callable[[AgeVlmForConditionalGeneration, AgeVlmProcessor], dict[str, float]] | None = None,
    resume: bool = False,
    previous: Path | None = None,
    progress: bool = True,
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor, list[dict], list[dict]]:
    """Trains as the recipe says. Adapters are stored in the folder and merged into the model.

    Args:
        measure: figures of the model in training, taken every `evaluate_every` steps.
        resume: go on from the last resumable checkpoint in the folder, if there is one.
        previous: checkpoint of the recipe before this one.

    Returns:
        Model, processor, what the trainer logged, what was measured.
    """
    folder = Path(folder)
    set_seed(recipe.seed)
    model, processor = build_model(recipe.model, source, previous)
    text = model.config.text_config
    recipe.alignment.check(len(model.config.cross_attention_layers), text.num_attention_heads)
    curve = CurveCallback(lambda model: measure(model, processor), recipe.training.evaluate_every) if measure else None
    checkpoint, scratch = last_checkpoint(folder) if resume else None, folder / TRAINER_FOLDER
    for left in scratch.iterdir() if scratch.is_dir() else ():
        if left != checkpoint:
            shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        if checkpoint is None:
            warm_vision(recipe, source, model.model.vision_tower, processor.image_processor, str(scratch), progress)
        adapted = set_trainable(model, recipe.training)
        trainer = AgeVlmTrainer(
            model,
            training_arguments(recipe.training, recipe.seed, scratch, progress),
            train_dataset=source.train,
            data_collator=AgeVlmCollator(
                processor,
                token_grid_size(model, processor),
                independent_turns=recipe.training.independent_turns,
                max_length=recipe.training.max_length,
                image_visibility=model.config.image_visibility,
            ),
            callbacks=[*([curve] if curve else []), ResumableCallback()],
            alignment=recipe.alignment,
            learning_rates=recipe.training.learning_rates,
        )
        log = train(trainer, progress, checkpoint)
        if adapted is not None:
            adapted.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)
            model = adapted.merge_and_unload()
    finally:
        if last_checkpoint(folder) is None:
            shutil.rmtree(scratch, ignore_errors=True)
    return model.eval(), processor, log, curve.points if curve else []
