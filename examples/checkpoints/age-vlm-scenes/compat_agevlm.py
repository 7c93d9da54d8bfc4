"""All that depends on which transformers this runs on: what the rest of the checkpoint code takes from outside transformers'
documented names, and the private hooks that it overrides.

A release that moves or renames one of these is mended here. `configuration/versions_agevlm.py` says which releases were
tested; `tests/test_private_hooks.py` fails where a hook or its signature changes.
"""

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


# Callers from before transformers 5.24, PEFT 0.21 among them, say `past_key_values`; transformers takes it until 5.40.
accepts_old_cache_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")

# `label_smoothing_factor` of transformers' `Trainer` compares a prediction with the next token for classes that are named
# here, and with the token that it was made from for all others. transformers' server looks among those with images first.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("age_vlm", "AgeVlmForConditionalGeneration")
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("age_vlm", "AgeVlmForConditionalGeneration")

__all__ = ["accepts_old_cache_name", "capture_outputs", "merge_with_config_defaults"]
