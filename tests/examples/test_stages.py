"""The comparison of stages: both arms get the same, and what came of them is counted alike."""

import importlib.util
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def stages_example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("stages_example", EXAMPLES / "stages.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.mark.parametrize("overrides", [[], ["training.steps=2", "training.batch_size=3"]])
def test_both_arms_have_the_same_budget(stages_example, overrides):
    stages, joint = stages_example.recipes(overrides)
    assert len(stages) == 4
    assert joint.training.steps == sum(stage.training.steps for stage in stages.values())
    same = ("batch_size", "evaluate_every", "learning_rate", "adam_beta2", "weight_decay", "schedule")
    for stage in stages.values():
        assert all(getattr(stage.training, key) == getattr(joint.training, key) for key in same)
        assert (stage.data.test, stage.data.test_seed) == (joint.data.test, joint.data.test_seed)
    assert joint.data.train == sum(stage.data.train for stage in stages.values())
    assert joint.warm_start == stages["stage1"].warm_start
    if not overrides:
        assert joint.training.steps == 1000


def test_a_row_says_when_the_target_was_reached(stages_example):
    curve = [{"step": step, "adversarial_accuracy": value} for step, value in ((1, 0.5), (2, 0.91), (3, 0.95))]
    result = {"arm": "four stages", "seed": 1, "steps": 3, "metrics": {"model": {"a": 0.5}}, "curve": curve}
    row = stages_example.row(result)
    assert row == {
        "arm": "four stages",
        "seed": 1,
        "steps": 3,
        "steps to adversarial 0.90, validation": 2,
        "a": 0.5,
    }
    assert stages_example.row({**result, "curve": curve[:1]})["steps to adversarial 0.90, validation"] == "never"
