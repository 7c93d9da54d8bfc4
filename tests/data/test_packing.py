import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.packing import packed_rows


def padded(lengths, rows):
    return len(rows) * max(sum(lengths[sample] for sample in row) for row in rows)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=24)


@given(lengths=LENGTHS, most=st.one_of(st.none(), st.integers(1, 150)))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths, most):
    rows = packed_rows(lengths, most)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(rows)
    assert max(sum(lengths[sample] for sample in row) for row in rows) <= max(most or 2 * max(lengths), max(lengths))
    assert padded(lengths, rows) <= len(lengths) * max(lengths)
    assert packed_rows(lengths, most) == rows


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), most=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_padding_is_near_the_least_that_any_arrangement_has(lengths, most):
    # The longest row is 4/3 of the best at most (Graham 1969), so this compares with arrangements that leave that room.
    room, least = 3 / 4 * max(most, max(lengths)), float("inf")
    for rows in itertools.product(range(len(lengths)), repeat=len(lengths)):
        sums = [sum(each for each, row in zip(lengths, rows) if row == number) for number in set(rows)]
        if max(sums) <= room:
            least = min(least, len(sums) * max(sums))
    assert padded(lengths, packed_rows(lengths, most, slack=0.0)) <= 4 / 3 * least + 1e-9
    assert padded(lengths, packed_rows(lengths, most)) <= 1.1 * 4 / 3 * least + 1e-9


@pytest.mark.parametrize(
    "lengths, most, rows",
    [
        ([5, 3, 2], None, [[0], [1, 2]]),
        # One row would hold as little padding, but longer rows cost more.
        ([5, 3, 2], 10, [[0], [1, 2]]),
        ([100, 51, 51, 1], 1000, [[0, 3], [1, 2]]),
        ([6, 3, 3, 3, 3], 6, [[0], [1, 3], [2, 4]]),
        # Two fit into one row, but the others would be padded to it.
        ([4, 5, 7, 7, 7, 7], 9, [[0], [1], [2], [3], [4], [5]]),
        ([4, 4, 7, 7], 9, [[0, 1], [2], [3]]),
        ([9], 4, [[0]]),
    ],
)
def test_rows_are_even(lengths, most, rows):
    assert sorted(packed_rows(lengths, most)) == rows


def test_images_are_spread_over_the_rows_where_padding_allows_it():
    lengths, images = [100] * 4 + [20] * 4 + [19], [64] * 9
    # One long sample a row, and a row of five short ones, or rows of a long one and a short one.
    alone, mixed = packed_rows(lengths, 100, images), packed_rows(lengths, 130, images, slack=0.3)
    most = [max(sum(images[sample] for sample in row) for row in rows) for rows in (alone, mixed)]
    assert most == [5 * 64, 3 * 64]
