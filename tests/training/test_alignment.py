import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.evaluation.attention import chosen_heads
from age_vlm.training.alignment import FORMS, SCHEDULES, AlignmentConfig, alignment_losses


CELLS = 12


def attention_of(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@st.composite
def coverages(draw):
    """Shares of cells that a mask covers, at least one of them not 0."""
    share = st.sampled_from([0.0, 0.0, 0.25, 0.6, 1.0])
    cells = draw(st.lists(share, min_size=CELLS, max_size=CELLS).filter(any))
    return torch.tensor(cells)


@pytest.mark.parametrize("form", FORMS)
@given(coverage=coverages(), seed=st.integers(0, 10_000), step=st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_no_attention_is_better_than_the_mask_itself(form, coverage, seed, step):
    """KL, BCE and Dice want the mask's own shares; the mass inside is largest on the best covered cells."""
    target = coverage / coverage.sum()
    if form == "nll":
        best = (coverage == coverage.max()).float()
        target = best / best.sum()
    other = attention_of(seed, CELLS)
    mixed = (1 - step) * target + step * other
    loss = FORMS[form](target, coverage)
    assert FORMS[form](mixed, coverage) >= loss - 1e-5
    assert torch.isfinite(loss)


@pytest.mark.parametrize("form", FORMS)
def test_the_mask_itself_costs_what_the_definition_says(form):
    coverage = torch.tensor([0.0, 1.0, 1.0, 0.0])
    target = coverage / 2
    assert FORMS[form](target, coverage).abs() < 1e-4
    uniform = torch.full((4,), 0.25)
    inside, cells = torch.tensor(0.5), 4
    expected = {
        "nll": -inside.log(),
        "kl": torch.nn.functional.kl_div(uniform.log(), target, reduction="sum"),
        # Scaled by the two cells of the mask, an even spread over it would be 1 and the uniform one is a half.
        "bce": torch.nn.functional.binary_cross_entropy(torch.full((cells,), 0.5), coverage),
        "dice": 1 - 2 * (0.5 + 0.5) / (cells * 0.25 + 2),
    }[form]
    assert FORMS[form](uniform, coverage) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@given(coverage=coverages(), seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_loss_falls_as_mass_moves_to_the_mask(form, coverage, seed):
    coverage = (coverage > 0).float()
    if coverage.all():
        coverage[0] = 0
    target = coverage / coverage.sum()
    outside = (1 - coverage) * attention_of(seed, CELLS)
    outside = outside / outside.sum()
    losses = [FORMS[form](share * target + (1 - share) * outside, coverage) for share in (0.05, 0.3, 0.6, 0.95)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_step_moves_attention_into_the_mask(form):
    scores = torch.randn(5, 2, 4, CELLS, requires_grad=True)
    coverage = torch.zeros(5, CELLS)
    coverage[:, 2:4] = 1
    config = AlignmentConfig(form=form, heads="all")
    losses = alignment_losses(scores.softmax(-1), coverage, config)
    assert losses.shape == (5,)
    losses.sum().backward()
    assert torch.isfinite(scores.grad).all()
    before, after = (value.softmax(-1)[..., 2:4].sum(-1) for value in (scores, scores - scores.grad))
    assert (after > before).all()


@pytest.mark.parametrize("form", FORMS)
def test_extreme_attention_has_a_finite_loss_and_gradient(form):
    coverage = torch.eye(CELLS)[:2]
    scores = torch.zeros(2, 1, 1, CELLS)
    scores[0, ..., 0] = 200.0  # all on the mask
    scores[1, ..., 5] = 200.0  # nothing on it
    scores.requires_grad_()
    losses = alignment_losses(scores.softmax(-1), coverage, AlignmentConfig(form=form))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(scores.grad).all()
    assert losses[0] < losses[1]


def test_only_the_chosen_heads_are_trained():
    for heads, chosen in (("half", [0, 1]), ("all", [0, 1, 2, 3]), ([3], [3])):
        attention = attention_of(0, 3, 1, 4, CELLS).requires_grad_()
        coverage = (torch.rand(3, CELLS) > 0.5).float()
        coverage[:, 0] = 1
        losses = alignment_losses(attention, coverage, AlignmentConfig(heads=heads))
        each = torch.stack([FORMS["nll"](attention[:, 0, head], coverage) for head in chosen])
        torch.testing.assert_close(losses, each.mean(0))
        losses.sum().backward()
        assert attention.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == chosen
        assert chosen_heads(heads, 4) == chosen
    assert chosen_heads("half", 1) == [0]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"form": "nil"}, "alignment.form: got 'nil', expected one of nll, kl, bce, dice .nearest: 'nll'."),
        ({"form": ""}, "alignment.form: got ''"),
        ({"weight": -0.1}, "alignment.weight: got -0.1"),
        ({"heads": "third"}, "alignment.heads: got 'third'"),
        ({"heads": []}, "alignment.heads: got an empty list"),
        ({"layers": []}, "alignment.layers: got an empty list"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        AlignmentConfig(**settings)
    assert "\n" not in str(caught.value)


def test_blocks_and_heads_that_the_model_lacks_are_refused():
    AlignmentConfig(layers=[1], heads=[3]).check(2, 4)
    with pytest.raises(ValueError, match="alignment.layers"):
        AlignmentConfig(layers=[1]).check(1, 4)
    with pytest.raises(ValueError, match="alignment.heads"):
        AlignmentConfig(heads=[4]).check(1, 4)


def test_the_weight_goes_from_first_to_last():
    steps = 11
    paths = {
        name: [AlignmentConfig(weight=0.4, final_weight=0.1, schedule=name).weight_at(i, steps) for i in range(steps)]
        for name in SCHEDULES
    }
    assert set(paths["constant"]) == {0.4}
    for name in ("linear", "cosine"):
        path = paths[name]
        assert (path[0], path[5], path[-1]) == pytest.approx((0.4, 0.25, 0.1))
        assert all(before > after for before, after in itertools.pairwise(path))
    assert paths["linear"][1] == pytest.approx(0.37)
    assert paths["cosine"][1] > paths["linear"][1]
    # Evaluation before the first step and after the last.
    rising = AlignmentConfig(weight=0.0, final_weight=1.0, schedule="linear")
    assert (rising.weight_at(0, 0), rising.weight_at(7, 7), rising.weight_at(0, 1)) == (0.0, 1.0, 0.0)
