"""The alignment loss: how far the cross-attention of a phrase is from the mask of what the phrase names.

The paper (arXiv 2511.17793) distils masks of the Segment Anything Model into cross-attention; its equations are not
known to us, so every form here is an option. The default is the one that the metrics of docs/results.md are of.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..configuration.alignment_agevlm import AlignmentConfig


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


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"nll": nll, "kl": kl, "bce": bce, "dice": dice}


def alignment_losses(attention: Tensor, coverage: Tensor, config: AlignmentConfig) -> Tensor:
    """(groundings, layers, heads, tokens), (groundings, tokens) -> (groundings,) mean over layers and chosen heads."""
    attention = attention[:, :, config.head_indices(attention.shape[2])]
    return LOSSES[config.form](attention, coverage[:, None, None]).mean((1, 2))
