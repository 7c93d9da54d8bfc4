import copy
import inspect
import json
import os
import pickle
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from transformers import PrinterCallback, Trainer, TrainingArguments

from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator
from age_vlm.data.schema import assistant_message, grounding, user_message
from age_vlm.modeling_agevlm.attention_maps_agevlm import attention_on_images
from age_vlm.modeling_agevlm.components_agevlm import component_of
from age_vlm.training import AgeVlmTrainer, AlignmentConfig
from age_vlm.training.alignment import alignment_losses
from age_vlm.training.lora import lora_config
from age_vlm.training.loss_watch import gradient_norm


ALIGNMENT = AlignmentConfig(weight=0.7, layers=[0, 1])
VISION_CONFIG = {
    "model_type": "timm_wrapper",
    "architecture": "convnext_atto",
    "do_pooling": False,
    "model_args": {"features_only": True, "out_indices": [1], "depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]},
    "hidden_size": 16,
}
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def talk(number, groundings, images=1, mask=None):
    """Uneven texts, answers and numbers of masks, so that a mean of means is not the mean."""
    rng = np.random.default_rng(number)
    question = "is there a dog, a cat or a fox" + "?" * (number % 4)
    messages = [user_message(question, images=images), assistant_message("yes" * (1 + number % 3))]
    messages += [user_message("which one?"), assistant_message("the fox")]
    spans = [(0, 11, 16), (0, 18, 23), (3, 0, 7)][:groundings]
    masks = [rng.random((32, 32)) > 0.7 if mask is None else mask for _ in spans]
    return {
        "id": str(number),
        "images": [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(images)],
        "messages": messages,
        "groundings": [grounding(m, start, end, 0, mask) for (m, start, end), mask in zip(spans, masks)],
    }


TALKS = [talk(0, 3), talk(1, 0), talk(2, 1), talk(3, 0, images=0), talk(4, 2), talk(5, 0), talk(6, 1), talk(7, 3)]


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    """Settings -> a trainer of the same model on the same samples in the same order."""
    grid = make_model().image_grid(processor.image_geometry(64, 64).size)

    def make(
        batch=8,
        accumulation=1,
        steps=1,
        talks=TALKS,
        cls=AgeVlmTrainer,
        alignment=ALIGNMENT,
        learning_rates=None,
        model=None,
        independent=True,
        options=None,
        **arguments,
    ):
        settings = {
            "output_dir": str(tmp_path / "trainer"),
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **SGD,
            **arguments,
        }
        collator = AgeVlmCollator(processor, grid, independent_turns=independent)
        if cls is Trainer:
            kwargs = {"data_collator": lambda samples: without_masks(collator(samples))}
        else:
            kwargs = {"data_collator": collator, "alignment": alignment, "learning_rates": learning_rates}
        model = make_model() if model is None else model
        kwargs |= options or {}
        trainer = cls(model, TrainingArguments(**settings), train_dataset=talks, eval_dataset=talks, **kwargs)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


def without_masks(batch):
    return {key: value for key, value in batch.items() if key not in GROUNDING_KEYS}


def weights_after(trainer):
    trainer.train()
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def losses_of(model, collator, talks):
    """(sum over tokens of the language modelling loss, tokens, alignment loss of each grounding), sample by sample."""
    total, tokens, aligned = 0.0, 0, []
    for sample in talks:
        batch = collator([sample])
        grounding = {key: batch.pop(key) for key in GROUNDING_KEYS if key in batch}
        labels = batch["labels"]
        outputs = model(**batch, cross_attention_queries=grounding.get("grounding_queries"), use_cache=False)
        shifted = labels[:, 1:].flatten()
        total = total + torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), shifted, reduction="sum"
        )
        tokens += int((shifted != -100).sum())
        if grounding:
            coverage = grounding["grounding_coverage"]
            attention = attention_on_images(
                outputs.cross_attention_maps, grounding["grounding_slots"], coverage.shape[-1], ALIGNMENT.layers
            )
            aligned.append(alignment_losses(attention, coverage, ALIGNMENT))
    return total, tokens, torch.cat(aligned)


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (1, 8), (3, 3)])
def test_a_step_is_the_mean_over_all_tokens_and_groundings_however_it_is_cut(make_trainer, batch, accumulation):
    trainer = make_trainer(batch=batch, accumulation=accumulation)
    reference = copy.deepcopy(trainer.model).train()
    total, tokens, aligned = losses_of(reference, trainer.data_collator, TALKS)
    assert len(aligned) == 10
    loss = total / tokens + ALIGNMENT.weight * aligned.mean()
    loss.backward()
    with torch.no_grad():
        expected = {
            name: p - SGD["learning_rate"] * (p.grad if p.grad is not None else 0)
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


def test_attention_is_logged_as_it_is_measured(make_trainer):
    trainer = make_trainer()
    batch = trainer.data_collator(TALKS)
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


def test_training_aligns(make_trainer):
    left = np.zeros((32, 32), bool)
    left[:, :16] = True
    talks = [talk(number, 3, mask=left) for number in range(4)]
    trainer = make_trainer(talks=talks, batch=4, steps=20, optim="adamw_torch", learning_rate=1e-2)
    trainer.train()
    first, *_, last = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert last["attention_mass"] > first["attention_mass"] + 0.2
    assert last["alignment_loss"] < first["alignment_loss"] and last["lm_loss"] < first["lm_loss"]


def test_without_weight_it_is_the_plain_trainer(make_trainer):
    options = {"steps": 3, "batch": 3, "accumulation": 2, "optim": "adamw_torch", "max_grad_norm": 1.0}
    ours = make_trainer(alignment=AlignmentConfig(weight=0.0), **options)
    plain = make_trainer(cls=Trainer, **options)
    assert_same(weights_after(ours), weights_after(plain), rtol=0, atol=0)
    for line, reference in zip(ours.state.log_history, plain.state.log_history):
        if "loss" in line:
            assert line["loss"] == reference["loss"] == pytest.approx(line["lm_loss"], rel=1e-5)
            assert line["alignment_loss"] > 0  # still watched


def test_a_batch_without_masks_or_images_is_trained_on(make_trainer):
    for talks in ([talk(1, 0), talk(5, 0)], [talk(3, 0, images=0)]):
        trainer = make_trainer(batch=2, talks=talks, steps=2)
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(lines) == 2
        for entry in lines:
            assert entry["loss"] == pytest.approx(entry["lm_loss"], rel=1e-5)
            assert "alignment_loss" not in entry and "pointing_accuracy" not in entry


@pytest.mark.parametrize("trained", ["before", "after"])
def test_evaluation_takes_each_batch_by_itself(make_trainer, trained):
    trainer = make_trainer(talks=TALKS[:3], batch=8, learning_rate=0.0)
    if trained == "after":
        trainer.train_dataset = TALKS
        trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        total, tokens, aligned = losses_of(trainer.model, trainer.data_collator, TALKS[:3])
    assert loss == pytest.approx(float(total / tokens + ALIGNMENT.weight * aligned.mean()), rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_the_aligned_blocks_alike(make_trainer, reentrant):
    plain = weights_after(make_trainer())
    checkpointed = make_trainer(
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert_same(weights_after(checkpointed), plain, rtol=1e-4, atol=1e-5)
    unaligned = weights_after(make_trainer(alignment=AlignmentConfig(weight=0.0)))
    name = "model.language_model.layers.1.cross_attention.attn.q_proj.weight"
    assert not torch.allclose(plain[name], unaligned[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["nll", "kl", "bce", "dice"])
def test_mixed_precision_stays_finite(make_trainer, form):
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


def test_parts_have_their_own_rates_and_the_same_schedule(make_trainer):
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
            assert group["initial_lr"] == rates.get(component_of(name), SGD["learning_rate"]), name
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


# Packing


def uneven():
    """Long and short samples in turn."""
    for sample in TALKS:
        images = len(sample["images"])
        short = [user_message("dog?", images), assistant_message("no" * (1 + int(sample["id"]) % 3))]
        yield sample if int(sample["id"]) % 2 else {**sample, "messages": short, "groundings": []}


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("batch, accumulation", [(8, 1), (3, 2)])
def test_packed_batches_train_as_padded_ones(make_trainer, processor, independent, batch, accumulation):
    talks, weights, logs = list(uneven()), [], []
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


# Smoothed labels


def smoothed(logits, labels, epsilon=0.1):
    """Sum over the tokens that are learned, and how many these are: each is the next token of the one before."""
    return (
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=epsilon
        ),
        int((labels[:, 1:] != -100).sum()),
    )


def lora(model):
    return get_peft_model(model, lora_config("cross_attention", rank=2))


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["whole", "LoRA"])
@pytest.mark.parametrize("cls", [AgeVlmTrainer, Trainer])
def test_smoothed_labels_are_those_of_the_next_token(make_trainer, make_model, cls, wrap):
    options = {"label_smoothing_factor": 0.1, "learning_rate": 0.0, "batch": 3, "talks": TALKS[:6], "accumulation": 2}
    trainer = make_trainer(cls=cls, model=wrap(make_model()), **options)
    total, tokens, aligned = 0.0, 0, []
    collator = (
        AgeVlmCollator(trainer.data_collator.processor, trainer.data_collator.grid, independent_turns=True)
        if (cls is AgeVlmTrainer)
        else trainer.data_collator
    )
    with torch.no_grad():
        for sample in TALKS[:6]:
            batch = without_masks(collator([sample]))
            one, count = smoothed(trainer.model(**batch, use_cache=False).logits, batch["labels"])
            total, tokens = total + float(one), tokens + count
        if cls is AgeVlmTrainer:
            aligned = losses_of(trainer.model, collator, TALKS[:6])[2]
    expected = total / tokens
    trainer.train()
    logged = trainer.state.log_history[0]
    if cls is AgeVlmTrainer:
        assert logged["lm_loss"] == pytest.approx(expected, rel=1e-4)
        expected += ALIGNMENT.weight * float(aligned.mean())
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)


def test_smoothed_labels_do_not_depend_on_the_name_of_the_class(make_trainer, make_model):
    """Sharding (FSDP2) renames it."""
    model = make_model()
    model.__class__ = type("FSDPAgeVlm", (type(model),), {})
    options = {"label_smoothing_factor": 0.1, "learning_rate": 0.0}
    renamed, plain = make_trainer(model=model, **options), make_trainer(**options)
    for trainer in (renamed, plain):
        trainer.train()
    assert renamed.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]


