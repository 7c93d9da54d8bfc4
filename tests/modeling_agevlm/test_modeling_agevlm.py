"""Forward passes: what stays the language model's, maps, the parts that transformers expects, bad input."""

import copy
import inspect
import re

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available

from age_vlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmModel


IMAGE_TOKEN_ID = 2


# What stays the language model's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_closed_gates_leave_the_language_model_bit_for_bit(make_model, make_batch, dtype, attention, language_model_of):
    model = make_model(dtype=dtype, attention=attention, cross_attention_gate_init=0.0)
    llama = language_model_of(model)
    batch = make_batch([2, 0, 1])
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model(**batch).logits, llama(**text).logits)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_text_alone_is_the_language_model_bit_for_bit_with_open_gates(model, make_batch, use_cache, language_model_of):
    batch = make_batch([0, 0])
    expected = language_model_of(model)(**batch, use_cache=use_cache)
    got = model(**batch, use_cache=use_cache)
    assert torch.equal(got.logits, expected.logits)
    assert got.cross_attention_maps is None


def test_text_alone_stays_so_while_the_rest_trains(make_model, make_batch, language_model_of):
    model = make_model(cross_attention_gate_init=0.0).train()
    before, text = copy.deepcopy(model), make_batch([0, 0], seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" not in name or ".cross_attention." in name)
    model.lm_head.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = make_batch([1, 2])
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.eval(), before.eval()
        assert not torch.equal(model(**batch).logits, before(**batch).logits)
        assert torch.equal(model(**text).logits, language_model_of(before)(**text).logits)


# Attention maps of named rows


@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@torch.no_grad()
def test_maps_are_the_full_attention_s_rows_under_every_backend(make_model, make_batch, visibility, close):
    batch = make_batch((2, 0, 1))
    rows = torch.tensor([[row, position] for row in range(3) for position in range(batch["input_ids"].shape[1])])
    eager = make_model(attention="eager", image_visibility=visibility)
    outputs = eager(**batch, cross_attention_queries=rows, output_attentions=True)
    assert len(outputs.cross_attentions) == len(outputs.cross_attention_maps) == 2
    assert len(outputs.attentions) == eager.config.text_config.num_hidden_layers
    sees = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    for row in range(3):
        sees[row] = (batch["input_ids"][row] == IMAGE_TOKEN_ID).cumsum(0) > 0
    assert sees.any() and not sees.all()
    for full, maps in zip(outputs.cross_attentions, outputs.cross_attention_maps):
        # The full weights of rows that see nothing are never used.
        full = full * sees[:, None, :, None]
        close(maps, full[rows[:, 0], :, rows[:, 1]])
        torch.testing.assert_close(maps.sum(-1), sees[rows[:, 0], rows[:, 1]][:, None].float().expand(-1, 4))
    # Flex attention compiles for half a minute: once is enough.
    for attention in ("sdpa", "flex_attention") if visibility == "latest" else ("sdpa",):
        other = make_model(attention=attention, image_visibility=visibility)
        got = other(**batch, cross_attention_queries=rows)
        close(got.logits[batch["attention_mask"].bool()], outputs.logits[batch["attention_mask"].bool()])
        for first, second in zip(got.cross_attention_maps, outputs.cross_attention_maps):
            close(first[batch["attention_mask"].flatten().bool()], second[batch["attention_mask"].flatten().bool()])


@torch.no_grad()
def test_asking_for_maps_changes_nothing_else(model, make_batch):
    batch = make_batch((2, 0, 1))
    rows = torch.tensor([[0, 3], [2, 5]])
    assert torch.equal(model(**batch, cross_attention_queries=rows).logits, model(**batch).logits)


# Parts that transformers expects


@torch.no_grad()
def test_image_features_are_raw_output_and_projected_tokens(model):
    pixels = torch.randn(2, 3, 32, 32)
    features = model.get_image_features(pixels)
    assert features.pooler_output.shape == (2, 16, 32)
    tower = model.model.vision_tower(pixels).last_hidden_state[-1]
    assert torch.equal(features.last_hidden_state, tower)
    assert features.hidden_states is None
    assert torch.equal(model.get_image_features(pixels, output_hidden_states=True).hidden_states[-1], tower)
    assert torch.equal(model.model.get_image_features(pixels).pooler_output, features.pooler_output)


def test_tied_head_follows_its_embeddings(make_model, tmp_path):
    model = make_model()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_untied_head_is_its_own(make_model, make_batch, tmp_path):
    model = make_model(text={"tie_word_embeddings": False})
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path)
    batch = make_batch((1,))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_gates_start_where_the_configuration_says(make_model):
    for start in (0.0, 0.5):
        model = make_model(cross_attention_gate_init=start)
        gates = [p for name, p in model.named_parameters() if "_gate." in name and "cross_attention" in name]
        assert len(gates) == 4 and all((gate == start).all() for gate in gates)


CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


@pytest.mark.parametrize(
    "changes", [{}, {"vision_config": {"model_type": "clip_vision_model", "patch_size": 8, **CLIP}}]
)
def test_weights_that_are_not_given_start_as_in_a_new_model(make_model, make_config, changes):
    new = make_model(**changes)
    empty = AgeVlmForConditionalGeneration.from_pretrained(None, config=make_config(**changes), state_dict={})
    for (name, expected), value in zip(new.named_parameters(), empty.parameters(), strict=True):
        if "timm_model" not in name:  # timm starts its own
            assert abs(value.norm() - expected.norm()) <= 0.25 * expected.norm(), name


@pytest.mark.parametrize("model_class", [AgeVlmModel, AgeVlmForConditionalGeneration])
def test_the_common_tests_of_transformers_leave_nothing_out(model_class):
    """They skip what a signature does not name, and the start of weights in files without a year."""
    keywords = inspect.signature(model_class.forward).parameters["kwargs"].annotation.__args__[0]
    assert "output_attentions" in keywords.__annotations__
    source = open(inspect.getfile(AgeVlmConfig), encoding="utf-8").read()
    assert int(re.search(r"^# Copyright (\d{4})", source, re.MULTILINE)[1]) >= 2023


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: {"pixel_values": b["pixel_values"][:2]}, ["pixel_values", "2 images", "3 image tokens"]),
        (lambda b: {"pixel_values": b["pixel_values"][0]}, ["pixel_values", "3 dimensions", "4"]),
        (lambda b: {"pixel_values": b["pixel_values"][:, :1]}, ["pixel_values", "1 channels", "3"]),
        (lambda b: {"pixel_values": b["pixel_values"][:0]}, ["pixel_values", "0 images", "3 image tokens"]),
        (lambda b: {"labels": b["input_ids"][:, 1:]}, ["labels", "(3, 13)", "(3, 14)"]),
        (lambda b: {"image_indices": torch.tensor([0])}, ["image_indices", "1", "3 image tokens"]),
        (lambda b: {"image_indices": torch.tensor([0, 1, 3])}, ["image_indices", "3", "3 images"]),
        (lambda b: {"image_indices": torch.tensor([0, -1, 1])}, ["image_indices", "-1", "3 images"]),
        (
            lambda b: {"cross_attention_queries": torch.tensor([[0, 14]])},
            ["cross_attention_queries", "[0, 14]", "3 x 14"],
        ),
        (
            lambda b: {"cross_attention_queries": torch.tensor([[3, 0]])},
            ["cross_attention_queries", "[3, 0]", "3 x 14"],
        ),
        (
            lambda b: {"cross_attention_queries": torch.tensor([[0, -1]])},
            ["cross_attention_queries", "[0, -1]", "3 x 14"],
        ),
        (lambda b: {"cross_attention_queries": torch.tensor([0, 1])}, ["cross_attention_queries", "(2,)", "(maps, 2)"]),
        (lambda b: {"inputs_embeds": torch.zeros(3, 14, 32)}, ["input_ids", "inputs_embeds", "exactly one"]),
        (lambda b: {"mm_encoder_outputs": {"image": object()}}, ["pixel_values", "mm_encoder_outputs", "both"]),
    ],
)
def test_bad_input_is_one_sentence(model, make_batch, change, words):
    batch = make_batch((2, 0, 1))
    for key in ("input_ids", "attention_mask"):
        batch[key] = torch.nn.functional.pad(
            batch[key], (14 - batch[key].shape[1], 0), value=6 if key == "input_ids" else 0
        )
    with pytest.raises(ValueError) as error:
        model(**{**batch, **change(batch)})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "make_cache",
    [
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=40),
        pytest.param(
            lambda config: QuantizedCache("hqq", config, nbits=8, q_group_size=8),
            marks=pytest.mark.skipif(not is_hqq_available(), reason="needs hqq"),
        ),
    ],
    ids=["dynamic", "static", "quantised"],
)
def test_a_cache_of_other_rows_is_one_sentence(model, make_batch, make_cache):
    cache = make_cache(model.config.text_config)
    with torch.no_grad():
        model(**make_batch((1, 0)), cache=cache)
    with pytest.raises(ValueError, match="cache: got a cache of 2 rows, expected 3"):
        model(input_ids=torch.full((3, 1), 9), cache=cache)
