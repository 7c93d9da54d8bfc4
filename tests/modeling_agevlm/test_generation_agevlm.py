"""Generation with any cache and any settings. Gates are open, weights large and rows ragged, as in the tests of caches."""

import pytest
import torch
import torch._dynamo
from transformers import CompileConfig, DynamicCache, GenerationConfig


IMAGE_TOKEN_ID = 2
NEW_TOKENS = 8
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 6}


def generated(model, batch, **settings):
    torch.manual_seed(0)
    out = model.generate(**batch, **{**GREEDY, **settings})
    return out[:, batch["input_ids"].shape[1] :] if "input_ids" in batch else out


@pytest.fixture(scope="module")
def reference(model, make_batch):
    """Greedy decoding without any cache, of a ragged batch."""
    batch = make_batch((2, 0, 1))
    return batch, generated(model, batch, use_cache=False)


def test_greedy_looks_at_the_image(model, reference):
    batch, expected = reference
    other = generated(model, {**batch, "pixel_values": batch["pixel_values"].flip(0, -1)})
    assert not torch.equal(other[0], expected[0]) and not torch.equal(other[2], expected[2])
    assert torch.equal(other[1], expected[1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_every_cache_decodes_the_same(model, reference, settings):
    batch, expected = reference
    assert torch.equal(generated(model, batch, **settings), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from CUDA alone")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_decodes_the_same(make_model, make_batch, implementation):
    model = make_model().to("cuda")
    batch = {name: values.to("cuda") for name, values in make_batch((2, 0, 1)).items()}
    expected = generated(model, batch, use_cache=False)
    got = generated(model, batch, cache_implementation=implementation, disable_compile=True)
    assert torch.equal(got, expected)


def test_a_row_alone_decodes_the_same(model, reference, row_alone):
    batch, expected = reference
    for row in range(3):
        assert torch.equal(generated(model, row_alone(batch, row))[0], expected[row])


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 2}, {"assistant": True}], ids=str)
def test_speculation_decodes_the_same(model, make_model, reference, row_alone, settings):
    batch, expected = reference
    if settings.pop("assistant", False):
        # Another model with the same vocabulary: its guesses are often wrong, so the cache is cropped often.
        settings = {"assistant_model": make_model(seed=1)}
    for row in range(3):
        assert torch.equal(generated(model, row_alone(batch, row), **settings)[0], expected[row])


def test_beams_of_a_row_alone_are_those_in_the_batch(model, reference, row_alone):
    batch, greedy = reference
    settings = {"num_beams": 3, "length_penalty": 0.0}
    together = generated(model, batch, **settings)
    uncached = generated(model, batch, use_cache=False, **settings)
    assert torch.equal(together, uncached)
    assert not torch.equal(together, greedy)
    for row in range(3):
        assert torch.equal(generated(model, row_alone(batch, row), **settings)[0], together[row])


def test_several_samples_of_a_row_see_its_own_images(model, reference):
    batch, _ = reference
    settings = {"do_sample": True, "num_return_sequences": 2, "top_k": 5}
    assert torch.equal(generated(model, batch, **settings), generated(model, batch, use_cache=False, **settings))


def test_generation_from_embeddings(model, reference):
    batch, expected = reference
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    inputs = {key: value for key, value in batch.items() if key != "input_ids"}
    assert torch.equal(generated(model, {**inputs, "inputs_embeds": embeddings}), expected)
    beams = generated(model, {**inputs, "inputs_embeds": embeddings}, num_beams=2)
    assert torch.equal(beams, generated(model, batch, num_beams=2))


def test_inputs_of_one_answer_a_row_are_not_repeated(model, reference):
    batch, _ = reference
    for size in ({}, {"expand_size": 1}):
        ids, _ = model._expand_inputs_for_generation(input_ids=batch["input_ids"], **size)
        assert torch.equal(ids, batch["input_ids"])


def test_generation_with_a_shared_image(model, make_batch):
    batch = make_batch((1, 1))
    shared = {**batch, "pixel_values": batch["pixel_values"][:1], "image_indices": torch.tensor([0, 0])}
    copies = {**batch, "pixel_values": batch["pixel_values"][[0, 0]]}
    assert torch.equal(generated(model, shared), generated(model, copies))
    assert torch.equal(generated(model, shared, num_beams=2), generated(model, copies, num_beams=2))


