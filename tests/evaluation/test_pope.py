from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from age_vlm.evaluation.pope import SCORERS, PopeRecord, join_answers, parse, score


@dataclass
class AskedQuestion:
    id: str
    answer: str
    mode: str | None = None


@pytest.mark.parametrize(
    ("answer", "official", "vlmevalkit", "lmms"),
    [
        ("yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no"),
        (" Yes\n", "yes", "yes", "yes"),
        ("Yes.", "yes", "yes", "unknown"),
        ("No.", "no", "no", "unknown"),
        ("NO", "yes", "no", "no"),
        ("No, there is a dog.", "no", "no", "unknown"),
        ("There is not a dog.", "no", "unknown", "unknown"),
        ("A dog. no", "yes", "no", "unknown"),
        ("no\n", "yes", "no", "no"),
        ("yes and no", "no", "unknown", "unknown"),
        ("nothing", "yes", "unknown", "unknown"),
        ("", "yes", "unknown", "unknown"),
        ("yes,sure", "yes", "yes", "unknown"),
        ("yes,sure, ok", "yes", "unknown", "unknown"),
        ("yes/no 1,000", "yes", "unknown", "unknown"),
        ("yes!", "yes", "yes", "unknown"),
    ],
)
def test_parsers_disagree_as_the_projects_do(answer, official, vlmevalkit, lmms):
    assert [parse(answer, scorer) for scorer in SCORERS] == [official, vlmevalkit, lmms]


@given(st.text(alphabet="yesnoYESNOt ,.;!/1-", max_size=40), st.sampled_from(SCORERS))
def test_any_text_parses(answer, scorer):
    assert parse(answer, scorer) in ({"yes", "no"} if scorer == "official" else {"yes", "no", "unknown"})


@given(st.text(max_size=40))
def test_lmms_eval_accepts_least(answer):
    strict = parse(answer, "lmms-eval")
    if strict != "unknown":
        assert parse(answer, "vlmevalkit") == strict


rows = st.lists(
    st.tuples(
        st.sampled_from(["yes", "no"]),
        st.sampled_from(["yes", "no", "No", "Yes.", "perhaps", "yes and no"]),
        st.sampled_from(["random", "popular", "adversarial"]),
    ),
    min_size=1,
    max_size=40,
)


def records_of(table):
    return [PopeRecord(str(i), label, answer, mode) for i, (label, answer, mode) in enumerate(table)]


def counted(pairs, scorer):
    """The metrics by direct counting over (label, answer)."""
    read = [(label, parse(answer, scorer)) for label, answer in pairs]
    precise = [label == "yes" for label, said in read if said == "yes"]
    recallable = [
        said == "yes" for label, said in read if label == "yes" and (scorer != "lmms-eval" or said != "unknown")
    ]
    precision = sum(precise) / len(precise) if precise else 0.0
    recall = sum(recallable) / len(recallable) if recallable else 0.0
    yes = [(label if scorer == "lmms-eval" else said) == "yes" for label, said in read]
    return {
        "accuracy": sum(label == said for label, said in read) / len(read),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": sum(yes) / len(yes),
    }


@given(rows, st.sampled_from(SCORERS))
def test_splits_match_direct_counting(table, scorer):
    result = score(records_of(table), scorer)
    assert set(result["splits"]) == {mode for _, _, mode in table}
    for mode, metrics in result["splits"].items():
        expected = counted([(label, answer) for label, answer, where in table if where == mode], scorer)
        assert {key: metrics[key] for key in expected} == pytest.approx(expected)


@given(rows, st.sampled_from(["vlmevalkit", "lmms-eval"]))
def test_pooled_aggregate(table, scorer):
    expected = counted([(label, answer) for label, answer, _ in table], scorer)
    aggregate = score(records_of(table), scorer)["aggregate"]
    assert {key: aggregate[key] for key in expected} == pytest.approx(expected)


@given(rows)
def test_official_aggregate_is_the_mean_of_the_splits(table):
    result = score(records_of(table), "official")
    f1 = [metrics["f1"] for metrics in result["splits"].values()]
    assert result["aggregate"]["f1"] == pytest.approx(sum(f1) / len(f1))
    assert result["aggregate"]["count"] == len(table)


@given(rows, st.sampled_from(SCORERS), st.randoms(use_true_random=False))
def test_order_does_not_matter(table, scorer, random):
    questions = [AskedQuestion(str(i), label, mode) for i, (label, _, mode) in enumerate(table)]
    answers = [(str(i), answer) for i, (_, answer, _) in enumerate(table)]
    random.shuffle(answers)
    shuffled, straight = score(join_answers(questions, answers), scorer), score(records_of(table), scorer)
    assert shuffled == straight


@given(st.lists(st.sampled_from(["yes", "no"]), min_size=1))
def test_right_answers_score_one(labels):
    for scorer in SCORERS:
        metrics = score([PopeRecord(str(i), label, label) for i, label in enumerate(labels)], scorer)["aggregate"]
        assert metrics["accuracy"] == 1
        assert metrics["f1"] == (1 if "yes" in labels else 0)


def test_lmms_eval_ignores_unknown_in_recall_but_not_in_accuracy():
    records = [PopeRecord("a", "yes", "yes"), PopeRecord("b", "yes", "perhaps")]
    lmms, kit = score(records, "lmms-eval")["aggregate"], score(records, "vlmevalkit")["aggregate"]
    assert (lmms["recall"], kit["recall"]) == (1, 0.5)
    assert lmms["accuracy"] == kit["accuracy"] == 0.5
    assert (lmms["yes_ratio"], lmms["predicted_yes_ratio"]) == (1, 0.5)


def test_equal_records_are_one_in_a_set():
    records = [PopeRecord("a", "yes", "no", "random") for _ in range(2)]
    assert {*records, PopeRecord("a", "yes", "no")} == {records[0], PopeRecord("a", "yes", "no")}


def test_question_of_several_modes_counts_in_each():
    records = [PopeRecord("a", "yes", "yes", "random,popular"), PopeRecord("b", "no", "yes", "random")]
    result = score(records, "vlmevalkit")
    assert {mode: metrics["count"] for mode, metrics in result["splits"].items()} == {"random": 2, "popular": 1}
    assert result["aggregate"]["count"] == 3


@pytest.mark.parametrize(
    ("ids", "answers", "message"),
    [
        (["a", "b"], {"a": "yes"}, "none for 1 of 2 .*'b'"),
        (["a"], {"a": "yes", "z": "no"}, "1 unknown .*'z'"),
        (["a", "a"], {"a": "yes"}, "questions: got 'a' 2 times"),
        (["a"], [("a", "yes"), ("a", "no")], "answers: got 'a' 2 times"),
    ],
)
def test_join_names_the_bad_id(ids, answers, message):
    with pytest.raises(ValueError, match=message):
        join_answers([AskedQuestion(key, "yes") for key in ids], answers)


@pytest.mark.parametrize(
    ("records", "scorer", "message"),
    [
        ([], "official", "at least one"),
        ([PopeRecord("a", "maybe", "yes")], "official", "'a': got 'maybe', expected yes or no"),
        ([PopeRecord("a", "yes", "yes")] * 2, "official", "'a' 2 times"),
        ([PopeRecord("a", "yes", "yes")], "strict", "got 'strict', expected one of official, vlmevalkit, lmms-eval"),
    ],
)
def test_score_refuses(records, scorer, message):
    with pytest.raises(ValueError, match=message):
        score(records, scorer)
