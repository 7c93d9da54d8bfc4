"""Maps of the whole model beside those of plain eager attention, and maps of generation beside a forward pass over its text."""

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from age_vlm import AlignmentConfig
from age_vlm.modeling_agevlm.attention_maps_agevlm import attention_on_images, mean_attention


CELLS = 12


def test_attention_is_that_on_each_querys_own_image():
    maps = [torch.rand(3, 2, 4 * CELLS) for _ in range(3)]
    images = torch.tensor([2, 0, 3])
    attention = attention_on_images(maps, images, CELLS, [2, 0])
    assert attention.shape == (3, 2, 2, CELLS)
    for query, image in enumerate(images.tolist()):
        for number, layer in enumerate((2, 0)):
            own = maps[layer][query, :, image * CELLS : (image + 1) * CELLS]
            assert torch.equal(attention[query, number], own)


def test_a_number_of_tokens_that_is_not_the_models_is_refused():
    maps = [torch.rand(1, 2, CELLS).softmax(-1)] * 2
    with pytest.raises(ValueError, match="^attention maps: got 5 image tokens an image, expected a divisor of"):
        attention_on_images(maps, torch.tensor([0]), 5, [0])


def test_the_mean_is_that_of_the_layers_and_heads_on_the_last_image_that_is_seen():
    maps = [torch.rand(3, 4, 3 * CELLS) for _ in range(2)]
    for each in maps:
        each[0, :, CELLS:] = 0  # sees the first image only
        each[1, :, :CELLS] = 0
        each[1, :, 2 * CELLS :] = 0
    mean = mean_attention(maps, (3, 4), [1], [0, 2])
    assert mean.shape == (3, 3, 4)
    for query, image in enumerate((0, 1, 2)):
        own = maps[1][query, [0, 2], image * CELLS : (image + 1) * CELLS].mean(0)
        torch.testing.assert_close(mean[query].flatten(), own)
    assert not mean_attention([torch.zeros(2, 4, CELLS)], (3, 4), [0], [0]).any()


def everywhere(batch):
    rows, length = batch["input_ids"].shape
    return torch.cartesian_prod(torch.arange(rows), torch.arange(length))


@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@torch.no_grad()
def test_maps_of_a_model_are_those_of_eager_attention(make_model, make_batch, visibility):
    model = make_model(image_visibility=visibility, alignment={"layers": [1], "heads": [0, 1, 3]})
    batch = make_batch((2, 0, 1))
    queries = everywhere(batch)
    maps = model.attention_maps(queries, **batch)
    rows, columns = model.image_grid(tuple(batch["pixel_values"].shape[-2:]))
    assert maps.shape == (len(queries), rows, columns) and maps.dtype == torch.float32
    model.set_attn_implementation("eager")
    weights = model(**batch, output_attentions=True, use_cache=False).cross_attentions[
        1
    ]  # batch, heads, length, tokens
    weights = weights[:, [0, 1, 3]].mean(1).unflatten(-1, (-1, rows, columns))
    before = (batch["input_ids"] == model.config.image_token_id).cumsum(-1)
    for (row, position), found in zip(queries.tolist(), maps):
        seen = int(before[row, position])
        if not seen:
            assert not found.any()
        else:
            torch.testing.assert_close(found, weights[row, position, seen - 1], atol=1e-6, rtol=1e-4)
    chosen = model.attention_maps(queries, layers=[0], heads="all", **batch)
    assert not torch.allclose(chosen, maps)


def test_what_the_model_lacks_is_refused(model, make_batch):
    batch = make_batch((1,))
    queries = torch.tensor([[0, 3]])
    for settings, words in (
        ({"layers": [7]}, "^alignment.layers: got 7, expected 0 to"),
        ({"heads": [99]}, "^alignment.heads: got 99, expected 0 to"),
    ):
        with pytest.raises(ValueError, match=words):
            model.attention_maps(queries, **settings, **batch)
    text = {key: value for key, value in make_batch((0,)).items() if key != "pixel_values"}
    with pytest.raises(ValueError, match="^pixel_values: got none, expected the images to look at"):
        model.attention_maps(queries, **text)


@torch.no_grad()
def test_the_grid_is_that_of_the_tokens_and_looking_at_it_changes_nothing(make_model):
    model = make_model().train()
    model.freeze("vision")
    before = [(name, module.training) for name, module in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for size in ((32, 32), (64, 32)):
        rows, columns = model.image_grid(size)
        tokens = model.get_image_features(torch.zeros(1, 3, *size)).pooler_output
        assert rows * columns == tokens.shape[1]
    assert model.image_grid((64, 32)) == (2 * model.image_grid((32, 32))[0], model.image_grid((32, 32))[1])
    assert [(name, module.training) for name, module in model.named_modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Generation

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 6}


def generated(model, batch, **settings):
    model.generation_config = GenerationConfig(eos_token_id=5, pad_token_id=6)
    settings = {**GREEDY, "return_dict_in_generate": True, "output_attention_maps": True, **settings}
    with torch.no_grad():
        return model.generate(**batch, **settings)


def reread(model, batch, sequences):
    """Maps (rows, generated tokens, rows, columns) of the queries in front of the generated tokens, in one forward pass."""
    prompt = batch["input_ids"].shape[1]
    mask = batch["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - prompt)], -1)
    queries = torch.cartesian_prod(torch.arange(len(sequences)), torch.arange(prompt - 1, sequences.shape[1] - 1))
    inputs = {**batch, "input_ids": sequences, "attention_mask": mask}
    with torch.no_grad():
        maps = model.attention_maps(queries, **inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    return maps.unflatten(0, (len(sequences), -1))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}, {"do_sample": True}],
    ids=str,
)
def test_maps_of_generation_are_of_the_queries_that_predicted(make_model, make_batch, attention, settings):
    model, batch = make_model(), make_batch((2, 0, 1))
    model.set_attn_implementation({"text_config": attention})
    torch.manual_seed(0)
    output = generated(model, batch, **settings)
    expected = reread(model, batch, output.sequences)
    # Flex attention is a compiled kernel; on a static cache it sums in another order.
    tolerance = 4e-3 if attention == "flex_attention" else 1e-4
    torch.testing.assert_close(output.attention_maps, expected, atol=tolerance, rtol=1e-3)
    totals = output.attention_maps.sum((-1, -2))
    torch.testing.assert_close(totals, torch.tensor([1.0, 0.0, 1.0])[:, None].expand_as(totals))
    # A map of the token after it would not do.
    assert not torch.allclose(output.attention_maps[:, 1:], expected[:, :-1], atol=1e-2)


