import json

import numpy as np
import pytest

from age_vlm.training.loss_watch import FEWEST, WINDOW, BadStep, SpikeWatch, append_bad_step


def spikes(losses, threshold=10.0):
    watch = SpikeWatch(threshold)
    return [number for number, loss in enumerate(losses) if watch.usual(loss) is not None]


def noisy(steps, seed=0, level=2.0):
    return level + 0.1 * np.random.default_rng(seed).standard_normal(steps)


def test_a_loss_that_falls_and_wavers_is_no_spike():
    steps = np.arange(2000)
    falling = 4 * np.exp(-steps / 300) + noisy(2000, level=0.5)
    assert spikes(falling) == []
    assert spikes(noisy(2000) - 2.5) == []  # some are negative
    assert spikes(np.ones(100) + 1e-4 * (steps[:100] % 2)) == []


def test_a_spike_is_found_whatever_spikes_were_before_it():
    losses = noisy(300)
    losses[[5, 60, 61, 62, 250]] = 9.0, 9.0, 12.0, 4.0, 3.5
    # The first is too early to tell, and is only one of those that the median does not follow.
    assert spikes(losses) == [60, 61, 62, 250]
    assert spikes(losses, threshold=60) == [60, 61]
    assert spikes(losses, threshold=0) == []
    assert SpikeWatch(10).usual(5.0) is None
    watch = SpikeWatch(10)
    for loss in losses[:60]:
        watch.usual(loss)
    assert watch.usual(9.0) == pytest.approx(2.0, abs=0.1)


def test_a_loss_that_stays_up_becomes_the_usual_one():
    found = spikes([*noisy(100), *noisy(300, level=9.0)])
    assert found == list(range(100, 100 + FEWEST))
    assert len(SpikeWatch(10).recent) == 0 and SpikeWatch(10).recent.maxlen == WINDOW


def test_a_bad_step_says_what_happened_and_to_which_samples(tmp_path):
    nan, inf = float("nan"), float("inf")
    assert str(BadStep(3, nan, nan, [["a", "b"], ["c"]])) == "the loss is nan, with the samples a, b, c"
    assert str(BadStep(3, 1.5, inf, [["a"]])) == "the gradient's norm is inf, the loss 1.5, with the samples a"
    assert str(BadStep(3, 9.0, 1.0, [["a"]], usual=2.0)).startswith("the loss is 9, far above the usual 2, with")
    assert str(BadStep(3, nan, nan, [[]])) == "the loss is nan"
    many = [str(number) for number in range(50)]
    assert str(BadStep(3, nan, nan, [many])).endswith("30, 31 and 18 more")
    path = tmp_path / "new" / "bad.jsonl"
    for step in (3, 4):
        append_bad_step(path, BadStep(step, nan, inf, [many]))
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in path.read_text("utf-8").splitlines()
    ]
    assert lines[0] == {"step": 3, "loss": "nan", "grad_norm": "inf", "sample_ids": [many]}
    assert [line["step"] for line in lines] == [3, 4]
