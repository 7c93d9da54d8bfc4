"""`transformers.Trainer` with the alignment loss beside the language modelling loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer

from ..data.collator import GROUNDING_KEYS
from ..evaluation.attention import chosen_heads, picture_attention
from ..evaluation.metrics import attention_mass, pointing_hit
from .alignment import AlignmentConfig, alignment_losses
from .parts import part_of


class AgeVlmTrainer(Trainer):
    """Adds `alignment.weight` times the alignment loss to the loss, and logs both with what they do to the attention.

    The alignment loss is here and not in the model's forward: other trainers may wrap or replace a forward, and a model
    loaded for inference has no use for it. It is averaged over all groundings of an optimizer step, whatever the number
    of micro-batches and processes they came in, as the language modelling loss is over tokens.

    Args:
        alignment: what is aligned and how; the defaults when left out.
        learning_rates: peak rates of the parts (see `parts.PARTS`) that differ from `args.learning_rate`; all follow the
            same schedule.
        Others: as for `Trainer`. The collator is an `AgeVlmCollator`, and `remove_unused_columns` must be off.

    Logged besides `loss`: `lm_loss`, `alignment_loss`, `attention_mass` (share of the aligned heads' attention inside
    the masks), `pointing_accuracy` (how often their maximum falls on the mask) and `alignment_weight`.
    """

    def __init__(
        self,
        *args,
        alignment: AlignmentConfig | None = None,
        learning_rates: Mapping[str, float] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns:
            raise ValueError("args.remove_unused_columns: got True, expected False: the collator needs every column.")
        self.alignment = alignment if alignment is not None else AlignmentConfig()
        self.learning_rates = dict(learning_rates or {})
        self._sums: dict[str, torch.Tensor] = {}
        self._summed_steps = 0
        self._groundings_in_step: torch.Tensor | None = None

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

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(len(batch["grounding_rows"]) for batch in batch_samples if "grounding_rows" in batch)
        count = torch.tensor(float(count), device=device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count)
        self._groundings_in_step = count
        self._summed_steps += 1
        return batch_samples, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        grounding = {key: inputs.pop(key) for key in GROUNDING_KEYS if key in inputs}
        if grounding:
            inputs["cross_attention_rows"] = grounding["grounding_rows"]
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
            weight = self._alignment_weight(self.state.global_step)
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
