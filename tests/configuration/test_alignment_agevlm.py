import itertools

import pytest

from age_vlm import AgeVlmConfig, AlignmentConfig
from age_vlm.configuration.alignment_agevlm import FORMS, WEIGHT_SCHEDULES
from age_vlm.training.alignment import LOSSES


def small(blocks):
    """Configuration of a model with so many cross-attention blocks, and 4 heads."""
    text = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    return AgeVlmConfig(
        text_config={**text, "vocab_size": 30, "head_dim": 4},
        image_token_id=2,
        cross_attention_layers=list(range(blocks)),
    )


def test_every_form_has_a_loss():
    assert set(FORMS) == set(LOSSES)


@pytest.mark.parametrize(
    "heads, total, chosen", [("half", 4, [0, 1]), ("half", 1, [0]), ("all", 3, [0, 1, 2]), ([3, 1], 4, [3, 1])]
)
def test_heads_are_those_that_are_named(heads, total, chosen):
    assert AlignmentConfig(heads=heads).head_indices(total) == chosen


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"form": "nil"}, "alignment.form: got 'nil', expected one of nll, kl, .*nearest: 'nll'."),
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
    AlignmentConfig(layers=[1], heads=[3]).check(small(2))
    with pytest.raises(ValueError, match="^alignment.layers: got 3, expected 0 to 1: the model has 2 blocks"):
        AlignmentConfig(layers=[0, 3, 2]).check(small(2))
    for heads in ([4], [0, 5, 4]):  # the first of several is named
        with pytest.raises(
            ValueError, match=f"^alignment.heads: got {max(heads)}, expected 0 to 3: the model has 4 heads"
        ):
            AlignmentConfig(heads=heads).check(small(1))


def test_the_weight_goes_from_first_to_last():
    steps = 11
    paths = {
        name: [AlignmentConfig(weight=0.4, final_weight=0.1, schedule=name).weight_at(i, steps) for i in range(steps)]
        for name in WEIGHT_SCHEDULES
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
