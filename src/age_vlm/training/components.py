"""How large the components of a model are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..modeling_agevlm.components_agevlm import COMPONENTS, component_of


if TYPE_CHECKING:
    from torch import nn


def count_parameters(model: nn.Module, *, trainable: bool = False) -> dict[str, int]:
    """Component -> number of its parameters, or of those that learn; shared ones count once."""
    counts = Counter(dict.fromkeys(COMPONENTS, 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable:
            counts[component_of(name)] += parameter.numel()
    return dict(counts)
