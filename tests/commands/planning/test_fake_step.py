import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from age_vlm.commands.fit import training_arguments
from age_vlm.commands.planning.fake_step import (
    BACKWARD,
    BATCH,
    GRADIENTS,
    HEAD,
    KINDS,
    OPTIMIZER,
    PARAMETERS,
    UPDATE,
    fake_step,
    measure_step,
)
from age_vlm.commands.planning.model import PlannedModel
from age_vlm.commands.planning.peak_memory import PeakMemory
from age_vlm.commands.recipe import DataRecipe
from age_vlm.modeling_agevlm.components_agevlm import COMPONENTS
from age_vlm.training.trainer import AgeVlmTrainer


LENGTH = 48
ONE = {"one": {}}


def figures(recipe):
    planned = PlannedModel(recipe, length=LENGTH)
    return fake_step(planned.copy(), recipe, planned.batch(recipe.training.batch_size), ONE)


def activations(step) -> float:
    return sum(step.peaks["one"].get(kind, 0) for kind in (*COMPONENTS, HEAD, BACKWARD))


def real(recipe, tmp_path):
    """Trainer, prepared model and optimizer, and batch: the same without anything fake."""
    planned = PlannedModel(recipe, length=LENGTH)
    model, batch = planned.copy(), planned.batch(recipe.training.batch_size)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02)
    batch["pixel_values"] = torch.randn(batch["pixel_values"].shape)
    arguments = training_arguments(recipe.training, 0, tmp_path, progress=False)
    trainer = AgeVlmTrainer(model, arguments, alignment=recipe.alignment)
    trainer.state.max_steps = 10
    if recipe.training.gradient_checkpointing:
        model.activation_checkpointing_enable(arguments.activation_checkpointing_kwargs)
    trainer.create_optimizer()
    return trainer, *trainer.accelerator.prepare(model, trainer.optimizer), batch


RECIPES = {
    "all learns": {},
    "bf16, stage 2, accumulation": {
        "precision": "bf16",
        "vision": "frozen",
        "language_model": "frozen",
        "gradient_accumulation": 2,
    },
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"language_model": "lora", "cross_attention": "lora", "vision": "frozen"},
}


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request, make_recipe):
    return make_recipe(RECIPES[request.param])


@pytest.fixture(scope="module")
def fake(recipe):
    return figures(recipe)


def test_fake_tensors_need_what_real_ones_do(recipe, fake, tmp_path):
    trainer, model, optimizer, batch = real(recipe, tmp_path)
    step = measure_step(trainer, model, optimizer, batch, ONE)
    assert fake.forward == step.forward and fake.backward == step.backward
    assert set(fake.peaks["one"]) <= set(KINDS)
    assert sum(fake.peaks["one"].values()) == pytest.approx(sum(step.peaks["one"].values()), rel=0.005)
    for kind in (PARAMETERS, OPTIMIZER):
        assert fake.peaks["one"][kind] == step.peaks["one"][kind]


def test_operations_are_those_that_torch_counts(recipe, fake, tmp_path):
    trainer, model, _, batch = real(recipe, tmp_path)
    _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    with FlopCounterMode(display=False) as counter:
        trainer.training_step(model, batch, items)
    assert sum(fake.forward.values()) + fake.backward == counter.get_total_flops()
    assert all(fake.forward[kind] > 0 for kind in (*COMPONENTS, HEAD))


def test_state_is_that_of_the_parameters(recipe, fake):
    planned = PlannedModel(recipe, length=LENGTH)
    peak = fake.peaks["one"]
    held = {id(p): p.numel() * p.element_size() for p in (*planned.model.parameters(), *planned.model.buffers())}
    learning = sum(p.numel() * p.element_size() for p in planned.model.parameters() if p.requires_grad)
    steps = 4 * sum(p.requires_grad for p in planned.model.parameters())
    assert peak[PARAMETERS] == sum(held.values())
    assert peak[OPTIMIZER] == 2 * learning + steps
    if recipe.training.gradient_accumulation > 1:
        assert peak[GRADIENTS] == learning
    assert peak.get(BATCH, 0) > 0 and UPDATE not in peak


