"""What a run does beside training itself: metrics on the way, and checkpoints that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .run_files import WHOLE


class CurveCallback(TrainerCallback, ExportableState):
    """Measures the model every so many steps, and at the end, and keeps the metrics, also in resumable checkpoints."""

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
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / WHOLE).touch()