# Evaluation


MIXED = [*TALKS[:5], talk(8, 2, images=3), talk(9, 0, images=2), talk(10, 1, images=2)]


@pytest.mark.parametrize("cls", [AgeVlmTrainer, Trainer])
@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_predictions_are_the_logits(make_trainer, cls, independent, batch):
    seen = {}

    def measure(prediction):
        seen.update(predictions=prediction.predictions, labels=prediction.label_ids)
        return {"rows": len(prediction.label_ids)}

    trainer = make_trainer(
        cls=cls, talks=MIXED, batch=batch, independent=independent, options={"compute_metrics": measure}
    )
    assert trainer.evaluate()["eval_rows"] == len(MIXED)
    found = trainer.predict(MIXED)
    assert found.metrics["test_rows"] == len(MIXED)
    for predictions, labels in ((seen["predictions"], seen["labels"]), (found.predictions, found.label_ids)):
        assert isinstance(predictions, np.ndarray)
        assert predictions.shape == (*labels.shape, 300) and labels.shape[0] == len(MIXED)
    with torch.no_grad():
        for number, sample in enumerate(MIXED):
            batch = without_masks(trainer.data_collator([sample]))
            logits = trainer.model(**batch, use_cache=False).logits[0].numpy()
            np.testing.assert_allclose(found.predictions[number, : len(logits)], logits, atol=2e-4)


