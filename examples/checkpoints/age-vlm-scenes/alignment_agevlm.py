"""How cross-attention is aligned with masks in training, and so whose maps show where a model looks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


FORMS = ("nll", "kl", "bce", "dice")
ANSWER_QUERIES = ("read", "predict")

# Share of the run -> how far the weight has come from its first value (0) to its last (1).
WEIGHT_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 0.0,
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


@dataclass
class AlignmentConfig:
    """
    Attributes:
        form: `nll`, `kl`, `bce` or `dice`, see `age_vlm.training.alignment`.
        weight: of the alignment loss beside the language modelling loss; 0 turns it off.
        layers: cross-attention blocks that are aligned, counted from 0 among the blocks.
        heads: heads that are aligned: `half` (the first half: the others stay free to look elsewhere), `all`, or a list.
        answer_queries: of a phrase that the assistant says, the query that is aligned: the one that has `read` it, or the
            one that is to `predict` it, and so sees the image before the word is chosen. What the user says is read.
        schedule: `constant`, or `linear` or `cosine`: the weight goes to `final_weight` over the run.
        final_weight: of the last step, where the schedule is not constant.

    Raises:
        ValueError: one sentence, for an unknown form, schedule or kind of query, or a negative weight.
    """

    form: str = "nll"
    weight: float = 0.2
    layers: Sequence[int] = (0,)
    heads: str | Sequence[int] = "half"
    answer_queries: str = "read"
    schedule: str = "constant"
    final_weight: float = 0.0

    def __post_init__(self):
        for name, known in (("form", FORMS), ("schedule", WEIGHT_SCHEDULES), ("answer_queries", ANSWER_QUERIES)):
            given = getattr(self, name)
            if given not in known:
                nearest = get_close_matches(str(given), known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"alignment.{name}: got '{given}', expected one of {', '.join(known)} (nearest: '{nearest}')."
                )
        for name in ("weight", "final_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"alignment.{name}: got {getattr(self, name)}, expected 0 or more.")
        if isinstance(self.heads, str) and self.heads not in ("half", "all"):
            raise ValueError(f"alignment.heads: got '{self.heads}', expected 'half', 'all' or a list of heads.")
        if not self.heads:
            raise ValueError("alignment.heads: got an empty list, expected at least one head.")
        if not self.layers:
            raise ValueError("alignment.layers: got an empty list, expected at least one cross-attention block.")

    def weight_at(self, step: int, steps: int) -> float:
        """The weight of step number `step`, counted from 0, of so many."""
        share = min(1.0, step / max(1, steps - 1))
        return self.weight + (self.final_weight - self.weight) * WEIGHT_SCHEDULES[self.schedule](share)

    def check(self, config) -> None:
        """Raises ValueError, one sentence, if a model of that `AgeVlmConfig` lacks one of the layers or heads."""
        self.layer_indices(len(config.cross_attention_layers))
        self.head_indices(config.text_config.num_attention_heads)

    def layer_indices(self, blocks: int) -> list[int]:
        """The aligned ones among so many cross-attention blocks.

        Raises:
            ValueError: one sentence, for a block that is not there.
        """
        return _indices("layers", self.layers, blocks, f"the model has {blocks} blocks")

    def head_indices(self, heads: int) -> list[int]:
        """The aligned ones among so many heads.

        Raises:
            ValueError: one sentence, for a head that is not there.
        """
        if self.heads == "all":
            return list(range(heads))
        if self.heads == "half":
            return list(range(max(1, heads // 2)))
        return _indices("heads", self.heads, heads, f"the model has {heads} heads")


def _indices(name: str, given: Sequence[int], total: int, reason: str) -> list[int]:
    wrong = [index for index in given if not 0 <= index < total]
    if wrong:
        raise ValueError(f"alignment.{name}: got {wrong[0]}, expected 0 to {total - 1}: {reason}.")
    return list(given)


__all__ = ["ANSWER_QUERIES", "FORMS", "WEIGHT_SCHEDULES", "AlignmentConfig"]
