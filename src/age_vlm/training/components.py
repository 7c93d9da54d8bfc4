"""The parts of an AGE-VLM that are trained or frozen as one, and which of them a parameter belongs to."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import nn


PARTS = ("vision", "projector", "cross_attention", "language_model")

# In this order: the cross-attention lies inside the language model.
_MODULES = {"vision_tower": "vision", "multi_modal_projector": "projector", "cross_attention": "cross_attention"}


def part_of(parameter: str) -> str:
    """The part of a parameter, by its name in the model, with or without its head, wrapped by PEFT, DDP or neither."""
    names = parameter.split(".")
    return next((part for module, part in _MODULES.items() if module in names), "language_model")


def count_parameters(model: nn.Module, *, trainable: bool = False) -> dict[str, int]:
    """Part -> number of its parameters, or of those that learn; shared ones count once."""
    counts = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable:
            counts[part_of(name)] += parameter.numel()
    return dict(counts)
