"""Caches hold images beside the text. Gates are open, weights large and rows ragged: otherwise a lost image would go unseen."""

import copy

import pytest
import torch
import torch._dynamo
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available

from age_vlm.modeling_agevlm.cache_agevlm import ImageCacheLayerMixin


IMAGE_TOKEN_ID = 2


def close(first, second):
    scale = max(second.abs().max().item(), 1.0)
    torch.testing.assert_close(first, second, atol=3e-4 * scale, rtol=0)


@torch.no_grad()
def step_by_step(model, batch, cache, steps):
    """Logits (batch, steps, vocabulary) of `steps`, forced one by one behind the batch, with the cache that is left."""
    inputs, mask, logits = dict(batch), batch["attention_mask"], []
    for step in range(steps.shape[1]):
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
        outputs = model(**{**inputs, "attention_mask": mask}, position_ids=position_ids, cache=cache, use_cache=True)
        logits.append(outputs.logits[:, -1])
        inputs = {"input_ids": steps[:, step : step + 1]}
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return torch.stack(logits, dim=1), cache


@torch.no_grad()
def at_once(model, batch, steps):
    """The same without a cache."""
    ids = torch.cat([batch["input_ids"], steps[:, :-1]], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(steps[:, :-1])], dim=1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    pixels = batch.get("pixel_values")
    logits = model(ids, pixels, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    return logits[:, -steps.shape[1] :]


@pytest.fixture
def steps():
    return torch.randint(7, 300, (3, 5), generator=torch.Generator().manual_seed(5))


def caches(model):
    return {
        "dynamic": DynamicCache(config=model.config.text_config),
        "static": StaticCache(config=model.config.text_config, max_cache_len=40),
    }


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@pytest.mark.parametrize("images", [(2, 0, 1), (0, 0, 0), (0, 3, 1)])
def test_cached_is_uncached(make_model, make_batch, steps, kind, visibility, images):
    model = make_model(image_visibility=visibility)
    batch = make_batch(images)
    cached, cache = step_by_step(model, batch, caches(model)[kind], steps)
    close(cached, at_once(model, batch, steps))
    # Images live on the layers that cross-attend, and the cache keeps its length.
    assert len(cache.layers) == model.config.text_config.num_hidden_layers
    holders = [index for index, layer in enumerate(cache.layers) if getattr(layer, "image_keys", None) is not None]
    assert holders == (model.config.cross_attention_layers if sum(images) else [])


@pytest.mark.skipif(not is_hqq_available(), reason="needs hqq")
@pytest.mark.parametrize("residual_length", [1, 64])
def test_a_quantised_cache_rounds_the_text_alone(model, make_batch, steps, residual_length):
    batch = make_batch((2, 0, 1))
    # A group is one head of one token, so that no row changes what another one's is rounded to.
    groups = {"nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 8}
    cache = QuantizedCache("hqq", model.config.text_config, residual_length=residual_length, **groups)
    cached, cache = step_by_step(model, batch, cache, steps)
    _, exact = step_by_step(model, batch, DynamicCache(config=model.config.text_config), steps)
    for index in model.config.cross_attention_layers:
        assert torch.equal(cache.layers[index].image_keys, exact.layers[index].image_keys)
        assert torch.equal(cache.layers[index].image_values, exact.layers[index].image_values)

    expected = at_once(model, batch, steps)
    other = at_once(model, {**batch, "pixel_values": batch["pixel_values"].flip(0, -1)}, steps)
    rounding, looking = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1) for logits in (cached, other))
    assert 0 < rounding.max() < 0.1
    assert looking[[0, 2]].min() > 2 * rounding.max()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_offloading_moves_images_with_the_text(model, make_batch, steps, kind):
    _, cache = step_by_step(model, make_batch((2, 0, 1)), caches(model)[kind], steps)
    before = copy.deepcopy(cache)
    for index in model.config.cross_attention_layers:
        layer, tensors = cache.layers[index], ("keys", "values", "image_keys", "image_values", "image_positions")
        layer.offload()
        for name in tensors:
            assert torch.equal(getattr(layer, name), getattr(before.layers[index], name))
        # A device of shapes alone stands for the accelerator that may not be here.
        layer.device = torch.device("meta")
        layer.prefetch()
        assert {getattr(layer, name).device.type for name in tensors} == {"meta"}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reordering_moves_images_with_their_rows(make_model, make_batch, steps, kind):
    model = make_model()
    batch = make_batch((2, 0, 1))
    order = torch.tensor([2, 0, 0])
    _, cache = step_by_step(model, batch, caches(model)[kind], steps[:, :2])
    cache.reorder_cache(order)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 2, dtype=torch.long)], dim=1)[order]
    position_ids = mask.sum(-1, keepdim=True) - 1
    with torch.no_grad():
        # One token of `steps[:, :2]` is in the cache already.
        got = model(steps[order, 1:2], attention_mask=mask, position_ids=position_ids, cache=cache).logits
    # What each row says alone at this step, in the new order.
    expected = at_once(model, batch, steps[:, :3])[order, 2:3]
    close(got, expected)


