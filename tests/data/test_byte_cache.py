"""Caches are bounded by the memory that they take."""

import gc
import pickle
import tracemalloc

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.byte_cache import MIB, ByteCache, size_of
from age_vlm.data.chat import ChatEncoder
from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.label_maps import LabelMaps
from age_vlm.data.masks import encode_mask
from age_vlm.data.scene_datasets import ScenesDataset
from age_vlm.data.schema import assistant_message, grounding, user_message


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400)), max_size=60), st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_values_are_right_and_within_the_bound(uses, bound):
    cache, sizes = ByteCache(bound), {}
    for key, size in uses:
        sizes.setdefault(key, size)
        value = cache.get(key, lambda key=key: (key, bytes(sizes[key])))
        assert value == (key, bytes(sizes[key]))
        held = list(cache._entries.items())
        assert cache.bytes == sum(size_of(key) + size_of(entry[0]) for key, entry in held) <= bound


def test_what_was_used_last_is_kept():
    made = []

    def use(key):
        return cache.get(key, lambda: made.append(key) or bytes(1000))

    cache = ByteCache(3 * (size_of(bytes(1000)) + size_of("a")))
    for key in "abcadabcd":
        use(key)
    assert made == list("abcdbcd"), "a was always among the three that were used last"
    copy = pickle.loads(pickle.dumps(cache))
    assert len(copy) == 0 and copy.max_bytes == cache.max_bytes


def test_sizes_are_those_of_memory():
    for value, least in (
        (np.zeros((100, 100), np.int32), 40_000),
        (torch.zeros(100, 100), 40_000),
        (Image.new("RGB", (100, 100)), 40_000),
        (Image.new("L", (100, 100)), 10_000),
        ({"a": [bytes(40_000)]}, 40_000),
    ):
        assert least <= size_of(value) < least + 1000


def held_by(use) -> int:
    """Bytes of Python objects and arrays that are there after `use` and were not before."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = use()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] if kept is not None else 0
    finally:
        tracemalloc.stop()


def test_encoded_chats_are_bounded(processor):
    encoder = ChatEncoder(processor, cache_bytes=MIB)

    def use():
        for number in range(300):
            encoder([user_message(f"{number} is it?" + " a word" * 40), assistant_message("yes")])
        return encoder

    encoder([user_message("first"), assistant_message("yes")])
    assert held_by(use) < 1.5 * MIB
    assert 5 < len(encoder.cache) < 300
    assert pickle.loads(pickle.dumps(encoder)).cache.max_bytes == MIB


def test_coverages_are_bounded(processor):
    collator = AgeVlmCollator(processor, (4, 4))
    collator.coverages.max_bytes = 20_000
    rng = np.random.default_rng(0)
    for number in range(40):
        mask = encode_mask(rng.random((20, 30)) > 0.5)
        sample = {
            "id": str(number),
            "images": [Image.new("RGB", (30, 20))],
            "messages": [user_message("a dog?", images=1), assistant_message("yes")],
            "groundings": [grounding(0, 2, 5, 0, mask)],
        }
        expected = AgeVlmCollator(processor, (4, 4))([sample])["grounding_coverage"]
        assert torch.equal(collator([sample])["grounding_coverage"], expected)
        assert collator.coverages.bytes <= 20_000
    assert 0 < len(collator.coverages) < 40


def test_photographs_are_bounded(tmp_path):
    for part in ("images", "labels", "instances"):
        (tmp_path / part).mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{number}.png")
        for part in ("labels", "instances"):
            labels = rng.integers(0, 2, (120, 160), dtype=np.uint8)
            Image.fromarray(labels).save(tmp_path / part / f"{number}.png")
    arguments = {
        "images": tmp_path / "images", "labels": tmp_path / "labels", "classes": ["sky", "road"],
        "instances": tmp_path / "instances",
    }  # fmt: skip
    bound = 4 * 120 * 160 * 8
    maps = LabelMaps(**arguments, cache_bytes=bound)
    everything = LabelMaps(**arguments)

    def use():
        for index in range(len(maps)):
            maps.crop(index, np.random.default_rng(index), (32, 24))
        return maps

    assert held_by(use) < 1.5 * bound
    assert 0 < len(maps.frames.cache) < 5 and len(everything.frames.cache) == 30
    # Decoded again, a frame is the same; parts share one bound.
    parts = maps.split()
    assert parts.train.frames.cache is parts.test.frames.cache is maps.frames.cache
    for one, other in zip(pickle.loads(pickle.dumps(maps)).frames, everything.frames, strict=True):
        assert one.name == other.name
        assert all(
            np.array_equal(getattr(one, part), getattr(other, part)) for part in ("image", "labels", "instances")
        )


def test_drawn_scenes_are_bounded():
    scenes = ScenesDataset("train", 6)
    first = [scenes[index] for index in range(6)]
    assert scenes[0] is first[0]
    scenes.cache.max_bytes = 2 * size_of(first[0])
    for index in (*range(6), *range(6)):
        again = scenes[index]
        assert again["messages"] == first[index]["messages"] and again["groundings"] == first[index]["groundings"]
    assert 0 < len(scenes.cache) < 4
