"""Who sees which image."""

import pytest
import torch

from age_vlm.modeling_agevlm.modeling_agevlm import logger


IMAGE_TOKEN_ID = 2


@pytest.fixture
def looks(model, make_batch):
    """Guards every test below: in the shared model, another image gives clearly other logits."""
    batch = make_batch([1])
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0, -1)}
    with torch.no_grad():
        assert (model(**batch).logits - model(**other).logits).abs().max() > 0.1


@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch(make_model, make_batch, row_alone, looks, visibility, side, close):
    model = make_model(image_visibility=visibility)
    for seed, images in enumerate([(2, 0, 1), (0, 3), (1, 1, 0, 2)]):
        batch = make_batch(images, seed=seed, side=side)
        logits = model(**batch).logits
        for row in range(len(images)):
            kept = batch["attention_mask"][row].bool()
            close(logits[row, kept], model(**row_alone(batch, row)).logits[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch_in_half_precision(make_model, make_batch, row_alone, dtype, close):
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
def test_rows_before_an_image_get_exactly_nothing_forward_and_backward(make_model, dtype, attention, language_model_of):
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
def test_flex_attention_before_an_image_is_finite(make_model, dtype, close):
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
def test_packed_texts_are_the_texts_alone(make_model, visibility, attention, close):
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
def test_a_shared_image_is_its_copies(make_model, make_batch, looks, visibility, attention, use_cache, close):
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
def test_no_images_for_image_tokens_warns_and_reads_text(model, make_batch, caplog, monkeypatch, language_model_of):
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
