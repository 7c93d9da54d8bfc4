"""Steps whose loss is not finite, or far above the usual, and the samples that they were made of."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import UserError
from .distributed import EndedElsewhere


if TYPE_CHECKING:
    from .trainer import AgeVlmTrainer

logger = logging.get_logger(__name__)


# In a run folder: one line for each step whose loss or gradient was not finite.
BAD_BATCHES = "bad_batches.jsonl"
# Fewer steps than `FEWEST` say too little of what is usual, and old ones nothing: a loss falls.
WINDOW, FEWEST = 100, 20
# So many steps in a row that are not finite are the model's own fault, not that of their samples.
MOST_IN_A_ROW = 10
# In a sentence; the file has all.
_MOST_NAMES = 32


@dataclass
class BadStep:
    """A step that did not go as steps do.

    Attributes:
        step: number of the step, counted from 1.
        loss: of the step.
        grad_norm: length of the step's gradient, before clipping.
        sample_ids: of each of its batches.
        usual: median of the steps before, for a spike.
    """

    step: int
    loss: float
    grad_norm: float
    sample_ids: list[list[str]]
    usual: float | None = None

    def record(self) -> dict:
        """As a line of a log. What is not finite is text there: JSON has no such numbers."""
        numbers = {"step": self.step, "loss": self.loss, "grad_norm": self.grad_norm, "usual_loss": self.usual}
        shown = {
            key: value if isinstance(value, int) or math.isfinite(value) else str(value)
            for key, value in numbers.items()
            if value is not None
        }
        return {**shown, "sample_ids": self.sample_ids}

    def __str__(self) -> str:
        """What happened and to which samples, as a part of a sentence."""
        if self.usual is not None:
            what = f"the loss is {self.loss:.4g}, far above the usual {self.usual:.4g}"
        elif not math.isfinite(self.loss):
            what = f"the loss is {self.loss}"
        else:
            what = f"the gradient's norm is {self.grad_norm}, the loss {self.loss:.4g}"
        names = [name for batch in self.sample_ids for name in batch]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return f"{what}, with the samples {', '.join(names[:_MOST_NAMES])}{more}" if names else what


class SpikeWatch:
    """Finds losses far above those before them.

    Far is `threshold` robust standard deviations, 1.4826 times the median distance from the median, which one spike, or a
    few, cannot widen as they would the usual standard deviation; 1% of the median at least, so that a loss which hardly
    moves is no reason for alarm. A spike is not counted among what is usual.

    Args:
        threshold: 0 finds none.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self._spikes_in_a_row = 0

    def usual(self, loss: float) -> float | None:
        """The median of the losses before, if this one is a spike; else None, and it is counted from now on."""
        if self.threshold and len(self.recent) >= FEWEST:
            middle = median(self.recent)
            deviation = 1.4826 * median(abs(each - middle) for each in self.recent)
            if loss > middle + self.threshold * max(deviation, 0.01 * abs(middle)):
                self._spikes_in_a_row += 1
                if self._spikes_in_a_row >= FEWEST:
                    # It stays there: a new usual, of which more warnings would say nothing.
                    self.recent.clear()
                    self._spikes_in_a_row = 0
                return middle
        self._spikes_in_a_row = 0
        self.recent.append(loss)
        return None


