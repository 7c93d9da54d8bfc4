"""Records by their identifiers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from age_vlm.data.converters.index import Index, identity
from age_vlm.data.rejects import Rejects, Unusable


@given(st.integers(-(10**15), 10**15))
def test_numbers_and_texts_are_one_identifier(number):
    assert identity(number) == identity(str(number)) == identity(float(number)) == identity(f" {number}\n")
    assert identity(number) != identity(number + 1) and identity(number) != identity(f"0{number}")


@pytest.mark.parametrize("value", [None, "", True, False, 1.5, float("nan"), float("inf"), [], {}, [1]])
def test_what_is_no_identifier_is_unusable(value):
    with pytest.raises(Unusable, match="identifier is"):
        identity(value)


def test_a_record_is_found_under_either_form():
    index = Index("image", Rejects())
    assert index.add("12", "a") and index.add(13, "b")
    assert (index.get(12), index.get("13")) == ("a", "b") and 12 in index and 14 not in index
    with pytest.raises(Unusable, match="^image is unknown$"):
        index.get(14)


@given(st.lists(st.tuples(st.sampled_from([1, "1", 2, 2.0, "x"]), st.sampled_from("ab")), max_size=8))
def test_every_record_is_found_or_counted(records):
    rejects = Rejects()
    index = Index("image", rejects)
    for identifier, record in records:
        index.add(identifier, record)
    meant = {}
    for identifier, record in records:
        meant.setdefault(identity(identifier), set()).add(record)
    assert dict(index.items()) == {key: found.pop() for key, found in meant.items() if len(found) == 1}
    assert len(dict(index.items())) + rejects.total == len(records)
    for key in meant.keys() - dict(index.items()).keys():
        with pytest.raises(Unusable, match="image identifier stands for different records"):
            index.get(key)