def test_predictions_without_labels_need_none(make_trainer):
    trainer = make_trainer(talks=TALKS[:3])
    collator = trainer.data_collator
    expected = trainer.predict(TALKS[:3]).predictions
    trainer.data_collator = lambda samples: {k: v for k, v in collator(samples).items() if k != "labels"}
    found = trainer.predict(TALKS[:3])
    np.testing.assert_array_equal(found.predictions, expected)
    assert not {name for name in found.metrics if "loss" in name or "attention" in name}, "nothing was measured"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_says_what_training_logs(make_trainer, batch):
    trainer = make_trainer(batch=batch)
    figures = trainer.evaluate(metric_key_prefix="held")
    with torch.no_grad():
        total, tokens, aligned = losses_of(trainer.model, trainer.data_collator, TALKS)
    assert figures["held_lm_loss"] == pytest.approx(float(total / tokens), rel=1e-4)
    assert figures["held_alignment_loss"] == pytest.approx(float(aligned.mean()), rel=1e-4)
    training = make_trainer(learning_rate=0.0)
    training.train()
    for name in ("lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy"):
        assert figures[f"held_{name}"] == pytest.approx(training.state.log_history[0][name], rel=1e-4), name
    if batch == 8:
        assert figures["held_loss"] == pytest.approx(
            figures["held_lm_loss"] + ALIGNMENT.weight * figures["held_alignment_loss"], rel=1e-4
        )
    assert trainer.predict(TALKS).metrics["test_attention_mass"] == pytest.approx(figures["held_attention_mass"])
    logged = trainer.state.log_history[0]
    assert logged["held_lm_loss"] == figures["held_lm_loss"]


