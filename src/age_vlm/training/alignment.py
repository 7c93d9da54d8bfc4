"""The alignment loss: how far the cross-attention of a phrase is from the mask of what the phrase names.

The paper (arXiv 2511.17793) distils masks of the Segment Anything Model into cross-attention; its equations are not
known to us, so every form here is an option. The default is the one that the figures of docs/results.md are of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor

from ..errors import UserError
from ..evaluation.attention import check_layers, chosen_heads


EPSILON = 1e-6


def nll(attention: Tensor, coverage: Tensor) -> Tensor:
    """Negative log of the attention mass inside the mask."""
    return -((attention * coverage).sum(-1) + EPSILON).log()


def kl(attention: Tensor, coverage: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the attention from the normalised mask: also asks to cover the object evenly."""
    target = coverage / coverage.sum(-1, keepdim=True)
    return (target * ((target + EPSILON).log() - (attention + EPSILON).log())).sum(-1)


def bce(attention: Tensor, coverage: Tensor) -> Tensor:
    """Binary cross-entropy, token by token, of the attention scaled to what an even spread over the mask would give."""
    probability = (attention * coverage.sum(-1, keepdim=True)).clamp(EPSILON, 1 - EPSILON)
    return -(coverage * probability.log() + (1 - coverage) * (1 - probability).log()).mean(-1)


def dice(attention: Tensor, coverage: Tensor) -> Tensor:
    """One minus the soft Dice overlap of the attention, scaled likewise, with the mask."""
    area = coverage.sum(-1, keepdim=True)
    probability = attention * area
    return 1 - 2 * (probability * coverage).sum(-1) / (
        probability.square().sum(-1) + coverage.square().sum(-1) + EPSILON
    )


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"nll": nll, "kl": kl, "bce": bce, "dice": dice}

# Share of the run -> how far the weight has come from its first value (0) to its last (1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 0.0,
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


@dataclass
class AlignmentConfig:
    """
    Attributes:
        form: `nll`, `kl`, `bce` or `dice`.
        weight: of the alignment loss beside the language modelling loss; 0 turns it off.
        layers: cross-attention blocks that are aligned, counted from 0 among the blocks.
        heads: heads that are aligned: `half` (the first half: the others stay free to look elsewhere), `all`, or a list.
        schedule: `constant`, or `linear` or `cosine`: the weight goes to `final_weight` over the run.
        final_weight: of the last step, where the schedule is not constant.

    Raises:
        UserError: one sentence, for an unknown form or schedule, or a negative weight.
    """

    form: str = "nll"
    weight: float = 0.2
    layers: Sequence[int] = (0,)
    heads: str | Sequence[int] = "half"
    schedule: str = "constant"
    final_weight: float = 0.0

    def __post_init__(self):
        if self.form not in FORMS:
            nearest = get_close_matches(str(self.form), FORMS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"alignment.form: got '{self.form}', expected one of {', '.join(FORMS)} (nearest: '{nearest}')."
            )
        if self.schedule not in SCHEDULES:
            nearest = get_close_matches(str(self.schedule), SCHEDULES, n=1, cutoff=0.0)[0]
            raise UserError(
                f"alignment.schedule: got '{self.schedule}', expected one of {', '.join(SCHEDULES)} (nearest: '{nearest}')."
            )
        for name in ("weight", "final_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"alignment.{name}: got {getattr(self, name)}, expected 0 or more.")
        if isinstance(self.heads, str) and self.heads not in ("half", "all"):
            raise UserError(f"alignment.heads: got '{self.heads}', expected 'half', 'all' or a list of heads.")
        if not self.heads:
            raise UserError("alignment.heads: got an empty list, expected at least one head.")
        if not self.layers:
            raise UserError("alignment.layers: got an empty list, expected at least one cross-attention block.")

    def weight_at(self, step: int, steps: int) -> float:
        """The weight of step number `step`, counted from 0, of so many."""
        share = min(1.0, step / max(1, steps - 1))
        return self.weight + (self.final_weight - self.weight) * SCHEDULES[self.schedule](share)

    def check(self, blocks: int, heads: int) -> None:
        """Raises UserError, one sentence, if a model with so many cross-attention blocks and heads lacks one of ours."""
        check_layers(self.layers, blocks)
        chosen_heads(self.heads, heads)


def alignment_losses(attention: Tensor, coverage: Tensor, config: AlignmentConfig) -> Tensor:
    """(groundings, layers, heads, tokens), (groundings, tokens) -> (groundings,) mean over layers and chosen heads."""
    attention = attention[:, :, chosen_heads(config.heads, attention.shape[2])]
    return FORMS[config.form](attention, coverage[:, None, None]).mean((1, 2))
