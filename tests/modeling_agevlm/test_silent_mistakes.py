"""Inputs that once trained or answered wrongly without a word."""

import pytest
import torch
import torch.nn.functional as F

from age_vlm import AgeVlmForConditionalGeneration


IMAGE_TOKEN_ID = 2


def close(first, second):
    torch.testing.assert_close(first, second, atol=2e-4 * max(second.abs().max().item(), 1.0), rtol=0)


# Packed texts


@pytest.fixture
def packed(make_batch, row_alone):
    """Two texts with an image each, as one row, and each alone."""
    batch = make_batch((1, 1), seed=3)
    texts = [row_alone(batch, row) for row in (0, 1)]
    row = {
        "input_ids": torch.cat([text["input_ids"] for text in texts], dim=1),
        "pixel_values": batch["pixel_values"],
        "position_ids": torch.cat([torch.arange(text["input_ids"].shape[1]) for text in texts])[None],
    }
    return row, texts


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
@torch.no_grad()
def test_packed_texts_do_not_see_each_other_when_evaluated_or_with_a_cache(make_model, packed, settings, attention):
    model = make_model(attention=attention)
    row, texts = packed
    outputs = model(**row, **settings)
    close(outputs.logits, torch.cat([model(**text).logits for text in texts], dim=1))
    assert outputs.cache is None, "what came next would see both"


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_packed_texts_with_a_cache_of_the_caller_are_refused(model, packed, make_cache, kind):
    with pytest.raises(ValueError, match="position_ids: got positions that restart, packed texts, with a cache"):
        model(**packed[0], cache=make_cache(kind, model))


@torch.no_grad()
def test_positions_that_go_on_are_one_text(model, make_batch):
    batch = make_batch((1,))
    length = batch["input_ids"].shape[1]
    del batch["attention_mask"]
    outputs = model(**batch, position_ids=torch.arange(length)[None], use_cache=True)
    close(outputs.logits, model(**batch).logits)
    assert outputs.cache.get_seq_length() == length


# The image token


def test_the_image_token_is_not_learned(model, make_batch):
    batch = make_batch((1, 2), side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    outputs = model(**batch, labels=labels)
    kept = labels[:, 1:].flatten().clone()
    assert (kept == IMAGE_TOKEN_ID).any()
    kept[kept == IMAGE_TOKEN_ID] = -100
    close(outputs.loss, F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), kept))


@pytest.fixture
def twin(make_model):
    """A model in which token 50 has the embedding of the image token, as unused tokens of a Llama have."""
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = model.get_input_embeddings().weight[IMAGE_TOKEN_ID]
    return model


@torch.no_grad()
def test_embeddings_that_do_not_tell_an_image_are_refused(twin, make_batch):
    batch = make_batch((1, 1))
    ids = batch.pop("input_ids")
    batch["inputs_embeds"] = twin.get_input_embeddings()(ids)
    with pytest.raises(
        ValueError, match="inputs_embeds: got the embedding of the image token, 2, which other tokens share"
    ):
        twin(**batch)
    with pytest.raises(ValueError, match="inputs_embeds: got the embedding of the image token"):
        twin.generate(**batch, max_new_tokens=2)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_a_mask_says_which_embeddings_are_images(twin, make_batch, beams):
    batch = make_batch((2, 0, 1))
    ids = batch["input_ids"]
    ids[:, -1] = 50  # text, and yet embedded as an image is
    embeds = {**batch, "inputs_embeds": twin.get_input_embeddings()(ids), "image_token_mask": ids == IMAGE_TOKEN_ID}
    del embeds["input_ids"]
    assert torch.equal(twin(**embeds).logits, twin(**batch).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    answer = twin.generate(**batch, **settings)[:, ids.shape[1] :]
    assert torch.equal(twin.generate(**embeds, **settings), answer)


def test_a_mask_of_another_shape_is_one_sentence(model, make_batch):
    batch = make_batch((1, 1))
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match=r"image_token_mask: got shape \(2, 3\), expected that of the text"):
        model(**batch, inputs_embeds=embeds, image_token_mask=torch.zeros(2, 3, dtype=torch.bool))


# Precision


def gates(model):
    blocks = [layer.cross_attention for layer in model.model.language_model.layers if hasattr(layer, "cross_attention")]
    return [gate.weight for block in blocks for gate in (block.attn_gate, block.mlp_gate)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_keep_float32_however_a_model_is_halved(make_model, make_batch, tmp_path, dtype):
    model = make_model()
    with torch.no_grad():
        for gate in gates(model):
            gate.fill_(0.123456789)
    model.save_pretrained(tmp_path)
    halved = [
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype),
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path).to(dtype),
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path).to("cpu", dtype),
        getattr(
            AgeVlmForConditionalGeneration.from_pretrained(tmp_path),
            {"bfloat16": "bfloat16", "float16": "half"}[str(dtype)[6:]],
        )(),
    ]
    for each in halved:
        assert len(gates(each)) == 4
        for gate, whole in zip(gates(each), gates(model)):
            assert gate.dtype == torch.float32 and torch.equal(gate, whole)
        assert each.lm_head.weight.dtype == dtype
        assert each(**make_batch((1, 0))).logits.dtype == dtype
