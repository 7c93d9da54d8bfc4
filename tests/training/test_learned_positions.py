"""Logits of learned positions alone give the loss and the gradients of all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.training.learned_positions import learned_positions


@given(st.lists(st.lists(st.sampled_from([-100, 3, 5]), min_size=6, max_size=6), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_the_loss_is_that_of_all_positions(make_model_once, rows):
    model = make_model_once
    labels = torch.tensor(rows)
    ids = torch.randint(7, 40, labels.shape, generator=torch.Generator().manual_seed(0))
    found = learned_positions(labels)
    learned = int((labels[:, 1:] != -100).sum())
    assert bool(found) == bool(learned)
    if not learned:
        return
    whole = model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=learned)
    some = model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=learned, **found)
    assert some.logits.shape[1] == len(found["logits_to_keep"]) < labels.shape[1]
    assert some.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)


def test_without_labels_nothing_is_asked():
    assert learned_positions(None) == {}


def test_training_computes_no_other_logits_and_evaluation_all(make_trainer):
    trainer = make_trainer(steps=1)
    shapes = []
    trainer.model.lm_head.register_forward_hook(lambda head, args, output: shapes.append(output.shape[1]))
    trainer.train()
    length = trainer.data_collator(trainer.train_dataset)["labels"].shape[1]
    assert all(shape < length for shape in shapes)
    shapes.clear()
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert predictions.shape[1] == length == shapes[0]


def test_smoothed_labels_are_learned_as_before(make_trainer):
    """transformers' smoother is given the logits: it needs all."""
    trainer = make_trainer(steps=1, label_smoothing_factor=0.1)
    shapes = []
    trainer.model.lm_head.register_forward_hook(lambda head, args, output: shapes.append(output.shape[1]))
    trainer.train()
    assert shapes == [trainer.data_collator(trainer.train_dataset)["labels"].shape[1]]


@pytest.fixture(scope="module")
def make_model_once(request):
    return request.getfixturevalue("make_model")().eval()
