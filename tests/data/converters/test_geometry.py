import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from age_vlm.data.converters.geometry import clipped_box, segmentation_mask
from age_vlm.data.masks import decode_mask, encode_mask
from age_vlm.data.rejects import Unusable


SIDES = st.integers(1, 60)


def runs_of(mask):
    """Uncompressed counts as COCO writes them for crowds: column by column, zeros first."""
    pixels = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff([0, *edges, pixels.size]).tolist()
    return [0, *counts] if pixels[0] else counts


@st.composite
def masks(draw, width=None, height=None):
    width, height = width or draw(SIDES), height or draw(SIDES)
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).random((height, width)) < draw(st.floats(0.01, 1))


@given(SIDES, SIDES, st.data())
@settings(max_examples=50, deadline=None)
def test_a_polygon_becomes_a_mask_inside_its_box(width, height, data):
    corners = data.draw(
        st.lists(st.tuples(st.floats(-width, 2 * width), st.floats(-height, 2 * height)), min_size=3, max_size=8)
    )
    try:
        rle = segmentation_mask([[value for corner in corners for value in corner]], width, height)
    except Unusable:
        return
    mask = decode_mask(rle)
    assert mask.shape == (height, width) and mask.any()
    rows, columns = np.nonzero(mask)
    (left, top), (right, bottom) = np.min(corners, axis=0), np.max(corners, axis=0)
    # pycocotools rounds corners to fifths of a pixel and fills up to half a pixel around them.
    assert left - 1 <= columns.min() and columns.max() <= right + 1
    assert top - 1 <= rows.min() and rows.max() <= bottom + 1


@given(st.integers(2, 60), st.integers(2, 60), st.data())
@settings(max_examples=30, deadline=None)
def test_a_rectangle_of_whole_pixels_is_exact(width, height, data):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    expected = np.zeros((height, width), bool)
    expected[y0:y1, x0:x1] = True
    rle = segmentation_mask([[x0, y0, x1, y0, x1, y1, x0, y1]], width, height)
    assert np.array_equal(decode_mask(rle), expected)


def test_parts_of_an_object_are_one_mask_and_slivers_are_skipped():
    left, right = [1, 1, 4, 1, 4, 4, 1, 4], [6, 6, 9, 6, 9, 9, 6, 9]
    mask = decode_mask(segmentation_mask([left, right, [2, 2, 3, 3]], 12, 10))
    assert mask.sum() == 18 and mask[1:4, 1:4].all() and mask[6:9, 6:9].all()


@given(masks())
@settings(max_examples=30, deadline=None)
def test_run_lengths_give_the_same_mask_compressed_or_not(mask):
    assume(mask.any())
    height, width = mask.shape
    packed = coco.encode(np.asfortranarray(mask, np.uint8))
    for counts in (runs_of(mask), packed["counts"], packed["counts"].decode()):
        rle = segmentation_mask({"size": [height, width], "counts": counts}, width, height)
        assert rle == encode_mask(mask)


SQUARE = {"size": [4, 4], "counts": [4, 8, 4]}


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "polygon is malformed"),
        ([[1, 1, 3, 3]], "polygon is malformed"),  # pycocotools would take it for a box
        ([1, 1, 3, 1, 3, 3], "polygon is malformed"),
        ([[1, 1, 3, 1, 3, 3, 2]], "polygon is malformed"),
        ([[1, 1, 3, 1, 3, float("nan")]], "polygon is malformed"),
        (None, "polygon is malformed"),
        ([[10, 10, 12, 10, 12, 12]], "covers nothing"),
        ([[1, 1, 1e18, 1, 3, 3]], "covers nothing"),
        ({"size": [5, 4], "counts": [20]}, "not of the size"),
        ({"counts": [16]}, "mask is malformed"),
        ({"size": [4, 4], "counts": [4, 8]}, "mask is malformed"),
        ({"size": [4, 4], "counts": [4, -8, 20]}, "mask is malformed"),
        ({"size": [4, 4], "counts": "zz"}, "mask is malformed"),
        ({"size": [4, 4]}, "mask is malformed"),
        ({"size": [4, 4], "counts": [16]}, "covers nothing"),
    ],
)
def test_what_gives_no_mask_is_unusable(segmentation, reason):
    segmentation_mask(SQUARE, 4, 4)
    with pytest.raises(Unusable, match=reason):
        segmentation_mask(segmentation, 4, 4)


@given(SIDES, SIDES, st.lists(st.floats(-100, 100), min_size=4, max_size=4))
@settings(max_examples=50)
def test_a_box_is_cut_to_the_image(width, height, box):
    try:
        x0, y0, x1, y1 = clipped_box(box, width, height)
    except Unusable:
        assert not (max(box[0], 0) < min(box[2], width) and max(box[1], 0) < min(box[3], height))
    else:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert (x0, y0) == (max(box[0], 0), max(box[1], 0)) and (x1, y1) == (min(box[2], width), min(box[3], height))


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, float("nan"), 4]])
def test_a_malformed_box_is_unusable(box):
    with pytest.raises(Unusable, match="box is malformed"):
        clipped_box(box, 10, 10)
