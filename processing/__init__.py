"""The processor of AGE-VLM."""

from .image_geometry_agevlm import ImageGeometry, image_geometry
from .processing_agevlm import AgeVlmProcessor, whole_image_processor


__all__ = ["AgeVlmProcessor", "ImageGeometry", "image_geometry", "whole_image_processor"]
