"""What PEFT's prompt learning puts in front of a text, which a collator does not know of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import UserError


# Kind of PEFT's prompt learning -> whether its virtual tokens stand in the text itself. Those of others are in a cache.
_IN_TEXT = {"PROMPT_TUNING": True, "P_TUNING": True, "PREFIX_TUNING": False}


def virtual_tokens(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """By how many positions the text of a batch comes later in the model than in the batch.

    Args:
        model: wrapped by PEFT or not.
        batch: what the model is called with.

    Raises:
        UserError: one sentence, for a kind of prompt learning whose positions are not known, and for packed texts.
    """
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _IN_TEXT:
        raise UserError(f"model: got {kind} of PEFT, expected {', '.join(_IN_TEXT)} or an adapter such as LoRA.")
    if batch.get("position_ids") is not None:
        raise UserError(
            f"position_ids: got packed texts with {kind} of PEFT, which has virtual tokens in front of the first text only, "
            "expected one text a row (independent_turns=False, packing=False)."
        )
    return config.num_virtual_tokens if _IN_TEXT[kind] else 0
