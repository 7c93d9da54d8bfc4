"""Which tokens are aligned with which cells of which image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


SIDE = 32  # of the model's input, conftest's IMAGE_SIZE


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_coverage_is_the_share_of_each_cell_that_a_rectangle_covers(
    make_collator, grid, data, box, phrase, sample, turns
):
    width, height = (data.draw(st.integers(1, 80)) for _ in range(2))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    messages = turns(("a dog?", "yes"))
    size = (width, height)
    mask = box(size, left, top, right, bottom)
    image = Image.new("RGB", size)
    batch = make_collator()([sample(messages, [image], [phrase(messages, 0, "dog", size=size, mask=mask)])])
    # The processor stretches the whole image, so cells are equal parts of the source.
    rows, columns = grid
    y, x = torch.linspace(0, height, rows + 1).double(), torch.linspace(0, width, columns + 1).double()
    tall = (y[1:].clamp(max=bottom) - y[:-1].clamp(min=top)).clamp(min=0) / (height / rows)
    wide = (x[1:].clamp(max=right) - x[:-1].clamp(min=left)).clamp(min=0) / (width / columns)
    expected = (tall[:, None] * wide).flatten().float()
    torch.testing.assert_close(batch["grounding_coverage"][0], expected, rtol=0, atol=1e-4)


def test_the_last_or_every_token_of_a_phrase_is_aligned(
    processor, make_collator, picture, phrase, sample, three_turns, aligned_tokens
):
    talk = sample(three_turns, [picture(0)], [phrase(three_turns, 2, "big cat"), phrase(three_turns, 5, "red car")])
    (first, second), texts = aligned_tokens(processor, make_collator(independent_turns=True)([talk]))
    assert texts == ["t", "r"] and first[0] == second[0] == 0
    batch = make_collator(phrase_queries="all")([talk])
    places, texts = aligned_tokens(processor, batch)
    assert "".join(texts) == "big catred car"
    assert batch["grounding_coverage"].shape[0] == len(places)
    with pytest.raises(ValueError, match="phrase_queries: got 'first'"):
        make_collator(phrase_queries="first")


def test_what_is_said_may_be_aligned_where_it_is_predicted(
    processor, make_collator, picture, phrase, sample, three_turns, aligned_tokens
):
    """What the user says is read; for what the assistant says, the query in front chooses it."""
    talk = sample(three_turns, [picture(0)], [phrase(three_turns, 2, "big cat"), phrase(three_turns, 5, "red car")])
    for phrase_queries, read, predicted in (("last", "tr", "t"), ("all", "big catred car", "big cat")):
        options = {"independent_turns": True, "phrase_queries": phrase_queries}
        before, texts = aligned_tokens(processor, make_collator(**options)([talk]))
        assert "".join(texts) == read
        after, texts = aligned_tokens(processor, make_collator(**options, answer_queries="predict")([talk]))
        assert "".join(texts).startswith(predicted) and len(predicted) < len("".join(texts)) <= len(read)
        chosen = len(predicted)
        assert after[:chosen] == before[:chosen]
        row, position, image = before[chosen]
        first = position if phrase_queries == "all" else position - len("red car") + 1
        assert after[chosen] == (row, first - 1, image)
    with pytest.raises(ValueError, match="answer_queries: got 'first', expected one of read, predict"):
        make_collator(answer_queries="first")


def test_masks_of_one_phrase_are_one_mask(make_collator, box, phrase, sample, turns):
    messages = turns(("three men?", "yes"))
    size = (64, 48)
    parts = [box(size, 0, 0, 21, 30), box(size, 17, 5, 40, 48), box(size, 50, 0, 64, 7)]
    groundings = [phrase(messages, 0, "three men", size=size, mask=mask) for mask in parts]
    whole = phrase(messages, 0, "three men", size=size, mask=parts[0] | parts[1] | parts[2])
    image = Image.new("RGB", size)
    batch, expected = (make_collator()([sample(messages, [image], each)]) for each in (groundings, [whole]))
    assert len(batch["grounding_coverage"]) == 1
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key
    # The same phrase in another image is a grounding of its own.
    messages[0]["content"].insert(0, {"type": "image", "text": None})
    groundings = [phrase(messages, 0, "three men", image=number, size=size, mask=parts[number]) for number in (0, 1)]
    batch = make_collator(image_visibility="all")([sample(messages, [image, image], groundings)])
    assert len(batch["grounding_coverage"]) == 2


def test_slots_of_several_images_are_those_the_model_shows(
    make_model, processor, make_collator, picture, phrase, sample, turns, two_images
):
    model = make_model(image_visibility="all_previous")
    groundings = [
        phrase(two_images, 0, "a dog", image=0),
        phrase(two_images, 0, "a cat", image=1),
        phrase(two_images, 0, "a cat", image=0),
    ]
    batch = make_collator(image_visibility="all_previous")(
        [sample(turns(("hm?", "no"), images=0), []), sample(two_images, [picture(0), picture(1)], groundings)]
    )
    assert batch["grounding_slots"].tolist() == [0, 1, 0]
    rows = batch.pop("grounding_queries")
    tokens = batch.pop("grounding_coverage").shape[-1]
    slots = batch.pop("grounding_slots")
    maps = model(**batch, cross_attention_queries=rows).cross_attention_maps
    mass = [maps[0][:, :, slot * tokens : (slot + 1) * tokens].sum(-1) for slot in (0, 1)]
    assert mass[1][0].eq(0).all() and mass[0][0].gt(0.99).all()  # "a dog" stands before the second image
    for row, slot in zip((1, 2), slots[1:]):
        assert mass[int(slot)][row].gt(0).all()


def test_a_phrase_is_only_aligned_with_an_image_that_it_sees(make_collator, picture, phrase, sample, two_images):
    later = phrase(two_images, 0, "a dog", image=1)
    earlier = phrase(two_images, 0, "a cat", image=0)
    pictures = [picture(0), picture(1)]
    for visibility, count in (("latest", 0), ("all_previous", 1)):
        batch = make_collator(image_visibility=visibility)([sample(two_images, pictures, [later, earlier])])
        assert len(batch.get("grounding_queries", ())) == count


def test_a_mask_of_nothing_aligns_nothing(make_collator, picture, phrase, sample, three_turns):
    empty = phrase(three_turns, 0, "dog", mask=np.zeros((SIDE, SIDE), bool))
    batch = make_collator()([sample(three_turns, [picture(0)], [empty])])
    assert "grounding_queries" not in batch


def test_a_phrase_that_still_has_no_mask_is_refused(make_collator, picture, phrase, sample, three_turns):
    groundings = [
        phrase(three_turns, 0, "dog"),
        {**phrase(three_turns, 2, "big cat"), "mask": None, "box": [0.0, 0.0, 8.0, 8.0]},
    ]
    for independent in (False, True):
        collator = make_collator(independent_turns=independent)
        with pytest.raises(
            ValueError, match="sample 'one' lacks the mask of 1 of its phrases.*`age-vlm ground`"
        ) as caught:
            collator([sample(three_turns, [picture(0)], groundings)])
        assert "\n" not in str(caught.value)
        collator([sample(three_turns, [picture(0)], groundings[:1])])
