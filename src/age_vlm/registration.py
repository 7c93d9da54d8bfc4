"""Makes AGE-VLM known to transformers' Auto classes and pipelines."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration import AgeVlmConfig
from .modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmModel
from .processing import AgeVlmProcessor


def register() -> None:
    AutoConfig.register(AgeVlmConfig.model_type, AgeVlmConfig, exist_ok=True)
    AutoModel.register(AgeVlmConfig, AgeVlmModel, exist_ok=True)
    AutoModelForImageTextToText.register(AgeVlmConfig, AgeVlmForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(AgeVlmConfig, AgeVlmProcessor, exist_ok=True)