def test_evaluation_without_masks_says_nothing_of_them(make_trainer):
    figures = make_trainer(talks=[TALKS[1], TALKS[3]]).evaluate()
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


# Prompt learning


def prompted(model, kind):
    config = {
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "p": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }[kind]
    return get_peft_model(model, config)


def text_options(model):
    """What PEFT reads of the configuration of a language model."""
    text = model.config.text_config
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"):
        setattr(model.config, name, getattr(text, name))
    return model


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["prompt", "p", "prefix"])
def test_virtual_tokens_do_not_move_what_is_aligned(make_trainer, make_model, kind, smoothing):
    model = prompted(text_options(make_model()), kind)
    trainer = make_trainer(
        model=model, independent=False, talks=[TALKS[0], TALKS[2], TALKS[4]], learning_rate=0.0,
        label_smoothing_factor=smoothing,
    )  # fmt: skip
    batch = trainer.data_collator(trainer.train_dataset)
    grounding = {key: batch.pop(key) for key in GROUNDING_KEYS}
    everything = torch.cartesian_prod(torch.arange(3), torch.arange(batch["input_ids"].shape[1]))
    shift = 0 if kind == "prefix" else 5
    with torch.no_grad():
        outputs = model.eval()(**batch, cross_attention_queries=everything + torch.tensor([0, shift]), use_cache=False)
    maps = [each.unflatten(0, batch["input_ids"].shape) for each in outputs.cross_attention_maps]
    rows = grounding["grounding_queries"]
    attention = attention_on_images(
        [each[rows[:, 0], rows[:, 1]] for each in maps], grounding["grounding_slots"],
        grounding["grounding_coverage"].shape[-1], ALIGNMENT.layers,
    )  # fmt: skip
    aligned = alignment_losses(attention, grounding["grounding_coverage"], ALIGNMENT).mean()
    total, tokens = smoothed(outputs.logits[:, shift:], batch["labels"], smoothing)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["alignment_loss"] == pytest.approx(float(aligned), rel=1e-4)
    assert logged["lm_loss"] == pytest.approx(float(total / tokens), rel=1e-4)
    found = trainer.predict(trainer.train_dataset)
    assert found.predictions.shape[:2] == found.label_ids.shape


@pytest.mark.parametrize("kind", ["prompt", "p", "prefix"])
def test_packed_texts_are_refused_with_virtual_tokens(make_trainer, make_model, kind):
    model = prompted(text_options(make_model()), kind)
    with pytest.raises(ValueError, match="^position_ids: got packed texts with P.* of PEFT") as caught:
        make_trainer(model=model).train()
    assert "\n" not in str(caught.value)


# Weight decay


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["whole", "LoRA"])
def test_gates_and_layer_scales_do_not_decay(make_trainer, make_model, wrap):
    vision = {**VISION_CONFIG, "model_args": {**VISION_CONFIG["model_args"], "ls_init_value": 0.1}}
    model = wrap(make_model(vision_config=vision))
    trainer = make_trainer(model=model, weight_decay=0.1)
    decayed = set(trainer.get_decay_parameter_names(model))
    names = {name for name, _ in model.named_parameters()}
    scales = {name for name in names if name.endswith(".gamma")}
    gates = {name for name in names if "_gate." in name}
    assert scales and len(gates) >= 4 and not (scales | gates) & decayed
    assert any(name.endswith("q_proj.weight") or "lora_A" in name for name in decayed)
    assert any(".mlp.gate_proj." in name for name in decayed)  # a matrix of Llama's feed-forward, no gate of ours


@pytest.mark.parametrize("name", ["layer_scale_parameter", "layer_scale1.lambda1", "lambda_1", "ls1.gamma", "gamma_2"])
def test_every_name_of_a_layer_scale_is_known(make_trainer, name):
    *modules, last = name.split(".")
    part = torch.nn.Module()
    holder = part
    for module in modules:
        holder.add_module(module, torch.nn.Module())
        holder = getattr(holder, module)
    holder.register_parameter(last, torch.nn.Parameter(torch.ones(3)))
    assert make_trainer().get_decay_parameter_names(part) == []


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


