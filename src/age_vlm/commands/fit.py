"""Training of one run: from a recipe and its data to a trained model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..data.collator import AgeVlmCollator
from ..errors import UserError, checkpoint_errors
from ..hub import save_adapter
from ..modeling_agevlm import AgeVlmForConditionalGeneration
from ..modeling_agevlm.parts_agevlm import keep_low_rank, unchanged_components
from ..processing import AgeVlmProcessor
from ..training.distributed import alone, from_main, is_main, together
from ..training.encoder_cache import encoder_cache
from ..training.loss_watch import BAD_BATCHES
from ..training.text_cache import text_cache
from ..training.trainer import AgeVlmTrainer
from ..training.warm_start import warm_start
from .build import build_model, set_trainable
from .callbacks import CurveCallback, ResumableCallback
from .recipe import Recipe, TrainingRecipe
from .run_files import ADAPTER_FOLDER, TENSORBOARD_FOLDER, TRAINER_FOLDER, last_checkpoint, remove_resumable
from .sources import DataSource


def training_arguments(
    recipe: TrainingRecipe,
    seed: int,
    folder: str | Path,
    progress: bool,
    name: str | None = None,
    kind: type[TrainingArguments] = TrainingArguments,
) -> TrainingArguments:
    checkpointing = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointing = checkpointing if recipe.gradient_checkpointing else {}
    settings = dict(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        warmup_steps=max(1, round(recipe.warmup * recipe.steps)) if recipe.warmup else 0,
        lr_scheduler_type=recipe.schedule,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=recipe.log_every,
        # It hides what is not finite from the log; only a step that is skipped shall be hidden.
        logging_nan_inf_filter=recipe.non_finite == "skip",
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or recipe.steps,
        # The newer of the two may be unfinished.
        save_total_limit=2,
        **checkpointing,
        report_to=list(recipe.report_to),
        run_name=name,
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        seed=seed,
        disable_tqdm=not progress,
    )
    try:
        return kind(**settings, **recipe.arguments)
    except (TypeError, ValueError) as error:
        if not recipe.arguments:
            raise
        raise UserError(f"training.arguments: {' '.join(str(error).split())}") from error


def warm_vision(
    recipe: Recipe, source: DataSource, vision_tower, image_processor, scratch: str, progress: bool
) -> None:
    """Warms the vision encoder up as the recipe says."""
    if not recipe.warm_start.steps:
        return
    if source.icons is None:
        raise UserError(
            f"warm_start.steps: got {recipe.warm_start.steps}, but this data has no single images, expected 0."
        )
    images, labels = source.icons
    warm_start(
        vision_tower,
        image_processor,
        images,
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
        measure: metrics of the model in training, taken every `evaluate_every` steps, by every process; it is given the
            model and the processor, and may call the model as a whole only, which may be sharded.
        resume: go on from the last resumable checkpoint in the folder, if there is one.
        previous: checkpoint of the recipe before this one.

    Returns:
        Model, whole in the main process only, processor, what the trainer logged, what was measured.
    """
    folder, scratch = Path(folder), Path(folder) / TRAINER_FOLDER
    progress = progress and is_main()
    with together():
        set_seed(recipe.seed)
        model, processor = build_model(recipe.model, source, previous)
        with checkpoint_errors():
            recipe.alignment.check(model.config)
    checkpoint = from_main(_cleared, folder, resume)
    try:
        if checkpoint is None and recipe.warm_start.steps:
            tower = model.model.vision_tower
            warmed, generator = from_main(_warmed, recipe, source, tower, processor.image_processor, scratch, progress)
            tower.load_state_dict(warmed)
            # What is drawn next, as the first weights of adapters are, is the same in every process.
            torch.set_rng_state(generator)
        # Of adapters on weights that nobody else has, the factors say nothing.
        by_factors = recipe.training.save_parts == "new" and recipe.training.language_model == "lora"
        known = by_factors and "language_model" in unchanged_components(model)
        adapted = set_trainable(model, recipe.training)
        curve = CurveCallback(lambda model: measure(model, processor), recipe.training.evaluate_every)
        trainer = AgeVlmTrainer(
            model,
            training_arguments(recipe.training, recipe.seed, scratch, progress, recipe.name),
            train_dataset=source.train,
            data_collator=AgeVlmCollator.from_model(
                model,
                processor,
                independent_turns=recipe.training.independent_turns,
                shared_prefix=recipe.training.shared_prefix,
                answer_queries=recipe.alignment.answer_queries,
                max_length=recipe.training.max_length,
                packing=recipe.training.packing,
                pack_length=recipe.training.pack_length,
            ),
            callbacks=[*([curve] if measure else []), ResumableCallback()],
            alignment=recipe.alignment,
            learning_rates=recipe.training.learning_rates,
            non_finite=recipe.training.non_finite,
            spike_threshold=recipe.training.spike_threshold,
            bad_batches=folder / BAD_BATCHES,
        )
        _keep_tensorboard(trainer, folder)
        unsharded = copy.deepcopy((model, adapted)) if _shards(trainer) and is_main() else None
        with _caches(recipe.training, model, trainer):
            log = train(trainer, progress, checkpoint)
        if _shards(trainer):
            state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            if unsharded is not None:
                model, adapted = unsharded
                _load_whole(model, state)
                model.to(trainer.args.device)
        if trainer.is_deepspeed_enabled:
            # Else whatever is loaded or generated from here on would wait for the other processes.
            unset_hf_deepspeed_config()
        if adapted is not None and is_main():
            save_adapter(adapted, folder / ADAPTER_FOLDER)
            model = merged(adapted, known)
    finally:
        if is_main() and last_checkpoint(folder) is None:
            remove_resumable(folder)
    return model.eval(), processor, log, curve.points


