"""All that depends on which transformers this runs on: what the rest of the checkpoint code takes from outside transformers'
documented names, and the private hooks that it overrides.

A release that moves or renames one of these is mended here. `configuration/versions_agevlm.py` says which releases were
tested; `tests/test_private_hooks.py` fails where a hook or its signature changes.
"""

from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


# Callers from before transformers 5.24, PEFT 0.21 among them, say `past_key_values`; transformers takes it until 5.40.
accepts_old_cache_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")

__all__ = ["accepts_old_cache_name", "capture_outputs", "merge_with_config_defaults"]