def test_what_is_saved_for_the_backward_pass_is_counted(make_recipe, tmp_path):
    """An account of its own: the storages that autograd keeps when the forward pass is over."""
    recipe = make_recipe({"batch_size": 4})
    trainer, model, _, batch = real(recipe, tmp_path)
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), *batch.values())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
    held = sum(saved.values())
    assert loss.requires_grad
    # At the peak also what an operation is just making, and gradients of activations, are there.
    assert held < activations(figures(recipe)) < 1.3 * held


def test_twice_the_batch_is_twice_the_activations_and_operations(make_recipe):
    small, large = (figures(make_recipe({"batch_size": size})) for size in (2, 4))
    assert activations(large) == pytest.approx(2 * activations(small), rel=0.05)
    assert large.backward == 2 * small.backward
    assert sum(large.forward.values()) == 2 * sum(small.forward.values())


def test_frozen_parts_cost_no_backward_pass_below_what_learns(make_recipe):
    every = figures(make_recipe())
    later = figures(make_recipe({"vision": "frozen"}))
    head = figures(make_recipe({"vision": "frozen", "projector": "frozen", "language_model": "frozen"}))
    assert every.forward == later.forward == head.forward
    # Both gradients of each of the encoder's products, but for that of the images.
    assert every.backward - later.backward > 1.5 * every.forward["vision"]
    assert head.backward < later.backward
    assert later.peaks["one"].get("vision", 0) < 0.1 * every.peaks["one"]["vision"]


def test_checkpointing_trades_memory_for_a_second_forward_pass(make_recipe):
    kept = figures(make_recipe({"batch_size": 8}))
    again = figures(make_recipe({"batch_size": 8, "gradient_checkpointing": True}))
    assert again.forward == kept.forward
    assert 0.5 < (again.backward - kept.backward) / sum(kept.forward.values()) <= 1
    assert activations(again) < 0.8 * activations(kept)


def test_nothing_is_kept_alive_by_being_looked_at(make_recipe, tmp_path):
    """Hooks that hold tensors would undo checkpointing, in the real step as in the fake one."""
    recipe = make_recipe({"batch_size": 8, "gradient_checkpointing": True})
    trainer, model, _, batch = real(recipe, tmp_path)
    _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    model.train()
    memory = PeakMemory(ONE)
    memory.count_as(PARAMETERS, *model.parameters(), *model.buffers())
    memory.count_as(BATCH, *batch.values())
    with memory:
        trainer.training_step(model, batch, items)
    held = (PARAMETERS, OPTIMIZER, BATCH)
    made, bare = (
        sum(size for kind, size in peaks["one"].items() if kind not in held)
        for peaks in (figures(recipe).peaks, memory.peaks)
    )
    assert made == pytest.approx(bare, rel=0.02)


def test_fp16_is_planned_without_an_accelerator(make_recipe):
    half, brain = (figures(make_recipe({"precision": precision})) for precision in ("fp16", "bf16"))
    assert half == brain


def test_batches_of_real_data(make_recipe):
    recipe = make_recipe()
    recipe = dataclasses.replace(recipe, data=DataRecipe(train=3, validation=1, test=1))
    planned = PlannedModel(recipe)
    batch = planned.batch(5)
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 5 and "image_indices" in batch
    assert "3 samples" in planned.source_of_text
    step = fake_step(planned.copy(), recipe, batch, ONE)
    assert step.forward["vision"] > 0


def test_packed_batches_are_planned_as_they_are_trained(make_recipe):
    data = DataRecipe(train=40, validation=1, test=1, texts=["caption"])
    padded, packed = (
        dataclasses.replace(make_recipe({"packing": packing, "independent_turns": False}), data=data)
        for packing in (False, True)
    )
    batches = [PlannedModel(recipe).batch(40) for recipe in (padded, packed)]
    sizes = [batch["input_ids"].numel() for batch in batches]
    assert sizes[1] < sizes[0]
    assert len({int((batch["labels"] != -100).sum()) for batch in batches}) == 1
    planned = PlannedModel(packed)
    step = fake_step(planned.copy(), packed, batches[1], ONE)
    assert step.forward["vision"] > 0
    assumed = PlannedModel(packed, length=LENGTH).batch(3)
    assert "position_ids" in assumed and "attention_mask" not in assumed
