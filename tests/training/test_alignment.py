import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm import AlignmentConfig
from age_vlm.training.alignment import LOSSES, alignment_losses


CELLS = 12


def attention_of(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@st.composite
def coverages(draw):
    """Shares of cells that a mask covers, at least one of them not 0."""
    share = st.sampled_from([0.0, 0.0, 0.25, 0.6, 1.0])
    cells = draw(st.lists(share, min_size=CELLS, max_size=CELLS).filter(any))
    return torch.tensor(cells)


@pytest.mark.parametrize("form", LOSSES)
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
    loss = LOSSES[form](target, coverage)
    assert LOSSES[form](mixed, coverage) >= loss - 1e-5
    assert torch.isfinite(loss)


@pytest.mark.parametrize("form", LOSSES)
def test_the_mask_itself_costs_what_the_definition_says(form):
    coverage = torch.tensor([0.0, 1.0, 1.0, 0.0])
    target = coverage / 2
    assert LOSSES[form](target, coverage).abs() < 1e-4
    uniform = torch.full((4,), 0.25)
    inside, cells = torch.tensor(0.5), 4
    expected = {
        "nll": -inside.log(),
        "kl": torch.nn.functional.kl_div(uniform.log(), target, reduction="sum"),
        # Scaled by the two cells of the mask, an even spread over it would be 1 and the uniform one is a half.
        "bce": torch.nn.functional.binary_cross_entropy(torch.full((cells,), 0.5), coverage),
        "dice": 1 - 2 * (0.5 + 0.5) / (cells * 0.25 + 2),
    }[form]
    assert LOSSES[form](uniform, coverage) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("form", LOSSES)
@given(coverage=coverages(), seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_loss_falls_as_mass_moves_to_the_mask(form, coverage, seed):
    coverage = (coverage > 0).float()
    if coverage.all():
        coverage[0] = 0
    target = coverage / coverage.sum()
    outside = (1 - coverage) * attention_of(seed, CELLS)
    outside = outside / outside.sum()
    losses = [LOSSES[form](share * target + (1 - share) * outside, coverage) for share in (0.05, 0.3, 0.6, 0.95)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("form", LOSSES)
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


@pytest.mark.parametrize("form", LOSSES)
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
        each = torch.stack([LOSSES["nll"](attention[:, 0, head], coverage) for head in chosen])
        torch.testing.assert_close(losses, each.mean(0))
        losses.sum().backward()
        assert attention.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == chosen
