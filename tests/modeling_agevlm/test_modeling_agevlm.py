"""Forward passes: what stays the language model's, who sees which image, maps, gradients, loss, bad input."""

import copy
import inspect
import re

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available

from age_vlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmModel
from age_vlm.modeling_agevlm.modeling_agevlm import logger


IMAGE_TOKEN_ID = 2
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.15, torch.float16: 0.03}


def close(first, second, dtype=torch.float32):
    scale = second.float().abs().max().item()
    torch.testing.assert_close(
        first.float(), second.float(), atol=TOLERANCE[dtype] * max(scale, 1.0), rtol=0, equal_nan=False
    )


def language_model_of(model: AgeVlmForConditionalGeneration) -> LlamaForCausalLM:
    """A plain Llama with the same weights."""
    llama = LlamaForCausalLM(copy.deepcopy(model.config.text_config)).to(model.dtype)
    weights = {
        f"model.{name}": value
        for name, value in model.model.language_model.state_dict().items()
        if ".cross_attention." not in name
    }
    llama.load_state_dict({**weights, "lm_head.weight": model.lm_head.weight})
    return llama.eval()


@pytest.fixture
def looks(model, make_batch):
    """Guards every test below: in the shared model, another image gives clearly other logits."""
    batch = make_batch([1])
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0, -1)}
    with torch.no_grad():
        assert (model(**batch).logits - model(**other).logits).abs().max() > 0.1


# What stays the language model's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_closed_gates_leave_the_language_model_bit_for_bit(make_model, make_batch, dtype, attention):
    model = make_model(dtype=dtype, attention=attention, cross_attention_gate_init=0.0)
    llama = language_model_of(model)
    batch = make_batch([2, 0, 1])
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model(**batch).logits, llama(**text).logits)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_text_alone_is_the_language_model_bit_for_bit_with_open_gates(model, make_batch, use_cache):
    batch = make_batch([0, 0])
    expected = language_model_of(model)(**batch, use_cache=use_cache)
    got = model(**batch, use_cache=use_cache)
    assert torch.equal(got.logits, expected.logits)
    assert got.cross_attention_maps is None


def test_text_alone_stays_so_while_the_rest_trains(make_model, make_batch):
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


# Who sees which image


