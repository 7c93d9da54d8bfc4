import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from age_vlm.data.questions import POPE_MODES, KindStatistics, existence_negatives


KINDS = [f"kind{i}" for i in range(8)]
SCORES = st.dictionaries(st.sampled_from(KINDS), st.integers(0, 3))


@given(
    present=st.sets(st.sampled_from(KINDS)),
    frequency=SCORES,
    affinity=SCORES,
    count=st.integers(1, 4),
    extra=st.one_of(st.none(), st.integers(0, 4)),
    seed=st.integers(0, 99),
)
def test_negatives_are_absent_distinct_and_of_highest_score(present, frequency, affinity, count, extra, seed):
    pool = None if extra is None else count + extra
    chosen = existence_negatives(
        present,
        KINDS,
        frequency=frequency,
        affinity=affinity,
        rng=np.random.default_rng(seed),
        count=count,
        pool=pool,
    )
    absent = set(KINDS) - present
    assert tuple(chosen) == POPE_MODES
    for kinds in chosen.values():
        assert len(kinds) == len(set(kinds)) == min(count, len(absent))
        assert set(kinds) <= absent
    for mode, scores, size in (("popular", frequency, pool or count), ("adversarial", affinity, count)):
        limit = sorted((scores.get(kind, 0) for kind in absent), reverse=True)[:size]
        assert all(scores.get(kind, 0) >= limit[-1] for kind in chosen[mode])


def choices(mode, **options):
    given_options = {"frequency": {"b": 2, "c": 1}, "affinity": {"c": 1, "d": 1}} | options
    return {
        existence_negatives("a", "abcd", rng=np.random.default_rng(seed), **given_options)[mode][0]
        for seed in range(60)
    }


def test_ties_and_pools_are_drawn_from_at_random():
    assert choices("random") == {"b", "c", "d"}
    assert choices("popular") == {"b"}
    assert choices("popular", pool=2) == {"b", "c"}
    assert choices("adversarial") == {"c", "d"}


@pytest.mark.parametrize(("options", "names"), [({"count": 0}, "count"), ({"count": 3, "pool": 2}, "pool")])
def test_impossible_numbers_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        existence_negatives([], KINDS, frequency={}, affinity={}, rng=np.random.default_rng(0), **options)


@given(st.lists(st.lists(st.sampled_from(KINDS), max_size=5), max_size=8))
def test_statistics_count_each_kind_once_an_image(images):
    statistics = KindStatistics.count(images)
    for kind in KINDS:
        shown = [set(image) for image in images if kind in image]
        assert statistics.frequency[kind] == len(shown)
        affinity = statistics.affinity([kind])
        assert affinity[kind] == 0
        for other in set(KINDS) - {kind}:
            assert affinity[other] == sum(other in image for image in shown)


def test_affinity_adds_up_over_what_is_present():
    statistics = KindStatistics.count([["cup", "table"], ["cup", "spoon"], ["table", "spoon"], ["spoon", "fork"]])
    assert statistics.affinity(["cup", "table"])["spoon"] == 2
    assert statistics.affinity(["cup", "table"])["fork"] == 0