def test_a_step_without_a_token_to_learn_is_named(make_trainer):
    questions = [{**sample, "messages": sample["messages"][:1], "groundings": []} for sample in TALKS[:2]]
    trainer = make_trainer(batch=2, steps=2, talks=[*TALKS[2:4], *questions])
    with pytest.raises(ValueError, match="^labels: got no token to learn at step 2.*samples 0, 1") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^labels: got an evaluation batch without a token to learn"):
        trainer.evaluate(questions)
    half = make_trainer(batch=1, accumulation=2, talks=[questions[0], TALKS[2]])
    half.train()  # the step has some
    assert np.isfinite(half.state.log_history[0]["loss"])


# What goes wrong


class Poisoned:
    """A collator whose batches with one of some samples have pixels that are no numbers."""

    def __init__(self, collator, names):
        self.collator, self.names = collator, names

    def __call__(self, samples):
        batch = self.collator(samples)
        if any(sample["id"] in self.names for sample in samples):
            batch["pixel_values"] = batch["pixel_values"] * float("nan")
        return batch


@pytest.fixture
def make_poisoned(make_trainer):
    def make(names, non_finite="stop", **options):
        trainer = make_trainer(batch=2, accumulation=2, **options)
        trainer.data_collator = Poisoned(trainer.data_collator, names)
        trainer.non_finite = non_finite
        return trainer

    return make


def bad_steps(trainer):
    return [json.loads(line) for line in trainer.bad_batches.read_text("utf-8").splitlines()]


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_learned(make_trainer, make_poisoned):
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


def test_a_step_that_is_skipped_leaves_nothing_behind(make_trainer, make_poisoned):
    options = {"optim": "adamw_torch", "weight_decay": 0.3}
    trainer = make_poisoned(["0"], "skip", steps=2, logging_steps=2, **options)
    skipped = weights_after(trainer)
    reference = make_trainer(batch=2, accumulation=2, talks=TALKS[4:], **options)
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
def test_a_gradient_of_finite_numbers_without_a_finite_norm_is_not_clipped_to_zeros(make_trainer, non_finite):
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


def test_a_spike_is_kept_in_the_log_with_its_samples(make_trainer):
    with torch.no_grad():
        trainer = make_trainer()
        collator = trainer.data_collator
        losses = [float(trainer.model(**without_masks(collator([each])), use_cache=False).loss) for each in TALKS]
    calm, high = (dict(TALKS[losses.index(each)]) for each in (min(losses), max(losses)))
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
def test_a_sample_that_is_not_as_it_should_be_is_named(make_trainer, workers):
    bad = {**TALKS[3], "groundings": [{**TALKS[2]["groundings"][0], "image": 4}]}
    trainer = make_trainer(batch=2, steps=4, talks=[*TALKS[:3], bad, *TALKS[4:]], dataloader_num_workers=workers)
    with pytest.raises(
        ValueError, match="^training data: sample '3' .number 3. could not be used: groundings.0. points at image 4"
    ) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.state.global_step == 1  # what was before it is trained on


def test_what_becomes_of_bad_steps_is_one_of_two(make_trainer):
    with pytest.raises(ValueError, match="^non_finite: got 'ignore', expected 'stop' or 'skip'"):
        AgeVlmTrainer(make_trainer().model, TrainingArguments(remove_unused_columns=False), non_finite="ignore")


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


