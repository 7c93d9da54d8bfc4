"""LoRA and DoRA: which modules of an AGE-VLM to adapt. PEFT does the rest: wrapping, saving, loading, merging.

model = peft.get_peft_model(model, lora_config("cross_attention", rank=8))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from ..errors import UserError, one_of


_LAYER = r"(.*\.)?language_model\.layers\.\d+\."
LORA_TARGETS: dict[str, str] = {
    "cross_attention": _LAYER + r"cross_attention\.(attn|mlp)\.\w+_proj",
    "language_model": _LAYER + r"(self_attn|mlp)\.\w+_proj",
    "both": _LAYER + r"(cross_attention\.attn|cross_attention\.mlp|self_attn|mlp)\.\w+_proj",
}
"""Patterns for `target_modules`. The usual lists of names would not do: `q_proj` is in the language model, in the
cross-attention and in many a vision encoder. No pattern adapts the vision encoder."""

GATES = ("attn_gate", "mlp_gate")
"""For `modules_to_save`: how much of the images comes in, one number a branch of each cross-attention block."""


def lora_config(
    target: str = "cross_attention",
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    use_dora: bool = False,
    gates: bool = True,
    modules_to_save: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    **options: Any,
) -> LoraConfig:
    """A `LoraConfig` for `peft.get_peft_model`.

    Args:
        target: `cross_attention`, `language_model` or `both`, see `LORA_TARGETS`. With the cross-attention alone, answers
            to texts without an image stay those of the base model, bit for bit.
        alpha: the adapters count `alpha / rank`; twice the rank when left out.
        gates: whether the gates are trained, whole, and saved with the adapter.
        modules_to_save: what else is trained and saved whole, `multi_modal_projector` for example.
        layers: of the language model that are adapted, counted from 0; all when left out.
        options: other fields of `LoraConfig`.

    Raises:
        UserError: one sentence, for a target that is not there, a rank or alpha that is not positive, or a dropout that is
            no share.
    """
    if target not in LORA_TARGETS:
        raise UserError(f"target: got '{target}', expected {one_of(target, LORA_TARGETS)}.")
    if rank < 1:
        raise UserError(f"rank: got {rank}, expected at least 1.")
    alpha = 2 * rank if alpha is None else alpha
    if not alpha > 0:
        raise UserError(f"alpha: got {alpha}, expected more than 0.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout: got {dropout}, expected a share, from 0 to below 1.")
    modules = LORA_TARGETS[target]
    if layers is not None and target != "cross_attention":
        # Not PEFT's `layers_to_transform`, which takes no pattern, and would leave cross-attention out.
        chosen = "|".join(map(str, layers))
        modules = LORA_TARGETS["language_model"].replace(r"\d+", f"(?:{chosen})")
        if target == "both":
            modules = f"{LORA_TARGETS['cross_attention']}|{modules}"
    return LoraConfig(
        target_modules=modules,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        modules_to_save=[*(GATES if gates else ()), *modules_to_save] or None,
        **options,
    )


def language_model_factors(adapted: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """What the adapters of a language model are about to add to it when they are merged.

    Returns:
        Name of each weight (out, in) in the language model -> (rank, in) and (out, rank), whose product is added; None where
        it is no product, as of DoRA.
    """
    factors = {}
    for name, module in adapted.named_modules():
        inside = name.rpartition("language_model.")[2]
        if not getattr(module, "lora_A", None) or "cross_attention" in inside:
            continue
        (adapter,) = module.active_adapters
        if module.use_dora.get(adapter):
            return None
        first, second = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        factors[f"{inside}.weight"] = first.clone(), second * module.scaling[adapter]
    return factors
