"""Steps that cannot be learned from: stopped, skipped, or kept in the log, with the names of their samples."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from age_vlm.training import AgeVlmTrainer, AlignmentConfig
from age_vlm.training.loss_watch import gradient_norm


def test_a_step_without_a_token_to_learn_is_named(make_trainer, eight_talks):
    questions = [{**sample, "messages": sample["messages"][:1], "groundings": []} for sample in eight_talks[:2]]
    trainer = make_trainer(batch=2, steps=2, talks=[*eight_talks[2:4], *questions])
    with pytest.raises(ValueError, match="^labels: got no token to learn at step 2.*samples 0, 1") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^labels: got an evaluation batch without a token to learn"):
        trainer.evaluate(questions)
    half = make_trainer(batch=1, accumulation=2, talks=[questions[0], eight_talks[2]])
    half.train()  # the step has some
    assert np.isfinite(half.state.log_history[0]["loss"])


@pytest.fixture
def make_poisoned(make_trainer, poisoned_collator):
    def make(names, non_finite="stop", **options):
        trainer = make_trainer(batch=2, accumulation=2, **options)
        trainer.data_collator = poisoned_collator(trainer.data_collator, names)
        trainer.non_finite = non_finite
        return trainer

    return make


def bad_steps(trainer):
    return [json.loads(line) for line in trainer.bad_batches.read_text("utf-8").splitlines()]


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_learned(
    make_trainer, make_poisoned, weights_after, assert_same
):
    trainer = make_poisoned(["6"], steps=2, logging_nan_inf_filter=False)
    with pytest.raises(
        ValueError,
        match=r"^training: at step 2 the loss is nan, with the samples 6, 7, expected finite numbers \(.*jsonl",
    ) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert_same(
        {name: p.detach() for name, p in trainer.model.named_parameters()},
        weights_after(make_trainer(batch=2, accumulation=2)),
        rtol=0,
        atol=0,
    )
    assert bad_steps(trainer) == [{"step": 2, "loss": "nan", "grad_norm": "nan", "sample_ids": [["6", "7"]]}]


def test_a_step_that_is_skipped_leaves_nothing_behind(
    make_trainer, make_poisoned, eight_talks, weights_after, assert_same
):
    options = {"optim": "adamw_torch", "weight_decay": 0.3}
    trainer = make_poisoned(["0"], "skip", steps=2, logging_steps=2, **options)
    skipped = weights_after(trainer)
    reference = make_trainer(batch=2, accumulation=2, talks=eight_talks[4:], **options)
    assert_same(skipped, weights_after(reference), rtol=0, atol=0)
    event, line, *_ = trainer.state.log_history
    assert event == {"event": "skipped", "step": 1, "loss": "nan", "grad_norm": "nan", "sample_ids": [["0", "1"]]}
    for name in ("lm_loss", "alignment_loss", "attention_mass"):
        assert line[name] == pytest.approx(reference.state.log_history[0][name], rel=1e-6), name
    assert np.isfinite(line["loss"]) and trainer.state.global_step == 2


def test_a_gradient_that_overflows_is_that_of_the_whole_step(make_trainer):
    trainer = make_trainer(batch=3, accumulation=2)
    trainer.model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        ValueError, match="the gradient's norm is nan, the loss [0-9.]+, with the samples 0, 1, 2, 3, 4, 5,"
    ):
        trainer.train()
    assert bad_steps(trainer)[0]["sample_ids"] == [["0", "1", "2"], ["3", "4", "5"]]


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_a_gradient_of_finite_numbers_without_a_finite_norm_is_not_clipped_to_zeros(
    make_trainer, non_finite, assert_same
):
    trainer = make_trainer(batch=3, max_grad_norm=1.0)
    trainer.non_finite = non_finite
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.model.get_input_embeddings().weight.register_hook(lambda gradient: gradient + 1e30)
    if non_finite == "stop":
        with pytest.raises(ValueError, match="^training: at step 1 the gradient's norm is inf, the loss [0-9.]+, with"):
            trainer.train()
    else:
        trainer.train()
    assert (bad_steps(trainer)[0]["step"], bad_steps(trainer)[0]["grad_norm"]) == (1, "inf")
    assert_same(trainer.model.state_dict(), before, rtol=0, atol=0)


def test_a_gradient_is_measured_once_in_a_step_and_before_it_is_clipped(make_trainer, monkeypatch):
    trainer = make_trainer(batch=3, accumulation=2, steps=2, logging_steps=1, max_grad_norm=1e-3)
    norms = []
    monkeypatch.setattr(
        "age_vlm.training.loss_watch.gradient_norm",
        lambda model: norms.append(gradient_norm(model)) or norms[-1],
    )
    trainer.train()
    assert norms == pytest.approx([line["grad_norm"] for line in trainer.state.log_history[:2]], rel=1e-5)


def test_a_model_that_is_broken_is_not_skipped_for_ever(make_poisoned):
    trainer = make_poisoned([str(number) for number in range(8)], "skip", steps=30)
    with pytest.raises(ValueError, match="^training: at step 10, the 10th step in a row, the loss is nan"):
        trainer.train()
    assert len(bad_steps(trainer)) == 10


def test_a_spike_is_kept_in_the_log_with_its_samples(make_trainer, eight_talks, without_masks):
    with torch.no_grad():
        trainer = make_trainer()
        collator = trainer.data_collator
        losses = [float(trainer.model(**without_masks(collator([each])), use_cache=False).loss) for each in eight_talks]
    calm, high = (dict(eight_talks[losses.index(each)]) for each in (min(losses), max(losses)))
    assert max(losses) > 1.11 * min(losses)  # ten times the least deviation, 1% of the median
    high["id"] = "high"
    options = {"batch": 1, "steps": 25, "learning_rate": 0.0, "alignment": AlignmentConfig(weight=0.0)}
    trainer = make_trainer(talks=[*[calm] * 22, high, calm, calm], **options)
    trainer.train()
    (event,) = (entry for entry in trainer.state.log_history if "event" in entry)
    assert (event["event"], event["step"], event["sample_ids"]) == ("spike", 23, [["high"]])
    assert event["loss"] == pytest.approx(max(losses), rel=1e-4)
    assert event["usual_loss"] == pytest.approx(min(losses), rel=1e-4)
    assert not trainer.bad_batches.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_not_as_it_should_be_is_named(make_trainer, workers, eight_talks):
    bad = {**eight_talks[3], "groundings": [{**eight_talks[2]["groundings"][0], "image": 4}]}
    trainer = make_trainer(
        batch=2, steps=4, talks=[*eight_talks[:3], bad, *eight_talks[4:]], dataloader_num_workers=workers
    )
    with pytest.raises(
        ValueError, match="^training data: sample '3' .number 3. could not be used: groundings.0. points at image 4"
    ) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.state.global_step == 1  # what was before it is trained on


def test_what_becomes_of_bad_steps_is_one_of_two(make_trainer):
    with pytest.raises(ValueError, match="^non_finite: got 'ignore', expected 'stop' or 'skip'"):
        AgeVlmTrainer(make_trainer().model, TrainingArguments(remove_unused_columns=False), non_finite="ignore")
