"""The processor of AGE-VLM."""

from .image_geometry_agevlm import ImageGeometry, image_geometry
from .image_settings_agevlm import whole_image_processor
from .processing_agevlm import AgeVlmProcessor


__all__ = ["AgeVlmProcessor", "ImageGeometry", "image_geometry", "whole_image_processor"]
