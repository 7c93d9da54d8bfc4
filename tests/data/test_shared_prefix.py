"""Questions of an image in one row, behind what they share: the loss and the maps of a row for each."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator
from age_vlm.data.schema import Message, assistant_message, grounding, user_message
from age_vlm.errors import UserError


def _sample(questions, system=True, images=1, seed=0):
    rng = np.random.default_rng(seed)
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": "you are kind"}]})
    groundings = []
    for number, question in enumerate(questions):
        groundings.append(grounding(len(messages), 0, len(question), images - 1, rng.random((32, 32)) > 0.5))
        messages += [user_message(question, images=0 if number else images), assistant_message("yes" * (1 + number))]
        groundings.append(grounding(len(messages) - 1, 0, 3, images - 1, rng.random((32, 32)) > 0.5))
    pixels = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(images)]
    return {
        "id": str(seed),
        "images": list(map(Image.fromarray, pixels)),
        "messages": messages,
        "groundings": groundings,
    }


def _outputs(model, batch):
    batch = dict(batch)
    queries = batch["grounding_queries"]
    inputs = {key: value for key, value in batch.items() if key not in GROUNDING_KEYS}
    count = int((batch["labels"][:, 1:] != -100).sum())
    outputs = model(**inputs, cross_attention_queries=queries, use_cache=False, num_items_in_batch=count)
    return outputs.loss, outputs.cross_attention_maps, count


@given(
    st.lists(st.lists(st.sampled_from(["a dog", "a cat", "the fox"]), min_size=1, max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 2),
    st.sampled_from(["read", "predict"]),
    st.sampled_from(["sdpa", "eager"]),
)
@settings(max_examples=25, deadline=None)
def test_the_loss_and_the_maps_are_those_of_independent_texts(
    opened, processor, samples, system, images, answer_queries, backend
):
    model = opened
    model.set_attn_implementation({"text_config": backend})
    samples = [_sample(questions, system, images, seed) for seed, questions in enumerate(samples)]
    collate = {"answer_queries": answer_queries, "independent_turns": True}
    shared = AgeVlmCollator.from_model(model, processor, shared_prefix=True, **collate)(samples)
    plain = AgeVlmCollator.from_model(model, processor, **collate)(samples)
    assert shared["input_ids"].shape[1] <= plain["input_ids"].shape[1]
    loss, maps, count = _outputs(model, shared)
    expected_loss, expected_maps, expected_count = _outputs(model, plain)
    assert count == expected_count
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    torch.testing.assert_close(maps, expected_maps, rtol=1e-4, atol=1e-5)
    for key in ("grounding_coverage", "pixel_values", "grounding_slots"):
        torch.testing.assert_close(shared[key], plain[key])


def test_the_beginning_is_there_once(opened, processor):
    sample = _sample(["a dog", "a cat", "the fox"])
    batch = AgeVlmCollator.from_model(opened, processor, independent_turns=True, shared_prefix=True)([sample])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 1
    assert "image_indices" not in batch


def test_questions_about_different_images_are_refused(opened, processor):
    sample = _sample(["a dog", "a cat"])
    sample["messages"][3] = user_message("a cat", images=1)
    sample["images"] *= 2
    with pytest.raises(UserError, match="shared_prefix: sample '0' has questions about different images"):
        AgeVlmCollator.from_model(opened, processor, independent_turns=True, shared_prefix=True)([sample])


@pytest.mark.parametrize("settings", [{"packing": True}, {"independent_turns": False}])
def test_other_ways_to_make_rows_are_refused(opened, processor, settings):
    with pytest.raises(UserError, match="shared_prefix: got True"):
        AgeVlmCollator.from_model(opened, processor, shared_prefix=True, **{"independent_turns": True, **settings})


def test_copies_share_too(opened, processor):
    collator = AgeVlmCollator.from_model(opened, processor, independent_turns=True, shared_prefix=True)
    batch = copy.deepcopy(collator)([_sample(["a dog", "a cat"])])
    assert batch["attention_mask"].ndim == 4


@pytest.fixture(scope="module")
def opened(request):
    """A tiny model whose gates are open: what is seen changes what is said."""
    model = request.getfixturevalue("make_model")().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_gate." in name:
                parameter.fill_(1.0)
    return model
