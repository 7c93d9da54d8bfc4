"""`transformers.Trainer` with the alignment loss beside the language modelling loss."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..configuration import AgeVlmConfig, AlignmentConfig
from ..data.collator import GROUNDING_KEYS
from ..data.sample_names import NamedBatches, NamedSamples, unnamed
from ..errors import UserError, checkpoint_errors
from ..evaluation.metrics import attention_mass, pointing_hit
from ..modeling_agevlm.attention_maps_agevlm import attention_on_images
from ..modeling_agevlm.components_agevlm import component_of
from .alignment import alignment_losses
from .distributed import keep_to_one_gpu
from .learned_positions import learned_positions
from .loss_watch import BAD_BATCHES, StepWatch
from .prompt_learning import virtual_tokens


# Beside what transformers leaves out itself: the gates, and the layer scales of timm's encoders and transformers' own.
_NOT_DECAYED = re.compile(r"(^|\.)(attn|mlp)_gate\.|(^|[._])(gamma|lambda|layer_?scale)(_?\d+)?($|[._])")


def _keep_batches_whole(args: TrainingArguments) -> None:
    """Images and masks of a batch are not one a row: what would cut up its tensors by rows is turned off."""
    # On several GPUs a process without others would cut them with `DataParallel`.
    keep_to_one_gpu(args)
    # By default one process reads streams for all. Without, each reads the stream and takes its own batches.
    if args.accelerator_config.dispatch_batches:
        raise UserError(
            "args.accelerator_config: got dispatch_batches=True, expected False: it cuts batches by rows, which images and "
            "masks are not in."
        )
    args.accelerator_config.dispatch_batches = False


class AgeVlmTrainer(Trainer):
    """Adds `alignment.weight` times the alignment loss to the loss, and logs both with what they do to the attention.

    The alignment loss is here and not in the model's forward: other trainers may wrap or replace a forward, and a model
    loaded for inference has no use for it. It is averaged over all groundings of an optimizer step, whatever the number
    of micro-batches and processes they came in, as the language modelling loss is over tokens.

    Args:
        alignment: what is aligned and how; as the model was aligned before, else the defaults, when left out. The model's
            configuration keeps it from the first step on.
        learning_rates: peak rates of the components (`vision`, `projector`, `cross_attention`, `language_model`) that differ
            from `args.learning_rate`; all follow the same schedule.
        non_finite: `"stop"` ends the run at a step whose loss or gradient is not finite, before the optimizer takes it;
            `"skip"` goes on without that step, unless that happens `MOST_IN_A_ROW` times in a row.
        spike_threshold: see `SpikeWatch`; 0 for no warnings.
        bad_batches: file for the ids of the samples of steps that are not finite; in `args.output_dir` when left out.
        Others: as for `Trainer`. The collator is an `AgeVlmCollator`, and `remove_unused_columns` must be off.

    Logged besides `loss`: `lm_loss`, `alignment_loss`, `attention_mass` (share of the aligned heads' attention inside
    the masks), `pointing_accuracy` (how often their maximum falls on the mask) and `alignment_weight`. `evaluate` and
    `predict` report the first four, too, with their prefix: `eval_lm_loss` is the mean over all learned tokens, the others
    are means over all groundings, while `eval_loss` is, as for any `Trainer`, a mean of the batches' losses. Predictions
    are the logits alone.

    Raises:
        UserError: one sentence: in training, for a sample that cannot be read or made part of a batch, by its id or its
            number, and for a step that is not finite, with the ids of its samples.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *others,
        alignment: AlignmentConfig | None = None,
        learning_rates: Mapping[str, float] | None = None,
        non_finite: str = "stop",
        spike_threshold: float = 10.0,
        bad_batches: Path | None = None,
        **kwargs,
    ):
        if args is not None:
            _keep_batches_whole(args)
        super().__init__(model, args, *others, **kwargs)
        shared = getattr(self.accelerator, "parallelism_config", None)
        if any(getattr(shared, f"{kind}_size", 1) > 1 for kind in ("cp", "sp")):
            raise UserError(
                "args.parallelism_config: got context or sequence parallelism, expected none: images and masks are of "
                "positions in the whole text."
            )
        if self.args.remove_unused_columns:
            raise UserError("args.remove_unused_columns: got True, expected False: the collator needs every column.")
        with checkpoint_errors():
            self.alignment = alignment if alignment is not None else self.model.alignment
            self.alignment.check(self.model.config)
        self.learning_rates = dict(learning_rates or {})
        if non_finite not in ("stop", "skip"):
            raise UserError(f"non_finite: got '{non_finite}', expected 'stop' or 'skip'.")
        if non_finite == "skip" and self.is_deepspeed_enabled:
            raise UserError(
                "non_finite: got 'skip', expected 'stop': DeepSpeed takes a step before its loss can be read."
            )
        self.non_finite = non_finite
        self.bad_batches = Path(self.args.output_dir) / BAD_BATCHES if bad_batches is None else Path(bad_batches)
        self._steps = StepWatch(self, spike_threshold)
        self._evaluated: list[torch.Tensor] | None = None
        self.start_anew()
        self.add_callback(self._steps)
        if self.label_smoother is not None:
            # Trainer shifts labels for classes that it knows by name, which sharding changes.
            self.label_smoother = partial(_smoothed_next_tokens, self.label_smoother)
        if isinstance(self.model, PreTrainedModel):
            self.model.register_load_state_dict_post_hook(_tied_are_not_missing)
        # accelerate refuses to shard by classes that the model has none of.
        present = {type(module).__name__ for module in self.model.modules()}
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                module._no_split_modules = set(module._no_split_modules or ()) & present

    def keep_alignment(self) -> None:
        """Writes into the model's configuration whose attention is aligned: the model says of itself where it looks."""
        settings = dataclasses.asdict(self.alignment)
        self.model.config.alignment = {**settings, "layers": list(self.alignment.layers)}

    def start_anew(self) -> None:
        """Forgets what was to be logged of earlier steps: `auto_find_batch_size` begins again with smaller batches."""
        self._sums: dict[str, torch.Tensor] = {}
        self._sums_before: dict[str, torch.Tensor] = {}
        self._summed_steps = 0
        self._groundings_in_step: torch.Tensor | None = None

    def forget_step(self) -> None:
        """Takes the step that is being made out of what is logged."""
        self._sums, self._summed_steps = self._sums_before, self._summed_steps - 1

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not _NOT_DECAYED.search(name)]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        had_one = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if had_one or not self.learning_rates:
            return optimizer
        names = {id(p): name for name, p in (self.model if model is None else model).named_parameters()}
        for group in list(optimizer.param_groups):
            parts: dict[str | None, list] = {}
            for parameter in group["params"]:
                part = component_of(names[id(parameter)])
                parts.setdefault(part if part in self.learning_rates else None, []).append(parameter)
            group["params"] = parts.pop(None, [])
            for part, parameters in parts.items():
                optimizer.add_param_group({**group, "params": parameters, "lr": self.learning_rates[part]})
        return optimizer

    def _alignment_weight(self, step: int) -> float:
        return self.alignment.weight_at(step, self.state.max_steps)

    def get_train_dataloader(self):
        samples, collator = self.train_dataset, self.data_collator
        # Streams have no numbers.
        if isinstance(samples, torch.utils.data.IterableDataset):
            return super().get_train_dataloader()
        self.train_dataset, self.data_collator = NamedSamples(samples), NamedBatches(collator, samples)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = samples, collator

    def _get_train_sampler(self, train_dataset=None):
        named = isinstance(train_dataset, NamedSamples)
        # Samplers that group by length look for a column of the data set.
        return super()._get_train_sampler(train_dataset.samples if named else train_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._steps.begin_step()
        self._sums_before = dict(self._sums)

        def take(batch):
            # Ids are no tensors: they go no further than this.
            batch, names = unnamed(batch)
            self._steps.sample_ids.append(names)
            return batch

        batch_samples, num_items = super().get_batch_samples(map(take, epoch_iterator), num_batches, device)
        count = sum(len(batch["grounding_queries"]) for batch in batch_samples if "grounding_queries" in batch)
        count = torch.tensor(float(count), device=device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count)
        self._groundings_in_step = count
        self._summed_steps += 1
        self._steps.tokens = num_items
        return batch_samples, num_items

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._steps.losses.append(loss)
        if self.accelerator.sync_gradients:
            self._steps.measure_gradient()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        grounding = {key: inputs.pop(key) for key in GROUNDING_KEYS if key in inputs}
        shift = virtual_tokens(self.model, inputs)
        labels = inputs.get("labels")
        weight = self._alignment_weight(self.state.global_step)
        # ZeRO-3 counts the outputs that a backward pass comes through, in every process: one whose batch has no phrase
        # would wait for the others forever, so it lets zeros through.
        stands_in = bool(not grounding and weight and model.training and self.is_deepspeed_enabled)
        if grounding:
            rows = grounding["grounding_queries"]
            inputs["cross_attention_queries"] = rows + rows.new_tensor([0, shift])
        elif stands_in:
            inputs["cross_attention_queries"] = torch.zeros(1, 2, dtype=torch.long, device=inputs["input_ids"].device)
        # A loss reads no cache, and with one the model could not tell packed texts apart.
        inputs.setdefault("use_cache", False)
        if not (return_outputs or shift or self.args.torch_compile or self.label_smoother or self.compute_loss_func):
            inputs |= learned_positions(labels)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        terms = {"lm_loss": loss.detach()}
        if grounding:
            attention = attention_on_images(
                outputs.cross_attention_maps,
                grounding["grounding_slots"],
                grounding["grounding_coverage"].shape[-1],
                self.alignment.layer_indices(len(outputs.cross_attention_maps)),
            )
            coverage = grounding["grounding_coverage"].to(attention.dtype)
            losses = alignment_losses(attention, coverage, self.alignment)
            # An evaluation batch is on its own: the step's count is of training batches.
            alone = num_items_in_batch is None or not model.training
            aligned = losses.mean() if alone else losses.sum() / self._groundings_per_rank()
            if weight:
                loss = loss + weight * aligned.to(loss.dtype)
            heads = self.alignment.head_indices(attention.shape[2])
            watched = attention.detach()[:, :, heads].mean((1, 2))
            mass, hits = attention_mass(watched, coverage), pointing_hit(watched, coverage).float()
            terms |= {
                "alignment_loss": aligned.detach(),
                "groundings": torch.tensor(float(len(losses)), device=loss.device),
                "attention_mass": mass.sum(),
                "pointing_accuracy": hits.sum(),
            }
        elif stands_in:
            loss = loss + 0.0 * sum(outputs.cross_attention_maps[layer].sum() for layer in self.alignment.layers)
        if model.training:
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        elif self._evaluated is not None and labels is not None:
            learned = (labels[:, 1:] != -100).sum(-1)
            scores = loss.new_zeros(len(labels), 4, dtype=torch.float32)
            if grounding:
                each = torch.stack([losses.detach(), torch.ones_like(mass), mass, hits], dim=-1)
                scores.index_add_(0, grounding["grounding_queries"][:, 0], each.float())
            if not (learned.sum() if num_items_in_batch is None else num_items_in_batch):
                raise UserError("labels: got an evaluation batch without a token to learn, expected at least one.")
            # Of each row, since some may be there only to fill up the batches of several processes.
            lm = self._row_losses(outputs.logits, labels)
            self._evaluated.append(torch.cat([torch.stack([lm, learned], dim=-1).float(), scores], dim=-1))
        return (loss, outputs) if return_outputs else loss

    def _row_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(rows,) sums of the language modelling loss over the learned tokens of each; row by row, to need little memory."""
        logits = logits.detach()[:, -labels.shape[1] : -1]
        smoothing = self.args.label_smoothing_factor
        return torch.stack(
            [
                nn.functional.cross_entropy(row.float(), label, reduction="sum", label_smoothing=smoothing)
                for row, label in zip(logits, labels[:, 1:])
            ]
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        if getattr(self.data_collator, "packing", False) and self.accelerator.num_processes > 1:
            raise UserError(
                "data_collator: got packing=True, expected False to evaluate in several processes, which gather as many rows "
                "from each."
            )
        self._evaluated, self._evaluation = [], []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            totals = sum(table.double().sum(0) for table in self._evaluation)
        finally:
            self._evaluated = None
        lm, tokens, aligned, groundings, mass, hits = totals.tolist() if self._evaluation else [0.0] * 6
        if tokens:
            output.metrics[f"{metric_key_prefix}_lm_loss"] = lm / tokens
        if groundings:
            names = ("alignment_loss", "attention_mass", "pointing_accuracy")
            for name, total in zip(names, (aligned, mass, hits)):
                output.metrics[f"{metric_key_prefix}_{name}"] = total / groundings
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if inputs.get("labels") is None:
            inputs = {key: value for key, value in inputs.items() if key not in GROUNDING_KEYS}
        ignore_keys = [*(ignore_keys or ()), *AgeVlmConfig.keys_to_ignore_at_inference]
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if isinstance(logits, torch.Tensor) and labels is not None:
            # What PEFT puts in front of a text is no part of it.
            logits = logits[:, -labels.shape[1] :]
        if self._evaluated:
            # As Trainer gathers losses: what fills up the last batch of several processes is dropped.
            self._evaluation.append(self.accelerator.gather_for_metrics(self._evaluated.pop()))
        return loss, logits, labels

    def _groundings_per_rank(self) -> torch.Tensor:
        """What a rank divides by, so that the mean of the ranks' gradients is that of all groundings together."""
        count = self._groundings_in_step
        if self.args.average_tokens_across_devices:
            count = count / self.accelerator.num_processes
        return count.clamp(min=1e-9)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._steps.skipped_in_a_row:
            logs = {name: value for name, value in logs.items() if name != "grad_norm"}  # of a step that was not taken
        if "loss" in logs and self._sums:
            steps = max(1, self._summed_steps)
            names = ("lm_loss", "alignment_loss", "groundings", "attention_mass", "pointing_accuracy")
            sums = torch.stack(
                [torch.as_tensor(self._sums.get(name, 0.0)).float().to(self.args.device) for name in names]
            )
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums)
                sums[:2] /= self.accelerator.num_processes
            lm, aligned, groundings, mass, hits = sums.tolist()
            # The step that was just made has been counted already.
            weight = self._alignment_weight(max(0, self.state.global_step - 1))
            logs = {**logs, "lm_loss": lm / steps, "alignment_weight": weight}
            if groundings:
                logs |= {
                    "alignment_loss": aligned / steps,
                    "attention_mass": mass / groundings,
                    "pointing_accuracy": hits / groundings,
                }
            self._sums, self._summed_steps = {}, 0
        super().log(logs, *args, **kwargs)


def _smoothed_next_tokens(smoother, outputs, labels, shift_labels=True, **kwargs) -> torch.Tensor:
    """transformers' `LabelSmoother` on the next token; what PEFT puts in front of a text has no labels."""
    logits = outputs["logits"][:, -labels.shape[1] :]
    return smoother({"logits": logits}, labels, shift_labels=True, **kwargs)


def _tied_are_not_missing(model: PreTrainedModel, keys: Any) -> None:
    """Of tied weights one name is stored."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in (model.all_tied_weights_keys or {})]
