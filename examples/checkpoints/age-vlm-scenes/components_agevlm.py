"""The components of an AGE-VLM, which are trained or frozen as one; what is frozen is still, too: no dropout, and no running
statistics that follow the data."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


COMPONENTS = ("vision", "projector", "cross_attention", "language_model")

# In this order: the cross-attention lies inside the language model.
_MODULES = {"vision_tower": "vision", "multi_modal_projector": "projector", "cross_attention": "cross_attention"}


def component_of(parameter: str) -> str:
    """The component of a parameter, by its name in the model, with or without its head, wrapped by PEFT, DDP or neither."""
    names = parameter.split(".")
    return next((component for module, component in _MODULES.items() if module in names), "language_model")


def freeze_components(model: nn.Module, components: tuple[str, ...]) -> None:
    """Takes the gradients of the components' parameters, and puts their modules into evaluation mode.

    Raises:
        ValueError: one sentence, for a component that is not there.
    """
    for component in components:
        if component not in COMPONENTS:
            raise ValueError(f"freeze: got '{component}', expected some of {', '.join(COMPONENTS)}.")
    for name, parameter in model.named_parameters():
        if component_of(name) in components:
            parameter.requires_grad_(False)
    keep_frozen_still(model)


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
