"""Steps whose loss is not finite, or far above the usual, and the samples that they were made of."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median


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
        grad_norm: length of its gradient before clipping.
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
