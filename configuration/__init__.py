"""Configuration of AGE-VLM and its presets."""

from .configuration_agevlm import AgeVlmConfig
from .presets import IMAGE_SIZES, PRESETS, preset_config


__all__ = ["IMAGE_SIZES", "PRESETS", "AgeVlmConfig", "preset_config"]
