"""One training run, from a recipe to a folder with everything that came of it."""

from __future__ import annotations

import copy
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from accelerate import PartialState
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration import IMAGE_SIZES, preset_config
from ..data.collator import AgeVlmCollator, token_grid_size
from ..data.sources import DataSource
from ..errors import UserError, check_new_folder, checkpoint_errors, reading, writing
from ..hub import load_checkpoint, save_adapter
from ..modeling_agevlm import AgeVlmForConditionalGeneration
from ..modeling_agevlm.backbones_agevlm import reserved_image_token
from ..processing import AgeVlmProcessor, whole_image_processor
from ..whole_files import beside, unfinished
from .loss_watch import BAD_BATCHES
from .parts import part_of
from .processes import alone, engine, from_main, is_main, process_count, together
from .recipe import PREVIOUS, WATCH_KEYS, ModelRecipe, Recipe, TrainingRecipe, build
from .run_files import (
    ADAPTER_FOLDER,
    TENSORBOARD_FOLDER,
    TRAINER_FOLDER,
    foreign_files,
    is_begun_only,
    remove_resumable,
    remove_run,
)
from .trainer import AgeVlmTrainer
from .warm_start import warm_start


if TYPE_CHECKING:
    from peft import PeftModel

# Written last into a resumable checkpoint.
_WHOLE = "whole"


