"""AGE-VLM for the Hugging Face stack.

Importing this package registers AGE-VLM with transformers' Auto classes; the toolkit is imported when asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .configuration import AgeVlmConfig, AlignmentConfig, preset_config
from .modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmModel
from .processing import AgeVlmProcessor
from .registration import register


if TYPE_CHECKING:
    from .training import AgeVlmTrainer

__version__ = "0.1.0"
__all__ = [
    "AgeVlmConfig",
    "AgeVlmForConditionalGeneration",
    "AgeVlmModel",
    "AgeVlmProcessor",
    "AgeVlmTrainer",
    "AlignmentConfig",
    "__version__",
    "preset_config",
]

register()


def __getattr__(name: str):
    if name == "AgeVlmTrainer":
        return import_module(f"{__name__}.training").AgeVlmTrainer
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
