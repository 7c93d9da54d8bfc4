"""One optimizer step of a recipe without its weights: the real model and trainer on fake tensors, which have shapes alone."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import TrainingArguments

from ...modeling_agevlm import AgeVlmForConditionalGeneration
from ...modeling_agevlm.components_agevlm import COMPONENTS, component_of
from ...training.trainer import AgeVlmTrainer
from ..fit import training_arguments
from ..recipe import Recipe
from .peak_memory import PeakMemory


PARAMETERS, GRADIENTS, OPTIMIZER, BATCH = "parameters", "gradients", "optimizer states", "batch"
HEAD, BACKWARD, UPDATE = "logits and loss", "backward pass", "optimizer step"
# The name of a component stands for its activations.
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, BATCH, *COMPONENTS, HEAD, BACKWARD, UPDATE)


@dataclass(frozen=True)
class StepFigures:
    """
    Attributes:
        peaks: as of `PeakMemory`, bytes.
        forward: component, or `logits and loss` -> floating point operations of one forward pass over the batch.
        backward: operations of its backward pass, and of what checkpointing computes once more for it.
    """

    peaks: dict[str, dict[str, float]]
    forward: dict[str, float]
    backward: float


class _InPlace(TrainingArguments):
    place_model_on_device = False  # fake weights are made on their device, and cannot be moved


class _Operations(TorchDispatchMode):
    """`FlopCounterMode` without its hooks on modules: these keep alive what checkpointing would let go (torch 2.15)."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def fake_step(
    model: AgeVlmForConditionalGeneration,
    recipe: Recipe,
    batch: Mapping[str, torch.Tensor],
    shares: Mapping[str, Mapping[str, float]],
) -> StepFigures:
    """The step after the first, so that the optimizer has its states: the last forward and backward pass and the update.

    Weights, images and all that is computed from them are fake. Token ids, and what follows from them, are real: the
    model reads the positions of its images out of them.

    Args:
        model: on the meta device, its parameters frozen as the recipe says; it is made fake in place.
        batch: as the collator gives it.
        shares: as of `PeakMemory`, by the kinds above.
    """
    # A CPU refuses fp16; bf16 takes as many bytes.
    precision = "bf16" if recipe.training.precision == "fp16" else recipe.training.precision
    training = dataclasses.replace(recipe.training, precision=precision, report_to=[])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = training_arguments(training, recipe.seed, folder, progress=False, kind=_InPlace)
        with fake:
            model.to_empty(device=arguments.device)
        model.tie_weights()
        trainer = AgeVlmTrainer(
            model, arguments, alignment=recipe.alignment, learning_rates=recipe.training.learning_rates
        )
        trainer.state.max_steps = training.steps
        if training.gradient_checkpointing:
            model.activation_checkpointing_enable(arguments.activation_checkpointing_kwargs)
        trainer.create_optimizer()
        wrapped, optimizer = trainer.accelerator.prepare(model, trainer.optimizer, device_placement=[False, False])
        if "pixel_values" in batch:
            with fake:
                batch = {**batch, "pixel_values": torch.empty(batch["pixel_values"].shape)}
        return measure_step(trainer, wrapped, optimizer, batch, shares)


def measure_step(
    trainer: AgeVlmTrainer,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, torch.Tensor],
    shares: Mapping[str, Mapping[str, float]],
) -> StepFigures:
    """As `fake_step`, of a model and optimizer as the trainer's accelerator has prepared them; they may be real."""
    memory = PeakMemory(shares)
    operations = _Operations()
    forward: dict[str, float] = {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    memory.count_as(PARAMETERS, *model.parameters(), *model.buffers())
    memory.count_as(BATCH, *batch.values())
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: memory.count_as(GRADIENTS, parameter.grad))
        for parameter in trainable
    ]
    hooks += _name_kinds(model, memory, operations, forward)
    try:
        # A step on gradients of zeros: the optimizer makes its states.
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        memory.count_as(GRADIENTS, *(parameter.grad for parameter in trainable))
        optimizer.step()
        memory.count_as(OPTIMIZER, *_tensors(trainer.optimizer))
        if trainer.args.gradient_accumulation_steps == 1:
            optimizer.zero_grad()
        model.train()
        _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        with memory, operations:
            with memory.kind(BACKWARD):
                trainer.training_step(model, batch, items)
            backward = operations.total - sum(forward.values())
            with memory.kind(UPDATE):
                trainer.accelerator.clip_grad_norm_(trainable, trainer.args.max_grad_norm)
                optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    return StepFigures(memory.peaks, forward, backward)


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def _name_kinds(model, memory: PeakMemory, operations: _Operations, forward: dict[str, float]) -> list:
    """Hooks by which what a module makes is of its component's kind, also where checkpointing runs it again in the backward
    pass, and by which the operations of the first forward pass are counted."""
    hooks, counted = [], [0]
    whole = False

    def count(kind: str) -> None:
        if not whole:
            forward[kind] = forward.get(kind, 0) + operations.total - counted[0]
            counted[0] = operations.total

    kinds: list[str] = []
    for name, module in model.named_modules():
        component = component_of(f"{name}.weight")
        inside = component != "language_model" or "language_model" in name.split(".")
        kind = component if inside else HEAD

        def before(module, inputs, kind=kind):
            if kinds:
                count(kinds[-1])
            kinds.append(kind)
            memory.enter(kind)

        def after(module, inputs, outputs, kind=kind):
            nonlocal whole
            count(kind)
            kinds.pop()
            memory.leave()
            whole = whole or module is model

        hooks.append(module.register_forward_pre_hook(before))
        # Recomputation stops by an exception once it has what it needs.
        hooks.append(module.register_forward_hook(after, always_call=True))
    return hooks