def append_bad_step(path: Path, bad: BadStep) -> None:
    """Adds a line to the file, and makes the folder if need be. A line is written at once: no reader sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(bad.record()) + "\n")


class StepWatch(TrainerCallback):
    """Looks at the loss and gradient of every step before the optimizer does, and does what `trainer.non_finite` says.

    Args:
        trainer: it is told by `forget_step` that a step is skipped.
        spike_threshold: see `SpikeWatch`.

    Attributes:
        sample_ids: of each batch of the step that is being made.
        losses: of each of these batches, scalars.
        tokens: that are learned in the step, of all processes; None where nobody counts them.
        norm: of the step's gradient, before clipping; None until it is measured, and where there is none.
        skipped_in_a_row: so many steps, the last one among them, were skipped.
    """

    def __init__(self, trainer: AgeVlmTrainer, spike_threshold: float):
        self.trainer, self.spike_threshold = trainer, spike_threshold
        self.spikes = SpikeWatch(spike_threshold)
        self.skipped_in_a_row = 0
        self.begin_step()

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        shared = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.get_tp_size() > 1
        if trainer.accelerator.num_processes > 1 and not shared and trainer.model_wrapped is trainer.model:
            raise UserError(
                "train: got a model that was evaluated first, whose gradients transformers (5.24) does not average over "
                "processes then, expected a new trainer."
            )
        # Maybe not for the first time.
        self.spikes = SpikeWatch(self.spike_threshold)
        self.skipped_in_a_row = 0
        self.trainer.start_anew()
        self.trainer.keep_alignment()

    def begin_step(self) -> None:
        """Forgets the batches of the step before."""
        self.sample_ids: list[list[str]] = []
        self.losses: list[torch.Tensor] = []
        self.tokens: torch.Tensor | int | None = None
        self.norm: torch.Tensor | float | None = None

    def measure_gradient(self) -> None:
        """Keeps the norm of the step's gradient, to be called after its last backward pass.

        Trainer's `on_pre_optimizer_step` comes after clipping, which makes zeros of a gradient whose norm is not finite.
        """
        trainer = self.trainer
        # DeepSpeed has none before its first step.
        deepspeed = trainer.is_deepspeed_enabled
        self.norm = trainer.model_wrapped.get_global_grad_norm() if deepspeed else gradient_norm(trainer.model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        # The one time in a step that the host waits for the device. Trainer's `logging_nan_inf_filter`, which recipes turn
        # off for it, waits once for each batch; to look only where the loss is logged would be cheaper still, but by then
        # the weights are spoilt, and with them the checkpoint that would be gone on from.
        accelerator = self.trainer.accelerator
        loss = torch.stack(self.losses).float().sum()
        both = torch.stack([loss, torch.as_tensor(0.0 if self.norm is None else self.norm).to(loss)])
        if accelerator.num_processes > 1:
            # All must come to the same conclusion.
            both = accelerator.reduce(both, "mean")
        loss, norm = both.tolist()
        bad = BadStep(state.global_step + 1, loss, norm, [])
        # A scaler of fp16 gradients looks for their limit by going beyond it, and leaves such steps out itself.
        if not (math.isfinite(loss) and (math.isfinite(norm) or accelerator.mixed_precision == "fp16")):
            self._refuse(bad, state)
            model.zero_grad()  # to None: the optimizer passes over parameters without gradients, its own state too
            self.trainer.forget_step()
            return
        self.skipped_in_a_row = 0
        bad.usual = self.spikes.usual(loss)
        if bad.usual is not None:
            bad.sample_ids = gather_object(self.sample_ids)
            logger.warning(f"Step {bad.step}: {bad}.")
            _keep(state, "spike", bad)

    def _refuse(self, bad: BadStep, state) -> None:
        losses = [math.isfinite(value) for value in torch.stack(self.losses).tolist()]
        # Where it is the gradient that overflowed, any of the batches may have done it.
        ours = [names for names, finite in zip(self.sample_ids, losses) if not finite or math.isfinite(bad.loss)]
        bad.sample_ids = gather_object(ours)
        file, skips = self.trainer.bad_batches, self.trainer.non_finite == "skip"
        if self.trainer.accelerator.is_main_process:
            append_bad_step(file, bad)
        self.skipped_in_a_row += 1
        too_many = self.skipped_in_a_row >= MOST_IN_A_ROW
        nothing = self.tokens is not None and not self.tokens
        if skips and not too_many and not nothing:
            logger.warning(f"Step {bad.step} is skipped: {bad}; see {file}.")
            _keep(state, "skipped", bad)
            return
        if not self.trainer.accelerator.is_main_process:
            raise EndedElsewhere
        if nothing:
            raise UserError(f"labels: got no token to learn at step {bad.step}, expected at least one: {bad}.")
        times = f", the {MOST_IN_A_ROW}th step in a row," if too_many and skips else ""
        advice = "" if skips else "; training.non_finite=skip leaves such steps out"
        raise UserError(f"training: at step {bad.step}{times} {bad}, expected finite numbers ({file}{advice}).")


def gradient_norm(model: torch.nn.Module) -> torch.Tensor | None:
    """Length of the gradient of all parameters, of those that are shared out by DTensor as a whole; None without any."""
    groups: dict = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            # torch takes no norm over tensors of several meshes.
            groups.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter.grad)
    norms = [get_total_norm(gradients) for gradients in groups.values()]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms])) if norms else None


def _keep(state, event: str, bad: BadStep) -> None:
    # Not by `Trainer.log`: trackers take numbers only.
    state.log_history.append({"event": event, **bad.record()})
