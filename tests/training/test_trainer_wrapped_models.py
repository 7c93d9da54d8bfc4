"""Smoothed labels, virtual tokens and weight decay, of whole models and of those that PEFT or sharding wraps."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer

from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator
from age_vlm.modeling_agevlm.attention_maps_agevlm import attention_on_images
from age_vlm.training import AgeVlmTrainer
from age_vlm.training.alignment import alignment_losses
from age_vlm.training.lora import lora_config


VISION_CONFIG = {
    "model_type": "timm_wrapper",
    "architecture": "convnext_atto",
    "do_pooling": False,
    "model_args": {"features_only": True, "out_indices": [1], "depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]},
    "hidden_size": 16,
}


# Smoothed labels


def smoothed(logits, labels, epsilon=0.1):
    """Sum over the tokens that are learned, and how many these are: each is the next token of the one before."""
    return (
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=epsilon
        ),
        int((labels[:, 1:] != -100).sum()),
    )


def lora(model):
    return get_peft_model(model, lora_config("cross_attention", rank=2))


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["whole", "LoRA"])
@pytest.mark.parametrize("cls", [AgeVlmTrainer, Trainer])
def test_smoothed_labels_are_those_of_the_next_token(
    make_trainer, make_model, cls, wrap, eight_talks, alignment, without_masks, losses_of
):
    options = {
        "label_smoothing_factor": 0.1,
        "learning_rate": 0.0,
        "batch": 3,
        "talks": eight_talks[:6],
        "accumulation": 2,
    }
    trainer = make_trainer(cls=cls, model=wrap(make_model()), **options)
    total, tokens, aligned = 0.0, 0, []
    collator = (
        AgeVlmCollator(trainer.data_collator.processor, trainer.data_collator.grid, independent_turns=True)
        if (cls is AgeVlmTrainer)
        else trainer.data_collator
    )
    with torch.no_grad():
        for sample in eight_talks[:6]:
            batch = without_masks(collator([sample]))
            one, count = smoothed(trainer.model(**batch, use_cache=False).logits, batch["labels"])
            total, tokens = total + float(one), tokens + count
        if cls is AgeVlmTrainer:
            aligned = losses_of(trainer.model, collator, eight_talks[:6])[2]
    expected = total / tokens
    trainer.train()
    logged = trainer.state.log_history[0]
    if cls is AgeVlmTrainer:
        assert logged["lm_loss"] == pytest.approx(expected, rel=1e-4)
        expected += alignment.weight * float(aligned.mean())
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)


def test_smoothed_labels_do_not_depend_on_the_name_of_the_class(make_trainer, make_model):
    """Sharding (FSDP2) renames it."""
    model = make_model()
    model.__class__ = type("FSDPAgeVlm", (type(model),), {})
    options = {"label_smoothing_factor": 0.1, "learning_rate": 0.0}
    renamed, plain = make_trainer(model=model, **options), make_trainer(**options)
    for trainer in (renamed, plain):
        trainer.train()
    assert renamed.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]


# Prompt learning


def prompted(model, kind):
    config = {
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "p": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }[kind]
    return get_peft_model(model, config)


def text_options(model):
    """What PEFT reads of the configuration of a language model."""
    text = model.config.text_config
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"):
        setattr(model.config, name, getattr(text, name))
    return model


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["prompt", "p", "prefix"])
def test_virtual_tokens_do_not_move_what_is_aligned(make_trainer, make_model, kind, smoothing, eight_talks, alignment):
    model = prompted(text_options(make_model()), kind)
    trainer = make_trainer(
        model=model, independent=False, talks=[eight_talks[0], eight_talks[2], eight_talks[4]], learning_rate=0.0,
        label_smoothing_factor=smoothing,
    )  # fmt: skip
    batch = trainer.data_collator(trainer.train_dataset)
    grounding = {key: batch.pop(key) for key in GROUNDING_KEYS}
    everything = torch.cartesian_prod(torch.arange(3), torch.arange(batch["input_ids"].shape[1]))
    shift = 0 if kind == "prefix" else 5
    with torch.no_grad():
        outputs = model.eval()(**batch, cross_attention_queries=everything + torch.tensor([0, shift]), use_cache=False)
    maps = [each.unflatten(0, batch["input_ids"].shape) for each in outputs.cross_attention_maps]
    rows = grounding["grounding_queries"]
    attention = attention_on_images(
        [each[rows[:, 0], rows[:, 1]] for each in maps], grounding["grounding_slots"],
        grounding["grounding_coverage"].shape[-1], alignment.layers,
    )  # fmt: skip
    aligned = alignment_losses(attention, grounding["grounding_coverage"], alignment).mean()
    total, tokens = smoothed(outputs.logits[:, shift:], batch["labels"], smoothing)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["alignment_loss"] == pytest.approx(float(aligned), rel=1e-4)
    assert logged["lm_loss"] == pytest.approx(float(total / tokens), rel=1e-4)
    found = trainer.predict(trainer.train_dataset)
    assert found.predictions.shape[:2] == found.label_ids.shape


@pytest.mark.parametrize("kind", ["prompt", "p", "prefix"])
def test_packed_texts_are_refused_with_virtual_tokens(make_trainer, make_model, kind):
    model = prompted(text_options(make_model()), kind)
    with pytest.raises(ValueError, match="^position_ids: got packed texts with P.* of PEFT") as caught:
        make_trainer(model=model).train()
    assert "\n" not in str(caught.value)


# Weight decay


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["whole", "LoRA"])
def test_gates_and_layer_scales_do_not_decay(make_trainer, make_model, wrap):
    vision = {**VISION_CONFIG, "model_args": {**VISION_CONFIG["model_args"], "ls_init_value": 0.1}}
    model = wrap(make_model(vision_config=vision))
    trainer = make_trainer(model=model, weight_decay=0.1)
    decayed = set(trainer.get_decay_parameter_names(model))
    names = {name for name, _ in model.named_parameters()}
    scales = {name for name in names if name.endswith(".gamma")}
    gates = {name for name in names if "_gate." in name}
    assert scales and len(gates) >= 4 and not (scales | gates) & decayed
    assert any(name.endswith("q_proj.weight") or "lora_A" in name for name in decayed)
    assert any(".mlp.gate_proj." in name for name in decayed)  # a matrix of Llama's feed-forward, no gate of ours


@pytest.mark.parametrize("name", ["layer_scale_parameter", "layer_scale1.lambda1", "lambda_1", "ls1.gamma", "gamma_2"])
def test_every_name_of_a_layer_scale_is_known(make_trainer, name):
    *modules, last = name.split(".")
    part = torch.nn.Module()
    holder = part
    for module in modules:
        holder.add_module(module, torch.nn.Module())
        holder = getattr(holder, module)
    holder.register_parameter(last, torch.nn.Parameter(torch.ones(3)))
    assert make_trainer().get_decay_parameter_names(part) == []
