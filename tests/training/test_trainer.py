"""A step of training: what is summed, what is logged, how it is cut and packed."""

import copy

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator
from age_vlm.data.schema import assistant_message, user_message
from age_vlm.modeling_agevlm.components_agevlm import component_of
from age_vlm.training import AgeVlmTrainer, AlignmentConfig


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (1, 8), (3, 3)])
def test_a_step_is_the_mean_over_all_tokens_and_groundings_however_it_is_cut(
    make_trainer, batch, accumulation, eight_talks, alignment, sgd, weights_after, assert_same, losses_of
):
    trainer = make_trainer(batch=batch, accumulation=accumulation)
    reference = copy.deepcopy(trainer.model).train()
    total, tokens, aligned = losses_of(reference, trainer.data_collator, eight_talks)
    assert len(aligned) == 10
    loss = total / tokens + alignment.weight * aligned.mean()
    loss.backward()
    with torch.no_grad():
        expected = {
            name: p - sgd["learning_rate"] * (p.grad if p.grad is not None else 0)
            for name, p in reference.named_parameters()
        }
    assert_same(weights_after(trainer), expected, rtol=1e-4, atol=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["lm_loss"] == pytest.approx(float(total / tokens), rel=1e-4)
    assert logged["alignment_loss"] == pytest.approx(float(aligned.mean()), rel=1e-4)
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_every_line_of_the_log_adds_up(make_trainer):
    trainer = make_trainer(batch=2, accumulation=2, steps=6, logging_steps=2)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in lines] == [2, 4, 6]
    for entry in lines:
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 0.7 * entry["alignment_loss"], rel=1e-4)
        assert 0 <= entry["attention_mass"] <= 1 and 0 <= entry["pointing_accuracy"] <= 1


