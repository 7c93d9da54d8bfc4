import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.mix import Mix


PARTS = st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 20)), min_size=1, max_size=4)


class Samples:
    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert 0 <= index < self.size and type(index) is int
        return self.name, index


def mix_of(parts, length, seed=0):
    samples = [Samples(number, size) for number, (size, _) in enumerate(parts)]
    return Mix(samples, [weight for _, weight in parts], length, seed)


@settings(deadline=None)
@given(PARTS, st.integers(1, 200), st.integers(0, 5))
def test_every_part_has_its_share_and_an_index_its_sample(parts, length, seed):
    mix = mix_of(parts, length, seed)
    drawn = [mix[index] for index in range(len(mix))]
    assert len(drawn) == length
    total = sum(weight for _, weight in parts)
    for number, (size, weight) in enumerate(parts):
        own = [sample for part, sample in drawn if part == number]
        assert abs(len(own) - length * weight / total) < 1 + 1e-9
        # Pass by pass, each whole.
        for start in range(0, len(own), size):
            part_of_pass = own[start : start + size]
            assert len(set(part_of_pass)) == len(part_of_pass)
    again = mix_of(parts, length, seed)
    assert [again[index] for index in reversed(range(length))] == drawn[::-1]
    assert [mix.part(index) for index in range(length)] == [part for part, _ in drawn]


def test_parts_are_mixed_from_the_start():
    """Who looks at some of the first samples alone, as a plan does, sees all parts."""
    mix = mix_of([(500, 1.0), (500, 1.0)], 1000)
    assert 20 < sum(mix.part(index) for index in range(80)) < 60


def test_another_seed_is_another_order():
    parts = [(40, 1.0), (40, 1.0)]
    first, second = ([mix_of(parts, 40, seed)[index] for index in range(40)] for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    "parts, length, words",
    [
        ([], 3, "^weights: got 0 for 0 parts"),
        ([(3, 0.0)], 3, "^weights: got .0.0., expected positive"),
        ([(3, 1.0), (0, 1.0)], 3, "^parts: got one without samples"),
        ([(3, 1.0)], 0, "^length: got 0"),
    ],
)
def test_what_cannot_be_mixed_is_one_sentence(parts, length, words):
    with pytest.raises(ValueError, match=words):
        mix_of(parts, length)
