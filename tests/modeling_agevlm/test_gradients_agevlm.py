"""Gradients and loss, with gradient checkpointing and without."""

import pytest
import torch


IMAGE_TOKEN_ID = 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("frozen_vision", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_batch, use_reentrant, frozen_vision, close):
    batch = make_batch((2, 0, 1))
    rows = torch.tensor([[0, 13], [2, 13], [1, 13]])
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if frozen_vision:
            model.model.vision_tower.requires_grad_(False)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.model.language_model.layers[1].gradient_checkpointing
            if use_reentrant:
                model.enable_input_require_grads()
        outputs = model(**batch, labels=batch["input_ids"], cross_attention_queries=rows)
        # Another weight for each image token, or softmax would make the sum a constant.
        weight = torch.arange(outputs.cross_attention_maps[0].shape[-1])
        loss = outputs.loss + sum((maps * weight).mean() for maps in outputs.cross_attention_maps)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        assert (expected is None) == (gradients[1][name] is None), name
        close(gradients[1][name], expected)
        assert expected.abs().max() > 0 or "timm_model.stages_" in name, name


def test_every_parameter_trains(make_model, make_batch):
    model = make_model().train()
    batch = make_batch((2, 1))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused, "data-parallel training fails on parameters without a gradient"


def test_loss_is_the_language_model_s(make_model, make_batch, language_model_of):
    model = make_model(cross_attention_gate_init=0.0)
    llama = language_model_of(model)
    batch = make_batch((1, 2))
    ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE_TOKEN_ID)
    labels = batch["input_ids"].masked_fill(ignored, -100)
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for extra in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(40)}):
        assert torch.equal(model(**batch, labels=labels, **extra).loss, llama(**text, labels=labels, **extra).loss)


def test_loss_over_micro_batches_is_the_loss_of_the_whole(model, make_batch, row_alone, close):
    batch = make_batch((1, 2, 0), seed=2)
    starts = batch["attention_mask"].argmax(-1)
    assert starts.max() > 0, "no row is padded"
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # The first token of a text is no target where it stands alone.
    labels[torch.arange(3), starts] = -100
    whole = model(**batch, labels=labels, num_items_in_batch=20).loss
    parts = 0
    for row in range(3):
        alone = row_alone(batch, row)
        parts = parts + model(**alone, labels=alone["input_ids"], num_items_in_batch=20).loss
    close(parts, whole)


@torch.no_grad()
def test_kept_logits_are_the_last_ones(model, make_batch, close):
    batch = make_batch((1, 0))
    everything = model(**batch).logits
    close(model(**batch, logits_to_keep=2).logits, everything[:, -2:])
    close(model(**batch, logits_to_keep=torch.tensor([0, 3])).logits, everything[:, [0, 3]])


CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


def kept_for_backward(model, batch) -> int:
    """Elements that the vision encoder's forward pass keeps for its backward pass."""
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_image_features(batch["pixel_values"])
    return kept


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"architecture": "convnext_atto", "model_args": {"depths": [2, 1, 1, 1], "dims": [8, 16, 16, 16]}},
        {"model_type": "clip_vision_model", "patch_size": 8, **CLIP},
    ],
    ids=["timm's feature maps", "timm", "transformers"],
)
def test_gradient_checkpointing_reaches_the_vision_encoder(make_model, make_batch, vision):
    batch = make_batch((2, 1))
    model = make_model(**({"vision_config": {"model_type": "timm_wrapper", **vision}} if vision else {})).train()
    without = kept_for_backward(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert kept_for_backward(model, batch) < 0.8 * without
    model.activation_checkpointing_disable()
    assert kept_for_backward(model, batch) == without
