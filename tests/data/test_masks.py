import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from age_vlm.data.masks import decode_mask, encode_mask, mask_share, mask_size, union


MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40))


@given(MASKS)
def test_a_mask_survives_encoding(mask):
    rle = encode_mask(mask)
    assert np.array_equal(decode_mask(rle), mask)
    assert mask_size(rle) == mask.shape


@given(MASKS)
def test_the_encoding_is_plain_data(mask):
    rle = encode_mask(mask)
    assert all(type(side) is int for side in rle["size"])
    assert type(rle["counts"]) is str and rle["counts"].isascii()


@given(st.lists(arrays(bool, (7, 9)), min_size=1, max_size=4))
def test_the_union_is_where_any_mask_is(several):
    united = union([encode_mask(mask) for mask in several])
    assert np.array_equal(decode_mask(united), np.any(several, axis=0))
    assert mask_share(united) == np.any(several, axis=0).mean()


@given(MASKS, st.integers(0, 200))
def test_cut_counts_are_refused_or_fill_the_size(mask, keep):
    rle = encode_mask(mask)
    cut = {"size": rle["size"], "counts": rle["counts"][:keep]}
    if cut == rle:
        return
    try:
        decoded = decode_mask(cut)
    except ValueError:
        return
    # A last run of length zero may be missing: nothing else may.
    assert np.array_equal(decoded, mask)


@given(st.binary(max_size=20), st.integers(1, 9), st.integers(1, 9))
def test_any_counts_give_a_mask_or_a_value_error(counts, height, width):
    try:
        assert decode_mask({"size": [height, width], "counts": counts}).shape == (height, width)
    except ValueError as error:
        assert "counts" in str(error)


@pytest.mark.parametrize(
    ("rle", "names"),
    [
        ({"counts": "1"}, "size"),
        ({"size": [3], "counts": "1"}, "size"),
        ({"size": [0, 3], "counts": "1"}, "size"),
        ({"size": [2.5, 3], "counts": "1"}, "size"),
        ({"size": [3, 3]}, "counts"),
        ({"size": [3, 3], "counts": [9]}, "counts"),
        ({"size": [3, 3], "counts": "é"}, "counts"),
        (None, "size"),
    ],
)
def test_a_malformed_encoding_is_named(rle, names):
    with pytest.raises(ValueError, match=names):
        decode_mask(rle)


@pytest.mark.parametrize(
    "mask", [np.zeros((3, 3)), np.zeros(3, bool), np.zeros((1, 3, 3), bool), np.zeros((0, 3), bool)]
)
def test_only_flat_boolean_masks_are_encoded(mask):
    with pytest.raises(ValueError, match="bool of shape"):
        encode_mask(mask)