@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch(make_model, make_batch, row_alone, looks, visibility, side):
    model = make_model(image_visibility=visibility)
    for seed, images in enumerate([(2, 0, 1), (0, 3), (1, 1, 0, 2)]):
        batch = make_batch(images, seed=seed, side=side)
        logits = model(**batch).logits
        for row in range(len(images)):
            kept = batch["attention_mask"][row].bool()
            close(logits[row, kept], model(**row_alone(batch, row)).logits[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch_in_half_precision(make_model, make_batch, row_alone, dtype):
    model = make_model(dtype=dtype)
    batch = make_batch((2, 0, 1))
    logits = model(**batch).logits
    for row in range(3):
        close(logits[row, batch["attention_mask"][row].bool()], model(**row_alone(batch, row)).logits[0], dtype)


@torch.no_grad()
def test_only_the_latest_image_counts(model, make_model, looks):
    ids = torch.tensor([[9, IMAGE_TOKEN_ID, 20, 21, IMAGE_TOKEN_ID, 22]])
    pixels = torch.randn(2, 3, 32, 32)
    first_changed = torch.stack([pixels[0].flip(-1), pixels[1]])

    def rows_that_differ(model):
        difference = model(ids, pixels).logits - model(ids, first_changed).logits
        return (difference[0].abs().amax(-1) > 1e-3).tolist()

    # The text between the two images sees the first, and later text sees that text.
    assert rows_that_differ(model)[:4] == [False, True, True, True]
    latest, all_previous = make_model(), make_model(image_visibility="all_previous")
    rows = torch.tensor([[0, position] for position in range(6)])
    for model, expected in (
        (latest, [[], [0], [0], [0], [1], [1]]),
        (all_previous, [[], [0], [0], [0], [0, 1], [0, 1]]),
    ):
        for maps in model(ids, pixels, cross_attention_queries=rows).cross_attention_maps:
            mass = maps.unflatten(-1, (2, -1)).sum(-1)
            got = [sorted(set((row > 0).any(0).nonzero().flatten().tolist())) for row in mass]
            assert got == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_before_an_image_get_exactly_nothing_forward_and_backward(make_model, dtype, attention):
    model = make_model(dtype=dtype, attention=attention)
    ids = torch.tensor([[20, 21, 22, IMAGE_TOKEN_ID, 23, 24], [6, 6, 25, 26, 27, 28]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    pixels = torch.randn(1, 3, 32, 32, dtype=dtype, requires_grad=True)
    outputs = model(ids, pixels, attention_mask=mask)
    with torch.no_grad():
        llama = language_model_of(model)
        llama.config._attn_implementation = attention
        expected = llama(ids, attention_mask=mask).logits
    before = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    assert torch.equal(outputs.logits[before], expected[before])
    (pixel_gradient,) = torch.autograd.grad(outputs.logits[before].float().sum(), pixels, retain_graph=True)
    assert torch.equal(pixel_gradient, torch.zeros_like(pixel_gradient))
    outputs.logits.float().logsumexp(-1).mean().backward()
    assert pixels.grad.abs().max() > 0
    assert outputs.logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flex_attention_before_an_image_is_finite(make_model, dtype):
    # Torch has its backward pass on accelerators alone.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, reference = (make_model(dtype=dtype, attention=name).to(device) for name in ("flex_attention", "sdpa"))
    ids = torch.tensor([[20, 21, 22, IMAGE_TOKEN_ID, 23, 24], [6, 6, 25, 26, 27, 28]], device=device)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]], device=device)
    pixels = torch.randn(1, 3, 32, 32, dtype=dtype, device=device)
    # Compiling takes longer than all other tests here, and the masks are the same without.
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(device == "cuda"):
        logits = model(ids, pixels, attention_mask=mask).logits
        if device == "cuda":
            logits.float().logsumexp(-1).mean().backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert logits.isfinite().all()
    close(logits[mask.bool()], reference(ids, pixels, attention_mask=mask).logits[mask.bool()], dtype)


def test_image_of_another_row_is_nothing(model, make_batch, looks):
    batch = make_batch((1, 1))
    pixels = batch["pixel_values"].clone().requires_grad_()
    model(**{**batch, "pixel_values": pixels}).logits[0].square().sum().backward()
    assert pixels.grad[0].abs().max() > 0
    assert torch.equal(pixels.grad[1], torch.zeros_like(pixels.grad[1]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@torch.no_grad()
def test_packed_texts_are_the_texts_alone(make_model, visibility, attention):
    model = make_model(image_visibility=visibility, attention=attention)
    texts = [[20, IMAGE_TOKEN_ID, 21, 22], [23, 24, 25], [IMAGE_TOKEN_ID, 26, IMAGE_TOKEN_ID, 27]]
    pixels = torch.randn(2, 3, 32, 32)
    shared = [0, 1, 0]
    packed = model(
        torch.tensor([sum(texts, [])]),
        pixels,
        position_ids=torch.tensor([[position for text in texts for position in range(len(text))]]),
        image_indices=torch.tensor(shared),
        use_cache=False,
    ).logits[0]
    alone = []
    for text in texts:
        count = text.count(IMAGE_TOKEN_ID)
        mine, shared = shared[:count], shared[count:]
        alone.append(model(torch.tensor([text]), pixels[mine] if mine else None).logits[0])
    close(packed, torch.cat(alone))


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@torch.no_grad()
def test_a_shared_image_is_its_copies(make_model, make_batch, looks, visibility, attention, use_cache):
    model = make_model(image_visibility=visibility, attention=attention)
    # In the first row one image is named twice beside another one.
    batch = make_batch((3, 0, 2))
    model_pixels = batch.pop("pixel_values")[:3]
    pixels, shared = model_pixels[:2], torch.tensor([0, 1, 0, 1, 1])
    rows = torch.tensor([[row, batch["input_ids"].shape[1] - 1] for row in range(3)])
    if visibility == "all_previous" and not use_cache:
        # Its tokens would count once where they are two; a cache has an image for each token.
        with pytest.raises(
            ValueError, match="^image_indices: got one image for two image tokens of a text, expected cop"
        ):
            model(**batch, pixel_values=pixels, image_indices=shared, use_cache=use_cache)
        pixels, shared = model_pixels, torch.tensor([0, 1, 2, 0, 1])
    expected = model(**batch, pixel_values=pixels[shared], cross_attention_queries=rows)
    got = model(**batch, pixel_values=pixels, image_indices=shared, use_cache=use_cache, cross_attention_queries=rows)
    close(got.logits, expected.logits)
    for mine, copies in zip(got.cross_attention_maps, expected.cross_attention_maps):
        # Whichever of its copies they fall on, the attention on each place of an image is the same.
        places = pixels.shape[-2:].numel() // 64
        close(*(maps.unflatten(-1, (-1, places)).sum(-2) for maps in (mine, copies)))


@torch.no_grad()
def test_embeddings_in_the_place_of_ids(model, make_batch, looks):
    batch = make_batch((2, 0, 1))
    expected = model(**batch).logits
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model(**batch, inputs_embeds=embeddings).logits, expected)


@torch.no_grad()
def test_encoded_images_in_the_place_of_pixels(model, make_batch, looks):
    batch = make_batch((2, 0, 1))
    expected = model(**batch).logits
    encoded = model.get_image_features(batch.pop("pixel_values"), return_dict=True)
    assert torch.equal(model(**batch, mm_encoder_outputs={"image": encoded}).logits, expected)


@torch.no_grad()
def test_no_images_for_image_tokens_warns_and_reads_text(model, make_batch, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning_once.cache_clear()
    batch = make_batch((1,))
    del batch["pixel_values"]
    assert torch.equal(model(**batch).logits, language_model_of(model)(**batch).logits)
    assert "no images" in caplog.text


@torch.no_grad()
def test_an_empty_stack_of_images_is_none(model, make_batch):
    batch = make_batch((0, 0))
    assert torch.equal(model(**batch, pixel_values=torch.zeros(0, 3, 32, 32)).logits, model(**batch).logits)


@pytest.mark.parametrize("size", [(32, 48), (64, 40)])
@torch.no_grad()
def test_images_need_not_be_square(model, make_batch, size):
    batch = make_batch((1, 1), size=size)
    outputs = model(**batch)
    assert outputs.image_outputs.pooler_output.shape[1] == (size[0] // 8) * (size[1] // 8)
    assert outputs.logits.isfinite().all()


# Attention maps of named rows


@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@torch.no_grad()
def test_maps_are_the_full_attention_s_rows_under_every_backend(make_model, make_batch, visibility):
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


# Gradients and loss


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("frozen_vision", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_batch, use_reentrant, frozen_vision):
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


def test_loss_is_the_language_model_s(make_model, make_batch):
    model = make_model(cross_attention_gate_init=0.0)
    llama = language_model_of(model)
    batch = make_batch((1, 2))
    ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE_TOKEN_ID)
    labels = batch["input_ids"].masked_fill(ignored, -100)
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for extra in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(40)}):
        assert torch.equal(model(**batch, labels=labels, **extra).loss, llama(**text, labels=labels, **extra).loss)


def test_loss_over_micro_batches_is_the_loss_of_the_whole(model, make_batch, row_alone):
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
def test_kept_logits_are_the_last_ones(model, make_batch):
    batch = make_batch((1, 0))
    everything = model(**batch).logits
    close(model(**batch, logits_to_keep=2).logits, everything[:, -2:])
    close(model(**batch, logits_to_keep=torch.tensor([0, 3])).logits, everything[:, [0, 3]])


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