def test_attention_is_logged_as_it_is_measured(make_trainer, eight_talks):
    trainer = make_trainer()
    batch = trainer.data_collator(eight_talks)
    grounding = {key: batch.pop(key) for key in GROUNDING_KEYS}
    with torch.no_grad():
        maps = trainer.model(**batch, cross_attention_queries=grounding["grounding_queries"]).cross_attention_maps
    coverage = grounding["grounding_coverage"]
    # One image a row: the map is its attention. Half of four heads, both blocks.
    attention = torch.stack(maps, 1)[:, :, :2].mean((1, 2))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["attention_mass"] == pytest.approx(float((attention * coverage).sum(-1).mean()), rel=1e-4)
    hits = [float(cover[row.argmax()] > 0) for row, cover in zip(attention, coverage)]
    assert logged["pointing_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_training_aligns(make_trainer, talk):
    left = np.zeros((32, 32), bool)
    left[:, :16] = True
    talks = [talk(number, 3, mask=left) for number in range(4)]
    trainer = make_trainer(talks=talks, batch=4, steps=20, optim="adamw_torch", learning_rate=1e-2)
    trainer.train()
    first, *_, last = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert last["attention_mass"] > first["attention_mass"] + 0.2
    assert last["alignment_loss"] < first["alignment_loss"] and last["lm_loss"] < first["lm_loss"]


def test_without_weight_it_is_the_plain_trainer(make_trainer, weights_after, assert_same):
    options = {"steps": 3, "batch": 3, "accumulation": 2, "optim": "adamw_torch", "max_grad_norm": 1.0}
    ours = make_trainer(alignment=AlignmentConfig(weight=0.0), **options)
    plain = make_trainer(cls=Trainer, **options)
    # To rounding: we compute no logits of positions that learn nothing.
    assert_same(weights_after(ours), weights_after(plain), rtol=1e-3, atol=1e-5)
    for line, reference in zip(ours.state.log_history, plain.state.log_history):
        if "loss" in line:
            assert (
                line["loss"] == pytest.approx(reference["loss"], rel=1e-5) == pytest.approx(line["lm_loss"], rel=1e-5)
            )
            assert line["alignment_loss"] > 0  # still watched


def test_a_batch_without_masks_or_images_is_trained_on(make_trainer, talk):
    for talks in ([talk(1, 0), talk(5, 0)], [talk(3, 0, images=0)]):
        trainer = make_trainer(batch=2, talks=talks, steps=2)
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(lines) == 2
        for entry in lines:
            assert entry["loss"] == pytest.approx(entry["lm_loss"], rel=1e-5)
            assert "alignment_loss" not in entry and "pointing_accuracy" not in entry


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_the_aligned_blocks_alike(make_trainer, reentrant, weights_after, assert_same):
    plain = weights_after(make_trainer())
    checkpointed = make_trainer(
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert_same(weights_after(checkpointed), plain, rtol=1e-4, atol=1e-5)
    unaligned = weights_after(make_trainer(alignment=AlignmentConfig(weight=0.0)))
    name = "model.language_model.layers.1.cross_attention.attn.q_proj.weight"
    assert not torch.allclose(plain[name], unaligned[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["nll", "kl", "bce", "dice"])
def test_mixed_precision_stays_finite(make_trainer, form, weights_after):
    trainer = make_trainer(bf16=True, steps=2, alignment=AlignmentConfig(form=form, heads="all"))
    weights = weights_after(trainer)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_the_weight_follows_its_schedule(make_trainer):
    alignment = AlignmentConfig(weight=0.6, final_weight=0.0, schedule="linear", layers=[0, 1])
    trainer = make_trainer(batch=2, steps=4, alignment=alignment)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["alignment_weight"] for entry in lines] == pytest.approx([0.6, 0.4, 0.2, 0.0])
    for entry in lines:
        expected = entry["lm_loss"] + entry["alignment_weight"] * entry["alignment_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)


def test_parts_have_their_own_rates_and_the_same_schedule(make_trainer, sgd):
    options = {"steps": 4, "optim": "adamw_torch", "lr_scheduler_type": "linear", "weight_decay": 0.1}
    plain = make_trainer(**options)
    plain.create_optimizer()
    decayed = {id(p) for group in plain.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    kept = {name for name, p in plain.model.named_parameters() if id(p) in decayed}
    rates = {"vision": 0.0, "cross_attention": 0.5}
    trainer = make_trainer(learning_rates=rates, **options)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    trainer.train()
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["initial_lr"] == rates.get(component_of(name), sgd["learning_rate"]), name
            assert group["lr"] == 0.0  # the end of the schedule
            assert group["weight_decay"] == (0.1 if name in kept else 0.0), name
            seen.add(name)
    assert seen == set(before)
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert {component_of(name) for name in moved} == {"projector", "cross_attention", "language_model"}


def test_columns_must_be_kept(make_trainer):
    with pytest.raises(ValueError, match="^args.remove_unused_columns: got True, expected False"):
        make_trainer(remove_unused_columns=True)


def test_a_block_that_is_not_there_is_one_sentence(make_trainer):
    with pytest.raises(ValueError, match="^alignment.layers: got 2, expected 0 to 1: the model has 2 blocks"):
        make_trainer(alignment=AlignmentConfig(layers=[2])).train()


def test_batches_stay_whole(make_trainer):
    """Neither cut among GPUs of one process, nor among processes: images and masks are not one a row."""
    model, options = make_trainer().model, {"remove_unused_columns": False}
    arguments = TrainingArguments(**options)
    arguments._n_gpu = 4  # as on a machine with four
    trainer = AgeVlmTrainer(model, arguments)
    assert trainer.args.n_gpu == 1 and trainer._train_batch_size == arguments.per_device_train_batch_size
    assert trainer.accelerator.dispatch_batches is False
    arguments = TrainingArguments(**options, accelerator_config={"dispatch_batches": True})
    with pytest.raises(ValueError, match="^args.accelerator_config: got dispatch_batches=True, expected False"):
        AgeVlmTrainer(model, args=arguments)


# Packing


@pytest.fixture
def uneven(eight_talks):
    """Long and short samples in turn."""

    def shortened(sample):
        images = len(sample["images"])
        short = [user_message("dog?", images), assistant_message("no" * (1 + int(sample["id"]) % 3))]
        return sample if int(sample["id"]) % 2 else {**sample, "messages": short, "groundings": []}

    return [shortened(sample) for sample in eight_talks]


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("batch, accumulation", [(8, 1), (3, 2)])
def test_packed_batches_train_as_padded_ones(
    make_trainer, uneven, processor, independent, batch, accumulation, weights_after, assert_same
):
    talks, weights, logs = uneven, [], []
    for packing in (False, True):
        trainer = make_trainer(batch=batch, accumulation=accumulation, steps=2, talks=talks)
        trainer.data_collator = AgeVlmCollator(
            processor, trainer.data_collator.grid, independent_turns=independent, packing=packing, pack_length=600
        )
        rows = [len(trainer.data_collator(part)["input_ids"]) for part in (talks, talks[:3])]
        assert (rows < [8, 3] and rows[1] < 3) if packing else rows == [8, 3]
        weights.append(weights_after(trainer))
        logs.append(trainer.state.log_history)
    assert_same(*weights, rtol=1e-4, atol=1e-5)
    for one, other in zip(*logs):
        for name in {"lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy", "loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


# Starting again


def test_smaller_batches_begin_a_new_log(make_trainer, monkeypatch):
    """`auto_find_batch_size` begins again where memory is too small."""
    options = {"learning_rate": 0.0, "logging_steps": 2, "steps": 2}
    trainer = make_trainer(batch=8, auto_find_batch_size=True, **options)
    step, calls = trainer.training_step, []

    def training_step(*args, **kwargs):
        calls.append(None)
        loss = step(*args, **kwargs)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(trainer, "training_step", training_step)
    trainer.train()
    smaller = trainer._train_batch_size
    assert smaller < 8 and len(calls) == 4
    reference = make_trainer(batch=smaller, **options)
    reference.train()
    for name in ("loss", "lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy"):
        line, expected = (each.state.log_history[0] for each in (trainer, reference))
        assert line[name] == pytest.approx(expected[name], rel=1e-6), name


def test_a_second_training_begins_a_new_log(make_trainer):
    trainer = make_trainer(steps=3, batch=2, logging_steps=2, learning_rate=0.0)
    for _ in range(2):
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert lines[0]["loss"] == pytest.approx(lines[0]["lm_loss"] + 0.7 * lines[0]["alignment_loss"], rel=1e-4)


def test_the_configuration_keeps_what_was_aligned_from_the_first_step_on(make_trainer, make_model):
    model = make_model()
    trainer = make_trainer(model=model, alignment=AlignmentConfig(layers=[1], heads="all"))
    assert model.config.alignment is None, "looking with another alignment is no training"
    trainer.train()
    assert model.alignment == AlignmentConfig(layers=[1], heads="all")
