"""One training run, from a recipe to a folder with everything that came of it."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..configuration import IMAGE_SIZES, preset_config
from ..data.collator import AgeVlmCollator, token_grid_size
from ..data.sources import DataSource
from ..hub import load_checkpoint
from ..modeling_agevlm import AgeVlmForConditionalGeneration
from ..modeling_agevlm.modeling_agevlm import reserved_image_token
from ..processing import AgeVlmProcessor, whole_image_processor
from .recipe import ModelRecipe, Recipe, TrainingRecipe
from .trainer import AgeVlmTrainer
from .warm_start import warm_start


def build_model(recipe: ModelRecipe, source: DataSource) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """The model and processor that a recipe starts from."""
    if recipe.checkpoint is not None:
        model, processor = load_checkpoint(recipe.checkpoint, "model.checkpoint", **recipe.config)
    elif recipe.text is not None:
        model = AgeVlmForConditionalGeneration.from_backbones(recipe.text, recipe.vision, **recipe.config)
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


def set_trainable(model: AgeVlmForConditionalGeneration, parts: Sequence[str]) -> None:
    """Freezes every part of the model that `parts` does not name."""
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".vision_tower." in name:
            part = "vision"
        elif ".multi_modal_projector." in name:
            part = "projector"
        elif ".cross_attention." in name:
            part = "cross_attention"
        else:
            part = "language_model"
        parameter.requires_grad_(part in parts)


def training_arguments(recipe: TrainingRecipe, seed: int, folder: str | Path, progress: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=max(1, round(recipe.warmup * recipe.steps)),
        lr_scheduler_type=recipe.schedule,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=recipe.log_every,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        seed=seed,
        disable_tqdm=not progress,
    )


class CurveCallback(TrainerCallback):
    """Measures the model every so many steps, and at the end, and keeps the figures."""

    def __init__(self, measure: Callable[[PreTrainedModel], dict[str, float]], every: int):
        self.measure, self.every = measure, every
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.points.append({"step": state.global_step, **self.measure(model)})


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
def run_folder(folder: str | Path, overwrite: bool) -> Iterator[Path]:
    """The folder of a run, as a context. An earlier run in it is gone only once this one is complete: where this one
    fails, the earlier one is put back as it was.

    Raises:
        ValueError: as `check_run_folder`.
    """
    folder = Path(folder)
    check_run_folder(folder, overwrite)
    earlier = None
    if (folder / "recipe.yaml").is_file():
        earlier = Path(tempfile.mkdtemp(prefix=f".{folder.name}.earlier-", dir=folder.parent)) / folder.name
        folder.rename(earlier)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException:
        if earlier is not None:
            shutil.rmtree(folder, ignore_errors=True)
            earlier.rename(folder)
            earlier.parent.rmdir()
        elif not (folder / "metrics.json").exists() and (folder / "recipe.yaml").is_file():
            # Nothing has come of it yet: the next try need not ask to overwrite it.
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if earlier is not None:
        shutil.rmtree(earlier.parent)


def check_run_folder(folder: str | Path, overwrite: bool) -> None:
    """Raises ValueError if the folder exists and `overwrite` is off, or if it is not one of ours."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not overwrite:
            raise ValueError(f"run folder: '{folder}' exists, expected a new one (or --overwrite to replace it).")
        if not (folder / "recipe.yaml").is_file():
            raise ValueError(f"run folder: '{folder}' holds no earlier run, and is not replaced even with --overwrite.")


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


def train(trainer: Trainer, progress: bool) -> list[dict[str, float]]:
    """Runs a trainer and returns what it logged."""
    for callback in () if progress else (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    return trainer.state.log_history


def fit(
    recipe: Recipe,
    source: DataSource,
    folder: str | Path,
    *,
    measure: Callable[[AgeVlmForConditionalGeneration, AgeVlmProcessor], dict[str, float]] | None = None,
    progress: bool = True,
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor, list[dict], list[dict]]:
    """Trains as the recipe says.

    Args:
        measure: figures of the model in training, taken every `evaluate_every` steps.

    Returns:
        Model, processor, what the trainer logged, what was measured.
    """
    set_seed(recipe.seed)
    model, processor = build_model(recipe.model, source)
    text = model.config.text_config
    recipe.alignment.check(len(model.config.cross_attention_layers), text.num_attention_heads)
    curve = CurveCallback(lambda model: measure(model, processor), recipe.training.evaluate_every) if measure else None
    with tempfile.TemporaryDirectory(prefix="trainer-", dir=folder) as scratch:
        warm_vision(recipe, source, model.model.vision_tower, processor.image_processor, scratch, progress)
        set_trainable(model, recipe.training.train)
        trainer = AgeVlmTrainer(
            model,
            training_arguments(recipe.training, recipe.seed, scratch, progress),
            train_dataset=source.train,
            data_collator=AgeVlmCollator(
                processor,
                token_grid_size(model, processor),
                independent_turns=True,
                image_visibility=model.config.image_visibility,
            ),
            callbacks=[curve] if curve else None,
            alignment=recipe.alignment,
        )
        log = train(trainer, progress)
    return model.eval(), processor, log, curve.points if curve else []