@checkpoint_errors()
def build_model(
    recipe: ModelRecipe, source: DataSource, previous: Path | None = None
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """The model and processor that a recipe starts from; `previous` is the checkpoint of the recipe before it."""
    if recipe.checkpoint == PREVIOUS and previous is None:
        raise UserError(
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
        raise UserError("model.config.image_token_id: got one, expected none: the tokenizer is made with the model.")
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
    return kind(
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
        # Not before every process has written its part.
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _WHOLE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a run folder, if there is one."""
    whole = [mark.parent for mark in (folder / TRAINER_FOLDER).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def environment() -> dict[str, str | int]:
    """What a figure depends on besides the code: versions, processor, threads, and how many processes, if several."""
    several = {"processes": process_count(), "engine": engine()} if process_count() > 1 else {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        **several,
    }


@contextmanager
def run_folder(folder: str | Path, overwrite: bool, resume: bool = False) -> Iterator[Path]:
    """The folder of a run, as a context. An earlier run in it is gone only once this one is complete: where this one
    fails, the earlier one is put back as it was, with the ids of the samples that this one failed of, if it did. One that
    fails and could be resumed, or has such ids, stays, if it replaces no other.

    Raises:
        UserError: as `check_run_folder`.
    """
    folder = Path(folder)
    check_run_folder(folder, overwrite, resume)
    begun = (folder / "recipe.yaml").is_file()
    earlier = None
    with writing("run folder", folder):
        if begun and not resume:
            earlier = beside(folder, _EARLIER)
            folder.rename(earlier)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        if earlier is not None:
            if (folder / BAD_BATCHES).exists():  # the error has sent its reader there
                (folder / BAD_BATCHES).replace(earlier / BAD_BATCHES)
            remove_run(folder)
            if folder.exists():  # its user has put something there
                shutil.copytree(earlier, folder, dirs_exist_ok=True, copy_function=shutil.move)
                shutil.rmtree(earlier)
            else:
                earlier.rename(folder)
        elif not (
            (begun and resume)
            or (folder / "metrics.json").exists()
            or not (folder / "recipe.yaml").is_file()
            or last_checkpoint(folder)
            or (folder / BAD_BATCHES).exists()
        ):
            # Nothing has come of it yet: the next try need not ask to overwrite it.
            remove_run(folder)
        raise
    # Also those that a run which was killed would have replaced.
    for replaced in unfinished(folder.parent, [folder.name], _EARLIER):
        remove_run(replaced)


_EARLIER = "earlier."


def check_run_folder(folder: str | Path, overwrite: bool, resume: bool = False) -> None:
    """Raises UserError if the folder exists and neither `overwrite` nor `resume` is on, or if it is not one of ours, or if
    something else in it would be lost, or if it cannot be written."""
    folder = Path(folder)
    with reading("run folder", folder):
        new = not folder.exists() or is_begun_only(folder)
    if new:
        check_new_folder("run folder", folder)
        return
    ours = (folder / "recipe.yaml").is_file()
    if resume:
        if not ours:
            raise UserError(f"run folder: '{folder}' holds no run, expected one to resume, or a new folder.")
        return
    if not overwrite:
        other = "" if not ours or is_complete(folder) else ", --resume to continue it"
        raise UserError(f"run folder: '{folder}' exists, expected a new one (or --overwrite to replace it{other}).")
    if not ours:
        raise UserError(f"run folder: '{folder}' holds no earlier run, and is not replaced even with --overwrite.")
    if others := foreign_files(folder):
        raise UserError(
            f"run folder: '{folder}' also holds '{others[0].relative_to(folder)}', which is no part of a run, and is not "
            "replaced even with --overwrite: move that away, or name another folder."
        )


def is_complete(folder: Path) -> bool:
    """Whether the run in the folder has come to its end: the report is what is written last."""
    return (folder / "report.html").is_file()


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises UserError, one sentence with the first difference, if the run in the folder is of another recipe; what to do
    about a step that goes wrong, and who gets the log, may differ."""
    try:
        with reading("run folder", folder / "recipe.yaml"):
            begun = yaml.safe_load((folder / "recipe.yaml").read_bytes())
        # Of an earlier version, it lacks the keys that are new since.
        with suppress(UserError):
            begun = yaml.safe_load(build(Recipe, begun).to_yaml())
    except yaml.YAMLError:
        begun = None
    here, kept = yaml.safe_load(recipe.to_yaml()), (*WATCH_KEYS, "report_to")
    for each in (begun, here):
        if isinstance(each, dict) and isinstance(each.get("training"), dict):
            each["training"] = {key: value for key, value in each["training"].items() if key not in kept}
    difference = _difference(begun, here)
    if difference is not None:
        raise UserError(
            f"run folder: '{folder}' is of another recipe ({difference}), expected the same one, or a new folder."
        )


def check_same_processes(folder: Path) -> None:
    """Raises UserError, one sentence, if the run in the folder has checkpoints of another number of processes, or of another
    way to share the work: their steps are of other samples, or their files of another form."""
    try:
        begun = json.loads((folder / "environment.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return
    there, here = (
        (values.get("processes", 1), values.get("engine", "no launcher")) for values in (begun, environment())
    )
    if there != here and last_checkpoint(folder):
        raise UserError(
            f"run folder: '{folder}' was begun by {there[0]} process{'es' * (there[0] > 1)} ({there[1]}), expected the same "
            f"to resume it, got {here[0]} ({here[1]})."
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
        raise UserError(
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
    measure: Callable[[AgeVlmForConditionalGeneration, AgeVlmProcessor, tuple[int, int]], dict[str, float]]
    | None = None,
    resume: bool = False,
    previous: Path | None = None,
    progress: bool = True,
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor, list[dict], list[dict]]:
    """Trains as the recipe says. Adapters are stored in the folder and merged into the model.

    Args:
        measure: figures of the model in training, taken every `evaluate_every` steps, by every process; it is given the
            model, the processor and the grid of image tokens, and may call the model as a whole only, which may be sharded.
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
        text = model.config.text_config
        recipe.alignment.check(len(model.config.cross_attention_layers), text.num_attention_heads)
    checkpoint = from_main(_cleared, folder, resume)
    try:
        if checkpoint is None and recipe.warm_start.steps:
            tower = model.model.vision_tower
            warmed, generator = from_main(_warmed, recipe, source, tower, processor.image_processor, scratch, progress)
            tower.load_state_dict(warmed)
            # What is drawn next, as the first weights of adapters are, is the same in every process.
            torch.set_rng_state(generator)
        adapted = set_trainable(model, recipe.training)
        # Now: what is sharded later cannot be asked in parts.
        grid = token_grid_size(model, processor)
        curve = CurveCallback(lambda model: measure(model, processor, grid), recipe.training.evaluate_every)
        trainer = AgeVlmTrainer(
            model,
            training_arguments(recipe.training, recipe.seed, scratch, progress, recipe.name),
            train_dataset=source.train,
            data_collator=AgeVlmCollator(
                processor,
                grid,
                independent_turns=recipe.training.independent_turns,
                max_length=recipe.training.max_length,
                image_visibility=model.config.image_visibility,
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
            model = adapted.merge_and_unload()
    finally:
        if is_main() and last_checkpoint(folder) is None:
            remove_resumable(folder)
    return model.eval(), processor, log, curve.points


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