def test_repeating_and_selecting_rows(model, make_batch, steps):
    batch = make_batch((2, 0, 1))
    expected = at_once(model, batch, steps[:, :2])[:, 1]
    for change, rows in (
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), torch.tensor([2, 1])),
    ):
        _, cache = step_by_step(model, batch, DynamicCache(config=model.config.text_config), steps[:, :1])
        change(cache)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)[rows]
        with torch.no_grad():
            got = model(
                steps[rows, :1], attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1, cache=cache
            ).logits[:, -1]
        close(got, expected[rows])


def test_cropping_text_keeps_the_image_before_it(model, make_batch, steps):
    batch = make_batch((2, 0, 1))
    _, cache = step_by_step(model, batch, DynamicCache(config=model.config.text_config), steps)
    cache.crop(-3)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 2, dtype=torch.long)], dim=1)
    with torch.no_grad():
        got = model(
            steps[:, 1:2], attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1, cache=cache
        ).logits[:, -1]
    close(got, at_once(model, batch, steps[:, :3])[:, 2])


@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
def test_cropping_an_image_away_forgets_it(make_model, visibility):
    model = make_model(image_visibility=visibility)
    ids = torch.tensor([[9, IMAGE_TOKEN_ID, 20, IMAGE_TOKEN_ID, 21]])
    pixels = torch.randn(2, 3, 32, 32)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(ids, pixels, cache=cache)
        cache.crop(-2)
        close(
            model(torch.tensor([[30, 31]]), cache=cache).logits,
            model(torch.tensor([[9, IMAGE_TOKEN_ID, 20, 30, 31]]), pixels[:1]).logits[:, -2:],
        )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
@torch.no_grad()
def test_a_second_image_in_a_later_turn(make_model, kind, visibility):
    model = make_model(image_visibility=visibility)
    # Of the second row's two turns, only the later has an image.
    first = torch.tensor([[9, IMAGE_TOKEN_ID, 20, 21], [22, 23, 24, 25]])
    second = torch.tensor([[IMAGE_TOKEN_ID, 26, 27], [28, IMAGE_TOKEN_ID, 29]])
    third = torch.tensor([[30, 31], [32, 33]])
    pixels = torch.randn(3, 3, 32, 32)
    cache = caches(model)[kind]
    turns = [
        model(first, pixels[:1], cache=cache).logits,
        model(second, pixels[1:], cache=cache).logits,
        model(third, cache=cache).logits,
    ]
    close(torch.cat(turns, dim=1), model(torch.cat([first, second, third], dim=1), pixels, use_cache=False).logits)


@torch.no_grad()
def test_a_reset_cache_is_a_new_one(model, make_batch, steps):
    cache = StaticCache(config=model.config.text_config, max_cache_len=40)
    step_by_step(model, make_batch((1, 2, 2), seed=9), cache, steps)
    cache.reset()
    batch = make_batch((2, 0, 1))
    close(step_by_step(model, batch, cache, steps)[0], at_once(model, batch, steps))


@torch.no_grad()
def test_cache_layers_can_be_copied_and_named(model, make_batch):
    cache = model(**make_batch((1,)), use_cache=True).cache
    twin = copy.deepcopy(cache)
    for layer, other in zip(cache.layers, twin.layers):
        assert type(other) is type(layer)
        if isinstance(layer, ImageCacheLayerMixin):
            assert torch.equal(layer.image_keys, other.image_keys) and layer.image_keys is not other.image_keys
            module = __import__(type(layer).__module__, fromlist=["x"])
            assert getattr(module, type(layer).__name__) is type(layer)
