"""Which positions of a batch need logits in training: the head of a small Llama costs as much as a third of its layers."""

from __future__ import annotations

import torch
from torch import nn


IGNORED = -100


def learned_positions(labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What to call a model with, beside `labels`, for logits of those positions only that predict a token to learn.

    Args:
        labels: (rows, length), -100 where nothing is learned.

    Returns:
        `logits_to_keep`, (positions,) in which any row predicts one, and `shift_labels`, (rows, positions) what they
        predict: the same loss as of all positions. Nothing where nothing is learned.
    """
    if labels is None:
        return {}
    predicted = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    kept = (predicted != IGNORED).any(0).nonzero().squeeze(-1)
    return {"logits_to_keep": kept, "shift_labels": predicted[:, kept]} if len(kept) else {}
