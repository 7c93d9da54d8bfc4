"""Training with the alignment loss."""

from .alignment import FORMS, AlignmentConfig
from .trainer import AgeVlmTrainer


__all__ = ["FORMS", "AgeVlmTrainer", "AlignmentConfig"]