RANKS = textwrap.dedent(
    """
    import os, pickle, sys
    import torch
    from transformers import PrinterCallback, TrainingArguments
    from age_vlm import AgeVlmForConditionalGeneration
    from age_vlm.training import AgeVlmTrainer

    def train(rank, folder):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(f"{folder}/job.pickle", "rb") as file:
            collator, alignment, cases, settings, poisoned = pickle.load(file)
        if poisoned:
            collator = Poisoned(collator, poisoned)
        results = []
        for talks, accumulation in cases:
            arguments = TrainingArguments(
                **settings, gradient_accumulation_steps=accumulation, use_cpu=True, ddp_backend="gloo"
            )
            model = AgeVlmForConditionalGeneration.from_pretrained(f"{folder}/model")
            trainer = AgeVlmTrainer(
                model, arguments, train_dataset=talks, data_collator=collator, alignment=alignment, non_finite="skip"
            )
            assert trainer.accelerator.num_processes == 2
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            log = next(entry for entry in trainer.state.log_history if "loss" in entry or "event" in entry)
            results.append((log, dict(model.named_parameters())))
        if not poisoned:
            for (talks, accumulation), (log, _) in zip(cases, results):
                arguments = TrainingArguments(
                    **settings, gradient_accumulation_steps=accumulation, use_cpu=True, ddp_backend="gloo"
                )
                model = AgeVlmForConditionalGeneration.from_pretrained(f"{folder}/model")
                trainer = AgeVlmTrainer(
                    model, arguments, train_dataset=talks, data_collator=collator, alignment=alignment
                )
                # Three samples are not one half each: what fills up the batches is not counted.
                log |= trainer.evaluate(talks[:3])
                try:
                    trainer.train()
                    log["after_evaluation"] = dict(model.named_parameters())
                except ValueError as error:
                    log["refused"] = str(error)
        if rank == 0:
            torch.save(results, f"{folder}/results.pt")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    if __name__ == "__main__":
        torch.set_num_threads(1)
        # Forked, not started anew: importing takes longer than training.
        torch.multiprocessing.start_processes(train, (sys.argv[1],), nprocs=2, start_method="fork")
    """
)


def trained_by_two(reference, cases, folder, poisoned=(), collator=None):
    """What the first of two processes logged, and its weights, for each case: samples, accumulation."""
    reference.model.save_pretrained(folder / "model")
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **SGD,
    }
    with open(folder / "job.pickle", "wb") as file:
        pickle.dump((collator or reference.data_collator, ALIGNMENT, cases, settings, list(poisoned)), file)
    (folder / "ranks.py").write_text(f"{inspect.getsource(Poisoned)}\n{RANKS}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "ranks.py"), str(folder)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt", weights_only=False)


def test_two_processes_train_as_one_where_one_has_neither_image_nor_mask(make_trainer, tmp_path):
    text = [talk(3, 0, images=0), talk(9, 0, images=0)]
    cases = [
        ([TALKS[0], TALKS[2], *text], 1),  # the second process gets text only
        ([TALKS[1], TALKS[5], TALKS[4], TALKS[7]], 1),  # the first one has images but no masks
        ([*text, *text, TALKS[0], TALKS[2], *text], 2),  # masks in one micro-batch of one process
    ]
    results = trained_by_two(make_trainer(), cases, tmp_path)
    for (talks, accumulation), (log, weights) in zip(cases, results):
        alone = make_trainer(batch=2, accumulation=2 * accumulation, talks=talks)
        # With some releases of accelerate a model that was evaluated is not averaged over processes when it trains then.
        if "refused" in log:
            assert log["refused"].startswith("train: got a model that was evaluated first")
        else:
            assert_same(log["after_evaluation"], weights, rtol=1e-6, atol=1e-7)
        figures = make_trainer().evaluate(talks[:3])
        for name in ("lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy"):
            key = f"eval_{name}"
            assert (key in log) == (key in figures) and log.get(key, 0) == pytest.approx(
                figures.get(key, 0), rel=1e-4
            ), key
        assert_same({k: v.detach() for k, v in weights.items()}, weights_after(alone), rtol=1e-4, atol=1e-5)
        for name in ("loss", "lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy"):
            assert log[name] == pytest.approx(alone.state.log_history[0][name], rel=1e-4), name


def test_two_processes_skip_the_step_of_which_one_has_a_bad_batch(make_trainer, processor, tmp_path):
    reference = make_trainer()
    before = {name: parameter.detach().clone() for name, parameter in reference.model.named_parameters()}
    packing = AgeVlmCollator(processor, reference.data_collator.grid, independent_turns=True, packing=True)
    cases = [(TALKS[:4], 1), ([TALKS[0], TALKS[1], TALKS[4], TALKS[5]], 1)]
    (log, weights), (_, good) = trained_by_two(reference, cases, tmp_path, poisoned=["2"], collator=packing)
    assert_same({k: v.detach() for k, v in weights.items()}, before, rtol=0, atol=0)
    assert (log["event"], log["sample_ids"]) == ("skipped", [["2", "3"]])
    # Each process packs a batch of its own.
    alone = make_trainer(batch=2, accumulation=2, talks=cases[1][0])
    assert_same({k: v.detach() for k, v in good.items()}, weights_after(alone), rtol=1e-4, atol=1e-5)
