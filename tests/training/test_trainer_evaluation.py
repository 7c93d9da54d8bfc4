"""Evaluation and prediction: the logits, and what training logs."""

import numpy as np
import pytest
import torch
from transformers import Trainer

from age_vlm.training import AgeVlmTrainer


@pytest.mark.parametrize("trained", ["before", "after"])
def test_evaluation_takes_each_batch_by_itself(make_trainer, trained, eight_talks, alignment, losses_of):
    trainer = make_trainer(talks=eight_talks[:3], batch=8, learning_rate=0.0)
    if trained == "after":
        trainer.train_dataset = eight_talks
        trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        total, tokens, aligned = losses_of(trainer.model, trainer.data_collator, eight_talks[:3])
    assert loss == pytest.approx(float(total / tokens + alignment.weight * aligned.mean()), rel=1e-4)


@pytest.fixture(scope="module")
def mixed(eight_talks, talk):
    """With several images, too."""
    return [*eight_talks[:5], talk(8, 2, images=3), talk(9, 0, images=2), talk(10, 1, images=2)]


@pytest.mark.parametrize("cls", [AgeVlmTrainer, Trainer])
@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_predictions_are_the_logits(make_trainer, mixed, cls, independent, batch, without_masks):
    seen = {}

    def measure(prediction):
        seen.update(predictions=prediction.predictions, labels=prediction.label_ids)
        return {"rows": len(prediction.label_ids)}

    trainer = make_trainer(
        cls=cls, talks=mixed, batch=batch, independent=independent, options={"compute_metrics": measure}
    )
    assert trainer.evaluate()["eval_rows"] == len(mixed)
    found = trainer.predict(mixed)
    assert found.metrics["test_rows"] == len(mixed)
    for predictions, labels in ((seen["predictions"], seen["labels"]), (found.predictions, found.label_ids)):
        assert isinstance(predictions, np.ndarray)
        assert predictions.shape == (*labels.shape, 300) and labels.shape[0] == len(mixed)
    with torch.no_grad():
        for number, sample in enumerate(mixed):
            batch = without_masks(trainer.data_collator([sample]))
            logits = trainer.model(**batch, use_cache=False).logits[0].numpy()
            np.testing.assert_allclose(found.predictions[number, : len(logits)], logits, atol=2e-4)


def test_predictions_without_labels_need_none(make_trainer, eight_talks):
    trainer = make_trainer(talks=eight_talks[:3])
    collator = trainer.data_collator
    expected = trainer.predict(eight_talks[:3]).predictions
    trainer.data_collator = lambda samples: {k: v for k, v in collator(samples).items() if k != "labels"}
    found = trainer.predict(eight_talks[:3])
    np.testing.assert_array_equal(found.predictions, expected)
    assert not {name for name in found.metrics if "loss" in name or "attention" in name}, "nothing was measured"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_says_what_training_logs(make_trainer, batch, eight_talks, alignment, losses_of):
    trainer = make_trainer(batch=batch)
    figures = trainer.evaluate(metric_key_prefix="held")
    with torch.no_grad():
        total, tokens, aligned = losses_of(trainer.model, trainer.data_collator, eight_talks)
    assert figures["held_lm_loss"] == pytest.approx(float(total / tokens), rel=1e-4)
    assert figures["held_alignment_loss"] == pytest.approx(float(aligned.mean()), rel=1e-4)
    training = make_trainer(learning_rate=0.0)
    training.train()
    for name in ("lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy"):
        assert figures[f"held_{name}"] == pytest.approx(training.state.log_history[0][name], rel=1e-4), name
    if batch == 8:
        assert figures["held_loss"] == pytest.approx(
            figures["held_lm_loss"] + alignment.weight * figures["held_alignment_loss"], rel=1e-4
        )
    assert trainer.predict(eight_talks).metrics["test_attention_mass"] == pytest.approx(figures["held_attention_mass"])
    logged = trainer.state.log_history[0]
    assert logged["held_lm_loss"] == figures["held_lm_loss"]


def test_evaluation_without_masks_says_nothing_of_them(make_trainer, eight_talks):
    figures = make_trainer(talks=[eight_talks[1], eight_talks[3]]).evaluate()
    assert figures["eval_lm_loss"] == pytest.approx(figures["eval_loss"], rel=1e-5)
    assert not {"eval_alignment_loss", "eval_attention_mass", "eval_pointing_accuracy"} & figures.keys()


def test_evaluation_on_the_way_leaves_the_log_of_training_alone(make_trainer):
    options = {"steps": 4, "batch": 2, "logging_steps": 2}
    plain, evaluated = make_trainer(**options), make_trainer(**options, eval_strategy="steps", eval_steps=1)
    for trainer in (plain, evaluated):
        trainer.train()
    lines = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (plain, evaluated)]
    assert lines[0] == lines[1]
    assert sum("eval_alignment_loss" in entry for entry in evaluated.state.log_history) == 4
