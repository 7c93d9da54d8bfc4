"""What is frozen is still in training: no dropout, no running statistics."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from age_vlm.training import AgeVlmTrainer
from age_vlm.training.lora import lora_config


RESNET = {
    "model_type": "timm_wrapper",
    "architecture": "resnet10t",
    "do_pooling": False,
    "model_args": {"features_only": True, "out_indices": [1]},
}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
}


def freeze(model, learns=lambda name: False):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name))
    return model


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def loop(model, batches):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in batches:
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_trainer(cls):
    def train(model, batches):
        arguments = TrainingArguments(
            max_steps=len(batches), per_device_train_batch_size=1, remove_unused_columns=False, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, output_dir="unused",
        )  # fmt: skip
        samples = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        cls(model, arguments, train_dataset=samples, data_collator=lambda items: items[0]).train()

    return train


@pytest.mark.parametrize(
    "train", [loop, by_trainer(Trainer), by_trainer(AgeVlmTrainer)], ids=["loop", "Trainer", "AgeVlmTrainer"]
)
def test_statistics_of_a_frozen_encoder_stand_still(make_model, make_batch, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = [make_batch((1, 2), seed=seed, size=(64, 64)) for seed in range(2)]
    model = make_model(vision_config=RESNET)
    learning = copy.deepcopy(model)
    before = buffers(model)
    assert any("running_mean" in name for name in before)
    freeze(model, lambda name: "vision_tower" not in name)
    train(model, batches)
    after = buffers(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    train(learning, batches)
    moved = [name for name, value in buffers(learning).items() if not torch.equal(value, before[name])]
    assert any("running_mean" in name for name in moved)


def outcome(model, batch, seed):
    torch.manual_seed(seed)
    return model.train()(**batch).logits.detach()


def draws(model, batch):
    """Whether what comes out depends on chance."""
    return not torch.equal(outcome(model, batch, 0), outcome(model, batch, 1))


def test_dropout_is_on_in_what_learns_alone(make_model, make_batch):
    """Encoder, language model and cross-attention, each with a dropout of its own: it draws where it learns."""
    batch = make_batch((1, 2))
    kinds = {
        "vision_tower": lambda name: "vision_tower" in name,
        "self_attn": lambda name: "self_attn" in name,
        "cross_attention": lambda name: "cross_attention" in name,
    }
    for learns in kinds.values():
        model = make_model(vision_config=VIT, text={"attention_dropout": 0.5})
        assert draws(freeze(model, learns), batch)
        assert not draws(freeze(model, lambda name: "multi_modal_projector" in name), batch)
    assert not draws(freeze(make_model(vision_config=VIT, text={"attention_dropout": 0.5})), batch)


def test_the_crossattention_has_the_dropout_of_the_language_model(make_model, make_batch):
    batch, text = make_batch((1, 2)), make_batch((0, 0))
    model = freeze(make_model(text={"attention_dropout": 0.5}), lambda name: "cross_attention" in name)
    assert draws(model, batch) and not draws(model, text)
    assert torch.equal(model.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_of_an_adapter_stays_on(make_model, make_batch, attention):
    batch = make_batch((1, 2))
    still = make_model(vision_config=VIT, text={"attention_dropout": 0.5}, attention=attention)
    model = get_peft_model(still, lora_config("cross_attention", rank=2, dropout=0.5, gates=False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    modules = dict(model.named_modules())
    dropouts = [module for name, module in modules.items() if name.endswith("lora_dropout.default")]
    model.train()
    assert dropouts and all(module.training for module in dropouts)
    assert not any(m.training for name, m in modules.items() if name.endswith(("self_attn", "base_layer")))
    assert draws(model, batch)
    model.eval()
    assert not any(module.training for module in modules.values())


def test_an_adapter_in_the_encoder_is_the_only_thing_that_moves_there(make_model):
    model = get_peft_model(
        make_model(vision_config=VIT), LoraConfig(r=2, target_modules=r".*vision_tower.*q_proj", lora_dropout=0.5)
    )
    model.train()
    tower = model.get_base_model().model.vision_tower
    for layer in (module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)):
        assert layer.training
    assert {type(module).__name__ for module in tower.modules() if module.training} & {"Dropout"}
    assert not any(m.training for n, m in tower.named_modules() if n.endswith(("mlp", "embeddings")))


@pytest.mark.parametrize("reentrant", [True, False])
def test_frozen_layers_are_still_checkpointed(make_model, make_batch, reentrant):
    """Gradients of the projector come through all of the language model."""
    batch, counts, gradients = make_batch((1, 2)), {}, {}
    for checkpointing in (False, True):
        model = freeze(make_model(text={"attention_dropout": 0.3}), lambda name: "multi_modal_projector" in name)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        calls = []
        for layer in model.model.language_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(None))
        model.train()
        assert model.training and model.model.training
        model(**batch, labels=batch["input_ids"]).loss.backward()
        counts[checkpointing] = len(calls)
        gradients[checkpointing] = model.model.multi_modal_projector.linear.weight.grad
    assert counts == {False: 4, True: 8}
    torch.testing.assert_close(gradients[True], gradients[False])


def test_what_learns_is_in_training_as_ever(make_model):
    model = make_model().train()
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in model.eval().modules())
