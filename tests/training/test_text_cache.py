"""States of texts that are kept: the same loss and gradients, for texts in any row and batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator
from age_vlm.training.text_cache import TextStates, text_cache


@pytest.fixture
def frozen(make_model):
    """A tiny model with open gates of whose language model only the layers from the first block on learn."""
    return _frozen(make_model())


def _frozen(model):
    model.freeze("language_model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_gate." in name:
                parameter.fill_(1.0)
            if ".layers." in name and ".layers.0." not in name:
                parameter.requires_grad_(True)
    return model


def _step(model, batch):
    inputs = {key: value for key, value in batch.items() if key not in GROUNDING_KEYS}
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@given(
    orders=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=2, max_size=4),
    way=st.sampled_from([{}, {"packing": True}, {"shared_prefix": True}]),
    size=st.sampled_from([0, 3000, 10**8]),
)
@settings(max_examples=25, deadline=None)
def test_loss_and_gradients_are_those_of_all_layers(make_once, processor, eight, orders, way, size):
    model = make_once
    collator = AgeVlmCollator.from_model(model, processor, independent_turns=True, **way)
    batches = [collator([{**eight[n], "groundings": []} for n in order]) for order in orders]
    expected = [_step(model, batch) for batch in batches]
    with text_cache(model.model, size) as kept:
        for _ in range(2):
            for batch, (loss, gradients) in zip(batches, expected):
                found, found_gradients = _step(model, batch)
                torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found_gradients, gradients, rtol=1e-3, atol=1e-5)
    if size == 10**8:
        assert kept.read >= sum(len(batch["input_ids"]) for batch in batches)
    assert "forward" not in vars(model.model.language_model.layers[0])
    torch.testing.assert_close(_step(model, batches[0])[0], expected[0][0], rtol=0, atol=0)


def test_rows_that_are_padded_by_a_mask_are_computed_as_always(frozen, processor, eight):
    batch = AgeVlmCollator.from_model(frozen, processor)([{**each, "groundings": []} for each in eight[:3]])
    expected = _step(frozen, batch)[0]
    with text_cache(frozen.model) as kept:
        for _ in range(2):
            torch.testing.assert_close(_step(frozen, batch)[0], expected)
    assert kept.read == 0


def test_with_a_cache_nothing_is_taken_for_a_text_of_its_own(frozen):
    frozen.eval()
    ids = torch.tensor([[20, 21, 22, 23]])
    position_ids = torch.arange(4)[None]
    with text_cache(frozen.model) as kept, torch.no_grad():
        expected = frozen(ids).logits[:, -1]
        for _ in range(2):
            cache = frozen(ids[:, :3], position_ids=position_ids[:, :3], use_cache=True).cache
            found = frozen(ids[:, 3:], position_ids=position_ids[:, 3:], cache=cache, use_cache=True).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert kept.read == 0


def test_what_is_full_grows_no_more():
    kept = TextStates(max_bytes=8)
    text = torch.arange(3)[None], torch.arange(3)[None], torch.tensor([[-1, 0, 1]])
    (nodes,) = kept.nodes(*text)
    kept.keep(nodes, torch.ones(3, 2))
    assert kept.known(nodes[:1]) and not kept.known(nodes)
    assert kept.nodes(*text) == [nodes]
    assert kept.nodes(text[0] + 1, *text[1:]) == [None]
    assert len(kept._nodes) == len(kept._states) == 3


def test_layers_that_learn_are_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="that are trained, expected frozen ones"):
        with text_cache(model.model):
            pass
    model.freeze("language_model")
    model.model.language_model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout of 0.1, expected 0"):
        with text_cache(model.model):
            pass


@pytest.fixture(scope="module")
def make_once(request):
    return _frozen(request.getfixturevalue("make_model")())


@pytest.fixture(scope="module")
def eight(request):
    return request.getfixturevalue("eight_talks")
