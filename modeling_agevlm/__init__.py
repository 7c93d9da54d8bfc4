"""The network of AGE-VLM."""

from .modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmModel, AgeVlmPreTrainedModel


__all__ = ["AgeVlmForConditionalGeneration", "AgeVlmModel", "AgeVlmPreTrainedModel"]
