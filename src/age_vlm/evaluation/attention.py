"""Which part of a model's attention maps is meant: pictures, cross-attention blocks, heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError


def picture_attention(maps: Sequence[Tensor], slots: Tensor, tokens: int, layers: Sequence[int]) -> Tensor:
    """Attention of each grounded row on its own picture.

    Args:
        maps: one (groundings, heads, pictures x tokens) a cross-attention block.
        slots: (groundings,) which picture of its row.
        tokens: image tokens of one picture.

    Returns:
        (groundings, layers, heads, tokens).

    Raises:
        UserError: for a block that the model does not have, or a number of tokens that is not the model's.
    """
    check_layers(layers, len(maps))
    if maps[0].shape[-1] % tokens:
        raise UserError(
            f"grounding_coverage: got {tokens} image tokens a picture, expected a divisor of the model's {maps[0].shape[-1]}."
        )
    stacked = torch.stack([maps[layer] for layer in layers], dim=1).unflatten(-1, (-1, tokens))
    return stacked[torch.arange(len(slots), device=slots.device), :, :, slots]


def check_layers(layers: Sequence[int], total: int) -> None:
    """Raises UserError, one sentence, for a block that a model with `total` cross-attention blocks lacks."""
    wrong = [layer for layer in layers if not 0 <= layer < total]
    if wrong:
        raise UserError(f"alignment.layers: got {wrong[0]}, expected 0 to {total - 1}: the model has {total} blocks.")


def chosen_heads(heads: str | Sequence[int], total: int) -> list[int]:
    """Head numbers that `AlignmentConfig.heads` means for a model with `total` heads."""
    if heads == "all":
        return list(range(total))
    if heads == "half":
        return list(range(max(1, total // 2)))
    wrong = [head for head in heads if not 0 <= head < total]
    if wrong:
        raise UserError(f"alignment.heads: got {wrong[0]}, expected 0 to {total - 1}.")
    return list(heads)
