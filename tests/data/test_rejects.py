import pytest

from age_vlm.data.rejects import Rejects, Unusable, reported


def refuse(reason):
    raise Unusable(reason)


def test_reasons_are_counted_with_their_first_record():
    rejects = Rejects()
    assert rejects.attempt("a", lambda x: x + 1, 1) == 2
    for record in ("b", "c"):
        assert rejects.attempt(record, refuse, "too dark") is None
    rejects.attempt("d", lambda: {}["image"])
    rejects.attempt("e", lambda: len(None))
    assert rejects.total == 4 and rejects.examples["too dark"] == "b"
    assert rejects.counts == {
        "too dark": 2,
        "record lacks 'image'": 1,
        "record is malformed (TypeError)": 1,
    }
    assert str(rejects).startswith("4 left out; too dark: 2 (first: b); ")
    with pytest.warns(UserWarning, match="this run: 4 left out"):
        rejects.warn("this run")


def test_what_is_no_fault_of_the_record_is_raised():
    with pytest.raises(ZeroDivisionError):
        Rejects().attempt("a", lambda: 1 / 0)


def test_the_owner_reports_at_the_end():
    own = Rejects()
    with reported(own, "run") as rejects:
        rejects.add("x", 1)
    assert own.total == 1
    with pytest.warns(UserWarning, match="run: 1 left out; x: 1"), reported(None, "run") as rejects:
        rejects.add("x", 1)
    with reported(None, "run"):
        pass
    assert str(Rejects()) == "nothing left out"