def test_maps_follow_the_beams_that_were_chosen(make_model, make_batch):
    model, batch = make_model(), make_batch((1, 2))
    output = generated(model, batch, num_beams=3, num_return_sequences=2, output_scores=True)
    twice = {
        "input_ids": batch["input_ids"].repeat_interleave(2, 0),
        "attention_mask": batch["attention_mask"].repeat_interleave(2, 0),
        "pixel_values": batch["pixel_values"][[0, 0, 1, 2, 1, 2]],
    }
    expected = reread(model, twice, output.sequences)
    torch.testing.assert_close(output.attention_maps, expected, atol=1e-4, rtol=1e-3)
    assert output.beam_indices is not None


def test_what_is_generated_is_the_same_with_maps(make_model, make_batch):
    model, batch = make_model(), make_batch((2, 1))
    plain = generated(model, batch, output_attention_maps=False)
    assert type(plain).__name__ == "GenerateDecoderOnlyOutput"
    assert torch.equal(plain.sequences, generated(model, batch).sequences)
    text = {key: value for key, value in make_batch((0, 0)).items() if key != "pixel_values"}
    assert generated(model, text).attention_maps is None


def test_a_cache_of_images_alone_gives_maps_too(make_model, make_batch):
    """A chat that goes on: the image is in the cache, and not given again."""
    model, batch = make_model(), make_batch((1,))
    first = generated(model, batch)
    more = torch.cat([first.sequences, torch.tensor([[9, 11, 12]])], -1)
    inputs = {"input_ids": more, "attention_mask": torch.ones_like(more), "cache": first.cache}
    output = generated(model, inputs)
    whole = {**batch, "input_ids": more, "attention_mask": torch.ones_like(more)}
    torch.testing.assert_close(output.attention_maps, reread(model, whole, output.sequences), atol=1e-4, rtol=1e-3)


def test_cross_attentions_are_returned_beside_the_others(make_model, make_batch):
    model, batch = make_model(), make_batch((1, 1))
    model.set_attn_implementation("eager")
    output = generated(model, batch, output_attention_maps=False, output_attentions=True)
    steps, blocks = len(output.attentions), len(model.config.cross_attention_layers)
    assert len(output.cross_attentions) == steps == GREEDY["max_new_tokens"]
    assert all(len(step) == blocks for step in output.cross_attentions)
    whole = model(
        input_ids=output.sequences[:, :-1], pixel_values=batch["pixel_values"], output_attentions=True, use_cache=False
    )
    prompt = batch["input_ids"].shape[1]
    for block in range(blocks):
        for step in range(1, steps):
            torch.testing.assert_close(
                output.cross_attentions[step][block][:, :, 0],
                whole.cross_attentions[block][:, :, prompt - 1 + step],
                atol=1e-4,
                rtol=1e-3,
            )


def test_assistants_are_given_no_recorder(make_model, make_batch):
    model, batch = make_model(), make_batch((1,))
    model.set_attn_implementation("eager")
    text = LlamaForCausalLM(model.config.text_config).eval()
    for assistant in (make_model(), text):
        settings = {"assistant_model": assistant, "output_attentions": True, "output_attention_maps": False}
        output = generated(model, batch, **settings)
        assert torch.equal(output.sequences, generated(model, batch).sequences) and output.attentions


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"return_dict_in_generate": False}, "got True, expected return_dict_in_generate=True with it"),
        ({"prompt_lookup_num_tokens": 2}, "got True with prompt_lookup_num_tokens, expected one of the two"),
    ],
)
def test_maps_that_cannot_be_given_are_refused(model, make_batch, settings, words):
    with pytest.raises(ValueError, match=f"^output_attention_maps: {words}"):
        generated(model, make_batch((1,)), **settings)


def test_the_alignment_is_what_the_configuration_says(make_model):
    assert make_model().alignment == AlignmentConfig()
    assert make_model(alignment={"layers": [1], "heads": "all"}).alignment == AlignmentConfig(layers=[1], heads="all")


@torch.no_grad()
def test_images_can_be_encoded_by_a_compiled_model(make_model):
    model, pixels = make_model(), torch.randn(2, 3, 32, 32)
    expected = model.get_image_features(pixels).pooler_output
    compiled = torch.compile(
        lambda pixels: model.get_image_features(pixels).pooler_output, backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(pixels), expected)
