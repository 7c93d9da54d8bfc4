"""Configuration of AGE-VLM and its presets."""

from .alignment_agevlm import AlignmentConfig
from .configuration_agevlm import AgeVlmConfig
from .presets import IMAGE_SIZES, PRESETS, preset_config


__all__ = ["IMAGE_SIZES", "PRESETS", "AgeVlmConfig", "AlignmentConfig", "preset_config"]