def merged(adapted, keep_factors: bool) -> AgeVlmForConditionalGeneration:
    """The model with its adapters merged into it, which remembers what they added to its language model."""
    factors = None
    if keep_factors:
        from ..training.lora import language_model_factors

        factors = language_model_factors(adapted)
    model = adapted.merge_and_unload()
    if factors:
        keep_low_rank(model, factors)
    return model


def _cleared(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any, in a trainer's folder that holds no other."""
    checkpoint = last_checkpoint(folder) if resume else None
    remove_resumable(folder, but=checkpoint)
    (folder / TRAINER_FOLDER).mkdir(parents=True, exist_ok=True)
    return checkpoint


def _warmed(
    recipe: Recipe, source: DataSource, vision_tower, image_processor, scratch: Path, progress: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights of the vision encoder after its warm start in this process alone, and where its random numbers stand."""
    with alone():
        warm_vision(recipe, source, vision_tower, image_processor, str(scratch), progress)
    return {name: value.cpu() for name, value in vision_tower.state_dict().items()}, torch.get_rng_state()


def _keep_tensorboard(trainer: Trainer, folder: Path) -> None:
    """TensorBoard's files, if it is reported to, in the run folder and not in the trainer's, which is removed."""
    if "tensorboard" in trainer.args.report_to:
        callback = trainer.pop_callback(TensorBoardCallback)
        callback.logging_dir = callback.logging_dir or str(folder / TENSORBOARD_FOLDER)
        trainer.add_callback(callback)


@contextmanager
def _caches(recipe: TrainingRecipe, model: AgeVlmForConditionalGeneration, trainer: Trainer) -> Iterator[None]:
    """What the recipe keeps of components that are frozen."""
    with ExitStack() as kept:
        if recipe.encoder_cache is not None:
            kept.enter_context(encoder_cache(model.model.vision_tower, recipe.encoder_cache))
        if recipe.text_cache:
            if _shards(trainer):
                raise UserError("training.text_cache: got true, expected false where layers are sharded.")
            kept.enter_context(text_cache(model.model))
        yield


def _shards(trainer: Trainer) -> bool:
    """Whether no process has the whole model while it trains."""
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.is_fsdp_enabled


def _load_whole(model: AgeVlmForConditionalGeneration, state: dict[str, torch.Tensor]) -> None:
    result = model.load_state_dict(state, strict=False)
    # Of tied weights one name is enough.
    missing = set(result.missing_keys) - set(model.all_tied_weights_keys)
    if missing or result.unexpected_keys:
        raise RuntimeError(f"The gathered weights lack {sorted(missing)} and have {result.unexpected_keys} too many.")
