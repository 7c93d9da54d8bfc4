"""What is frozen is still: no dropout, and no running statistics that follow the data."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def keep_frozen_still(model: nn.Module) -> nn.Module:
    """Puts the modules of a model in training none of whose parameters learn into evaluation mode.

    A module without parameters, a dropout for example, goes with the one that it is in. Models, and layers that can be
    checkpointed, stay in training mode where gradients may have to come through them: without it nothing is checkpointed.
    """
    for name, child in model.named_children():
        parameters = list(child.parameters())
        if any(parameter.requires_grad for parameter in parameters):
            keep_frozen_still(child)
        elif parameters and name == "vision_tower":
            child.eval()  # nothing that learns is in front of it
        elif parameters:
            for module in child.modules():
                module.training = isinstance(module, (PreTrainedModel, GradientCheckpointingLayer)) and module.training
    return model
