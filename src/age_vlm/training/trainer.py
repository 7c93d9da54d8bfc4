"""`transformers.Trainer` with the alignment loss beside the language modelling loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from ..data.collator import GROUNDING_KEYS
from ..data.sample_names import NamedBatches, NamedSamples, unnamed
from ..errors import UserError
from ..evaluation.attention import chosen_heads, picture_attention
from ..evaluation.metrics import attention_mass, pointing_hit
from .alignment import AlignmentConfig, alignment_losses
from .loss_watch import BAD_BATCHES, MOST_IN_A_ROW, BadStep, SpikeWatch, append_bad_step
from .parts import part_of
from .processes import EndedElsewhere


logger = logging.get_logger(__name__)


def _keep_batches_whole(args: TrainingArguments) -> None:
    """Pictures and masks of a batch are not one a row: what would cut up its tensors by rows is turned off."""
    # On several GPUs a process without others would cut them with `DataParallel`.
    args._n_gpu = min(args.n_gpu, 1)
    # By default one process reads streams for all. Without, each reads the stream and takes its own batches.
    if args.accelerator_config.dispatch_batches:
        raise UserError(
            "args.accelerator_config: got dispatch_batches=True, expected False: it cuts batches by rows, which pictures and "
            "masks are not in."
        )
    args.accelerator_config.dispatch_batches = False


class AgeVlmTrainer(Trainer):
    """Adds `alignment.weight` times the alignment loss to the loss, and logs both with what they do to the attention.

    The alignment loss is here and not in the model's forward: other trainers may wrap or replace a forward, and a model
    loaded for inference has no use for it. It is averaged over all groundings of an optimizer step, whatever the number
    of micro-batches and processes they came in, as the language modelling loss is over tokens.

    Args:
        alignment: what is aligned and how; the defaults when left out.
        learning_rates: peak rates of the parts (see `parts.PARTS`) that differ from `args.learning_rate`; all follow the
            same schedule.
        non_finite: `"stop"` ends the run at a step whose loss or gradient is not finite, before the optimizer takes it;
            `"skip"` goes on without that step, unless that happens `MOST_IN_A_ROW` times in a row.
        spike_threshold: see `SpikeWatch`; 0 for no warnings.
        bad_batches: file for the ids of the samples of steps that are not finite; in `args.output_dir` when left out.
        Others: as for `Trainer`. The collator is an `AgeVlmCollator`, and `remove_unused_columns` must be off.

    Logged besides `loss`: `lm_loss`, `alignment_loss`, `attention_mass` (share of the aligned heads' attention inside
    the masks), `pointing_accuracy` (how often their maximum falls on the mask) and `alignment_weight`.

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
        if self.args.remove_unused_columns:
            raise UserError("args.remove_unused_columns: got True, expected False: the collator needs every column.")
        self.alignment = alignment if alignment is not None else AlignmentConfig()
        self.learning_rates = dict(learning_rates or {})
        self._sums: dict[str, torch.Tensor] = {}
        self._summed_steps = 0
        self._groundings_in_step: torch.Tensor | None = None
        if non_finite not in ("stop", "skip"):
            raise UserError(f"non_finite: got '{non_finite}', expected 'stop' or 'skip'.")
        if non_finite == "skip" and self.is_deepspeed_enabled:
            raise UserError(
                "non_finite: got 'skip', expected 'stop': DeepSpeed takes a step before its loss can be read."
            )
        self.non_finite = non_finite
        self.bad_batches = Path(self.args.output_dir) / BAD_BATCHES if bad_batches is None else Path(bad_batches)
        self._spikes = SpikeWatch(spike_threshold)
        self._skipped_in_a_row = 0
        # Of the step that is being made: the ids of each batch, the loss of each, and `_sums` before it.
        self._step_ids: list[list[str]] = []
        self._step_losses: list[torch.Tensor] = []
        self._sums_before: dict[str, torch.Tensor] = {}
        # accelerate refuses to shard by classes that the model has none of.
        present = {type(module).__name__ for module in self.model.modules()}
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                module._no_split_modules = set(module._no_split_modules or ()) & present

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        had_one = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if had_one or not self.learning_rates:
            return optimizer
        names = {id(p): name for name, p in (self.model if model is None else model).named_parameters()}
        for group in list(optimizer.param_groups):
            parts: dict[str | None, list] = {}
            for parameter in group["params"]:
                part = part_of(names[id(parameter)])
                parts.setdefault(part if part in self.learning_rates else None, []).append(parameter)
            group["params"] = parts.pop(None, [])
            for part, parameters in parts.items():
                optimizer.add_param_group({**group, "params": parameters, "lr": self.learning_rates[part]})
        return optimizer

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Of tied weights one name is stored: the others are not missing.
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

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
        self._step_ids, self._step_losses, self._sums_before = [], [], dict(self._sums)

        def take(batch):
            # Ids are no tensors: they go no further than this.
            batch, names = unnamed(batch)
            self._step_ids.append(names)
            return batch

        batch_samples, num_items = super().get_batch_samples(map(take, epoch_iterator), num_batches, device)
        count = sum(len(batch["grounding_rows"]) for batch in batch_samples if "grounding_rows" in batch)
        count = torch.tensor(float(count), device=device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count)
        self._groundings_in_step = count
        self._summed_steps += 1
        return batch_samples, num_items

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._step_losses.append(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Also the last moment before the optimizer: what `non_finite` says is done here."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # The one time in a step that the host waits for the device. Trainer's `logging_nan_inf_filter`, which recipes turn
        # off for it, waits once for each batch; to look only where the loss is logged would be cheaper still, but by then
        # the weights are spoilt, and with them the checkpoint that would be gone on from.
        loss = torch.stack(self._step_losses).float().sum()
        if self.accelerator.num_processes > 1:
            # All must come to the same conclusion.
            loss = self.accelerator.reduce(loss, "mean")
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        # DeepSpeed has none before its first step.
        norm = torch.as_tensor(0.0 if norm is None else norm).to(loss)
        loss, norm = torch.stack([loss, norm]).tolist()
        # A scaler of fp16 gradients looks for their limit by going beyond it, and leaves such steps out itself.
        finite = math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.mixed_precision == "fp16")
        bad = BadStep(self.state.global_step + 1, loss, norm, [])
        if not finite:
            self._refuse(bad)
            model.zero_grad()  # to None: the optimizer passes over parameters without gradients, its own state too
            self._sums, self._summed_steps = self._sums_before, self._summed_steps - 1
            return None
        self._skipped_in_a_row = 0
        bad.usual = self._spikes.usual(loss)
        if bad.usual is not None:
            bad.sample_ids = gather_object(self._step_ids)
            logger.warning(f"Step {bad.step}: {bad}.")
            self._keep("spike", bad)
        return grad_norm

    def _refuse(self, bad: BadStep) -> None:
        losses = [math.isfinite(value) for value in torch.stack(self._step_losses).tolist()]
        # Where it is the gradient that overflowed, any of the batches may have done it.
        ours = [names for names, finite in zip(self._step_ids, losses) if not finite or math.isfinite(bad.loss)]
        bad.sample_ids = gather_object(ours)
        if self.accelerator.is_main_process:
            append_bad_step(self.bad_batches, bad)
        self._skipped_in_a_row += 1
        too_many = self._skipped_in_a_row >= MOST_IN_A_ROW
        if self.non_finite == "skip" and not too_many:
            logger.warning(f"Step {bad.step} is skipped: {bad}; see {self.bad_batches}.")
            self._keep("skipped", bad)
            return
        if not self.accelerator.is_main_process:
            raise EndedElsewhere
        times = f", the {MOST_IN_A_ROW}th step in a row," if too_many and self.non_finite == "skip" else ""
        advice = "" if self.non_finite == "skip" else "; training.non_finite=skip leaves such steps out"
        raise UserError(
            f"training: at step {bad.step}{times} {bad}, expected finite numbers ({self.bad_batches}{advice})."
        )

    def _keep(self, event: str, bad: BadStep) -> None:
        # Not by `log`: trackers take numbers only.
        self.state.log_history.append({"event": event, **bad.record()})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        grounding = {key: inputs.pop(key) for key in GROUNDING_KEYS if key in inputs}
        weight = self._alignment_weight(self.state.global_step)
        # ZeRO-3 counts the outputs that a backward pass comes through, in every process: one whose batch has no phrase
        # would wait for the others forever, so it lets zeros through.
        stands_in = bool(not grounding and weight and model.training and self.is_deepspeed_enabled)
        if grounding:
            inputs["cross_attention_rows"] = grounding["grounding_rows"]
        elif stands_in:
            inputs["cross_attention_rows"] = torch.zeros(1, 2, dtype=torch.long, device=inputs["input_ids"].device)
        # A loss reads no cache, and with one the model could not tell packed texts apart.
        inputs.setdefault("use_cache", False)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        terms = {"lm_loss": loss.detach()}
        if grounding:
            attention = picture_attention(
                outputs.cross_attention_maps,
                grounding["grounding_slots"],
                grounding["grounding_coverage"].shape[-1],
                self.alignment.layers,
            )
            coverage = grounding["grounding_coverage"].to(attention.dtype)
            losses = alignment_losses(attention, coverage, self.alignment)
            # An evaluation batch is on its own: the step's count is of training batches.
            alone = num_items_in_batch is None or not model.training
            aligned = losses.mean() if alone else losses.sum() / self._groundings_per_rank()
            if weight:
                loss = loss + weight * aligned.to(loss.dtype)
            heads = chosen_heads(self.alignment.heads, attention.shape[2])
            watched = attention.detach()[:, :, heads].mean((1, 2))
            terms |= {
                "alignment_loss": aligned.detach(),
                "groundings": torch.tensor(float(len(losses)), device=loss.device),
                "attention_mass": attention_mass(watched, coverage).sum(),
                "pointing_accuracy": pointing_hit(watched, coverage).float().sum(),
            }
        elif stands_in:
            loss = loss + 0.0 * sum(outputs.cross_attention_maps[layer].sum() for layer in self.alignment.layers)
        if model.training:
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        return (loss, outputs) if return_outputs else loss

    def _groundings_per_rank(self) -> torch.Tensor:
        """What a rank divides by, so that the mean of the ranks' gradients is that of all groundings together."""
        count = self._groundings_in_step
        if self.args.average_tokens_across_devices:
            count = count / self.accelerator.num_processes
        return count.clamp(min=1e-9)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
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
