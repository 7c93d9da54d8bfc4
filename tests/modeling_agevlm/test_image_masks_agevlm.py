from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from age_vlm.modeling_agevlm.cache_agevlm import NO_IMAGE
from age_vlm.modeling_agevlm.image_masks_agevlm import (
    group_images_by_row,
    packed_starts,
    visible_images,
    visible_slots,
)


@st.composite
def texts(draw):
    """Rows of one width; each a list of (position in its packed sequence, image or None)."""
    width, batch = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    images, rows = 0, []
    for _ in range(batch):
        row, position = [], 0
        while len(row) < width:
            if row and draw(st.integers(0, 4)) == 0:
                position = 0
            is_image = draw(st.integers(0, 3)) == 0
            row.append((position, images if is_image else None))
            images += is_image
            position += 1
        rows.append(row)
    return rows, images


def seen(rows, visibility, shared=None):
    """The definition, one text token at a time: row -> token -> how often which image."""
    result = []
    for row in rows:
        start, in_row = 0, []
        for place, (position, _) in enumerate(row):
            if position == 0:
                start = place
            before = [image for _, image in row[start : place + 1] if image is not None]
            before = before[-1:] if visibility == "latest" else before
            in_row.append(Counter(image if shared is None else shared[image] for image in before))
        result.append(in_row)
    return result


@settings(deadline=None, max_examples=150)
@given(texts(), st.sampled_from(["latest", "all_previous"]), st.booleans(), st.data())
def test_each_token_sees_what_the_definition_says(text, visibility, sharing, data):
    rows, images = text
    if not images:
        return
    is_image = torch.tensor([[image is not None for _, image in row] for row in rows])
    position_ids = torch.tensor([[position for position, _ in row] for row in rows])
    shared = data.draw(st.lists(st.integers(0, 2), min_size=images, max_size=images)) if sharing else None
    placed = group_images_by_row(is_image, None if shared is None else torch.tensor(shared))
    starts = packed_starts(position_ids, len(rows))
    visible = visible_images(placed.positions, torch.arange(is_image.shape[1]), visibility, starts)
    expected = seen(rows, visibility, shared)
    if placed.slots is not None:
        if any(times > 1 for row in expected for counts in row for times in counts.values()):
            with pytest.raises(ValueError, match="^image_indices: got one image for two image tokens of a text"):
                visible_slots(visible, placed.slots, placed.index.shape[1])
            return
        visible = visible_slots(visible, placed.slots, placed.index.shape[1])
    for row in range(len(rows)):
        for token in range(is_image.shape[1]):
            got = placed.index[row][visible[row, token]].tolist()
            assert Counter(got) == expected[row][token]
    for row in range(len(rows)):
        slots = [slot for slot in placed.index[row].tolist() if slot >= 0]
        assert len(slots) == len(set(slots)), "an image is encoded into keys once"


def test_offset_moves_new_images_behind_the_cached_text():
    placed = group_images_by_row(torch.tensor([[False, True], [False, False]]), offset=7)
    assert placed.positions.tolist() == [[8], [NO_IMAGE]]
    assert placed.index.tolist() == [[0], [-1]]


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_without_a_batch_dimension_are_every_row_s(batch):
    starts = packed_starts(torch.tensor([[0, 1, 0, 1, 2]]), batch)
    assert starts.tolist() == [[0, 0, 2, 2, 2]] * batch


def test_placed_images_can_be_exported():
    """`torch.export` takes the tensors out, writes down what is left, and puts them back."""
    placed = group_images_by_row(torch.tensor([[True, False, True], [False, True, False]]))
    tensors, rest = pytree.tree_flatten(placed)
    assert len(tensors) == 2 and all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    again = pytree.tree_unflatten(tensors, pytree.treespec_loads(pytree.treespec_dumps(rest)))
    assert (
        again.slots is None
        and torch.equal(again.index, placed.index)
        and torch.equal(again.positions, placed.positions)
    )