@pytest.mark.parametrize("again", [True, False], ids=["all images again", "only the new image"])
@pytest.mark.parametrize("how", ["ids", "embeddings"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_continued_chat_with_a_second_image(model, again, how, beams):
    first = torch.tensor([[9, IMAGE_TOKEN_ID, 20, 21]])
    pixels = torch.randn(2, 3, 32, 32)
    cache = DynamicCache(config=model.config.text_config)
    answer = model.generate(first, pixel_values=pixels[:1], cache=cache, **GREEDY)
    turn = torch.cat([answer, torch.tensor([[40, IMAGE_TOKEN_ID, 41]])], dim=1)
    expected = model.generate(turn, pixel_values=pixels, use_cache=False, num_beams=beams, **GREEDY)
    cache.batch_repeat_interleave(beams)
    text = {"input_ids": turn} if how == "ids" else {"inputs_embeds": model.get_input_embeddings()(turn)}
    pictures = pixels if again else pixels[1:]
    continued = model.generate(**text, pixel_values=pictures, cache=cache, num_beams=beams, **GREEDY)
    assert torch.equal(continued[:, -NEW_TOKENS:], expected[:, -NEW_TOKENS:])


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 2}, {"assistant": True}], ids=str)
def test_speculation_in_a_continued_chat_is_one_sentence(model, make_model, settings):
    if settings.pop("assistant", False):
        settings = {"assistant_model": make_model(seed=1)}
    cache = DynamicCache(config=model.config.text_config)
    turn = model.generate(torch.tensor([[9, 20, 21]]), cache=cache, **GREEDY)
    with pytest.raises(ValueError, match="cache: got a cache of 10 tokens for assisted decoding, expected an empty"):
        model.generate(turn, cache=cache, **GREEDY, **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "pixel_values: got 1 images for 2 image tokens"),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32), "image_indices": torch.tensor([0, 1])},
            "image_indices: got 1, expected indices of the 1 images",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32), "image_indices": torch.tensor([0])},
            "image_indices: got 1, expected one for each of 2 image tokens",
        ),
    ],
)
@pytest.mark.parametrize("beams", [1, 2])
def test_images_that_do_not_fit_the_text_are_one_sentence(model, make_batch, change, words, beams):
    with pytest.raises(ValueError, match=words):
        generated(model, {**make_batch((1, 1)), **change}, num_beams=beams)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"suppress_tokens": None},
        {"suppress_tokens": [40]},
        {"num_beams": 2},
        {"do_sample": True, "temperature": 0.1},
        {"prompt_lookup_num_tokens": 2},
        {"generation_config": GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=5)},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_an_answer_never_holds_an_image_whatever_the_settings(make_model, make_batch, settings):
    model, batch = make_model(text={"tie_word_embeddings": False}), make_batch((1,))
    with torch.no_grad():
        hidden = model.model(**batch).last_hidden_state[0, -1]
        model.lm_head.weight[IMAGE_TOKEN_ID] = 10 * hidden
        model.lm_head.weight[40] = 9 * hidden
        assert model(**batch).logits[0, -1].argmax() == IMAGE_TOKEN_ID
    model.generation_config = GenerationConfig(eos_token_id=5, pad_token_id=6)
    answer = generated(model, batch, **settings)[0]
    assert IMAGE_TOKEN_ID not in answer
    assert (40 in answer) == (settings.get("suppress_tokens") != [40]), "what else the settings suppress stays so"


def test_chunked_prefill_is_refused_with_images_and_right_without(model, make_batch):
    with pytest.raises(ValueError, match="prefill_chunk_size: got 4 with images, expected None"):
        generated(model, make_batch((1, 1)), prefill_chunk_size=4)
    batch = make_batch((0, 0))
    assert torch.equal(generated(model, batch, prefill_chunk_size=4), generated(model, batch))


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 cannot trace what transformers wraps models in")
def test_decoding_compiles_once_without_a_break(make_model, reference):
    batch, expected = reference
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    earlier = counts["unique_graphs"]  # of tests before: a reset does not begin to count anew
    # `eager` as the compiler's backend: what is tested is the graph, not the code made from it.
    settings = CompileConfig(fullgraph=True, backend="eager", mode=None, dynamic=False)
    settings._compile_all_devices = True  # transformers compiles on accelerators alone
    model = make_model()
    with torch._dynamo.config.patch(error_on_recompile=True):
        # Nor does another text of the same shape compile again.
        for _ in range(2):
            compiled = generated(model, batch, cache_implementation="static", compile_config=settings)
            assert torch.equal(compiled, expected)
    assert counts["unique_graphs"] == earlier + 1
