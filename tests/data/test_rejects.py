import pytest

from age_vlm.data.rejects import LeftOut, Unusable, reported


def refuse(reason):
    raise Unusable(reason)


def test_reasons_are_counted_with_their_first_record():
    left_out = LeftOut()
    assert left_out.attempt("a", lambda x: x + 1, 1) == 2
    for record in ("b", "c"):
        assert left_out.attempt(record, refuse, "too dark") is None
    left_out.attempt("d", lambda: {}["image"])
    left_out.attempt("e", lambda: len(None))
    assert left_out.total == 4 and left_out.examples["too dark"] == "b"
    assert left_out.counts == {
        "too dark": 2,
        "record lacks 'image'": 1,
        "record is malformed (TypeError)": 1,
    }
    assert str(left_out).startswith("4 left out; too dark: 2 (first: b); ")
    with pytest.warns(UserWarning, match="this run: 4 left out"):
        left_out.warn("this run")


def test_what_is_no_fault_of_the_record_is_raised():
    with pytest.raises(ZeroDivisionError):
        LeftOut().attempt("a", lambda: 1 / 0)


def test_the_owner_reports_at_the_end():
    own = LeftOut()
    with reported(own, "run") as left_out:
        left_out.add("x", 1)
    assert own.total == 1
    with pytest.warns(UserWarning, match="run: 1 left out; x: 1"), reported(None, "run") as left_out:
        left_out.add("x", 1)
    with reported(None, "run"):
        pass
    assert str(LeftOut()) == "nothing left out"
