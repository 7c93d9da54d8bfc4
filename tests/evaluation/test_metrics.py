import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from age_vlm.evaluation.metrics import (
    accuracy_by_kind,
    attention_mass,
    auc,
    class_auc,
    exact_match,
    macro_auc,
    pointing_hit,
)


@dataclass
class AskedQuestion:
    id: str
    answer: str
    kind: str


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
def test_attention_mass_is_a_share(n, cells, seed):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(n, cells, generator=generator).softmax(-1)
    coverage = torch.rand(n, cells, generator=generator)
    mass = attention_mass(attention, coverage)
    torch.testing.assert_close(mass + attention_mass(attention, 1 - coverage), torch.ones(n))
    torch.testing.assert_close(attention_mass(attention, torch.ones_like(coverage)), torch.ones(n))
    uniform = attention_mass(torch.full((n, cells), 1 / cells), coverage)
    torch.testing.assert_close(uniform, coverage.mean(-1))


@given(st.integers(2, 12), st.data())
def test_pointing_hits_exactly_where_the_peak_touches_the_mask(cells, data):
    peak, covered = data.draw(st.integers(0, cells - 1)), data.draw(st.integers(0, cells - 1))
    attention, coverage = torch.full((1, cells), 0.1), torch.zeros(1, cells)
    attention[0, peak], coverage[0, covered] = 0.5, 0.01
    hit = pointing_hit(attention, coverage)
    assert hit.dtype == torch.bool and hit.tolist() == [peak == covered]


def test_shapes_that_differ_are_named():
    for measure in (attention_mass, pointing_hit):
        with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 5\)"):
            measure(torch.ones(2, 4), torch.ones(2, 5))


scored = st.lists(st.tuples(st.integers(-30, 30), st.booleans(), st.sampled_from("abc")), min_size=1, max_size=40)


@given(scored)
def test_auc_is_the_share_of_ordered_pairs(rows):
    scores, labels = [float(score) for score, _, _ in rows], [label for _, label, _ in rows]
    pairs = [
        (positive > negative) + 0.5 * (positive == negative)
        for positive, is_positive in zip(scores, labels)
        if is_positive
        for negative, other in zip(scores, labels)
        if not other
    ]
    value = auc(scores, labels)
    assert math.isnan(value) if not pairs else value == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_auc_separates_large_logits():
    assert auc([-4000.0, -3000.0, -2000.0, 1.0], [False, False, True, True]) == pytest.approx(1)


@given(scored)
def test_macro_auc_is_the_mean_of_the_classes_with_both_labels(rows):
    scores, labels, classes = zip(*rows)
    expected = []
    for name in dict.fromkeys(classes):
        mine = [(score, label) for score, label, other in rows if other == name]
        if len({label for _, label in mine}) == 2:
            expected.append(auc([float(score) for score, _ in mine], [label for _, label in mine]))
    assert len(class_auc(scores, labels, classes)) == len(expected)
    value = macro_auc(scores, labels, classes)
    assert value == pytest.approx(sum(expected) / len(expected)) if expected else math.isnan(value)


def test_class_prior_has_no_macro_auc_of_its_own():
    labels, classes = [True, True, False, False, False, True], list("aaabbb")
    prior = {"a": 2 / 3, "b": 1 / 3}
    scores = [prior[name] for name in classes]
    assert macro_auc(scores, labels, classes) == 0.5
    assert auc(scores, labels) > 0.5


@pytest.mark.parametrize(
    ("scores", "labels", "message"), [([1.0], [True, False], r"\(1,\) and \(2,\)"), ([float("nan")], [True], "finite")]
)
def test_auc_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        auc(scores, labels)


def test_accuracy_by_kind():
    questions = [
        AskedQuestion("1", "yes", "existence"),
        AskedQuestion("2", "no", "existence"),
        AskedQuestion("3", "three", "count"),
    ]
    answers = {"3": "Three.", "2": "yes", "1": " yes "}
    assert accuracy_by_kind(questions, answers) == {"existence": 0.5, "count": 1.0}
    assert not exact_match("three circles", "three")
    with pytest.raises(ValueError, match="none for '3'"):
        accuracy_by_kind(questions, {"1": "yes", "2": "no"})
