"""Training with the alignment loss."""

from ..configuration import AlignmentConfig
from .trainer import AgeVlmTrainer


__all__ = ["AgeVlmTrainer", "AlignmentConfig"]
