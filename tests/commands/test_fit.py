import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from age_vlm.commands.build import build_model
from age_vlm.commands.fit import fit, training_arguments
from age_vlm.commands.recipe import ModelRecipe, TrainingRecipe, WarmStartRecipe
from age_vlm.training import AlignmentConfig


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_frozen_language_model_stays_the_llama_it_was(backbones, source, tmp_path, recipe_of):
    model_recipe = ModelRecipe(
        text=str(backbones / "text"),
        vision=str(backbones / "vision"),
        image_size=64,
        config={"cross_attention_layers": [0, 2], "cross_attention_gate_init": 0.3},
    )
    recipe = recipe_of(model=model_recipe, training={"language_model": "frozen"})
    torch.manual_seed(0)
    before, _ = build_model(model_recipe, source)
    model, _, _, _ = fit(recipe, source, tmp_path, progress=False)
    llama = LlamaForCausalLM.from_pretrained(backbones / "text").eval()
    ids = torch.randint(20, llama.config.vocab_size, (2, 11))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(ids).logits)
    moved = dict(before.named_parameters())
    for part in ("vision_tower", "multi_modal_projector", "cross_attention"):
        names = [name for name, _ in model.named_parameters() if f".{part}." in name]
        assert any(not torch.equal(model.get_parameter(name), moved[name]) for name in names), part


def test_a_seed_gives_the_same_run_again_and_measures_on_the_way(source, tmp_path, recipe_of):
    recipe = recipe_of(seed=4, warm_start=WarmStartRecipe(steps=1, batch_size=4), training={"evaluate_every": 2})
    seen = []

    def measure(model, processor):
        seen.append(model.training)
        return {"norm": float(sum(parameter.norm() for parameter in model.parameters()))}

    runs = [fit(copy.deepcopy(recipe), source, tmp_path, measure=measure, progress=False) for _ in range(2)]
    (first, _, log, curve), (second, _, _, again) = runs
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert [point["step"] for point in curve] == [2, 3] and curve == again
    assert not first.training
    assert [entry["step"] for entry in log if "lm_loss" in entry] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_caches_of_what_is_frozen_change_nothing_that_is_learned(backbones, source, tmp_path, recipe_of):
    model_recipe = ModelRecipe(
        text=str(backbones / "text"),
        vision=str(backbones / "vision"),
        image_size=64,
        config={"cross_attention_layers": [1, 2], "cross_attention_gate_init": 0.3},
    )
    frozen = {"vision": "frozen", "language_model": "frozen"}
    kept = {"encoder_cache": str(tmp_path / "encoder"), "text_cache": True}
    states = []
    for settings in ({}, kept, {**kept, "shared_prefix": True}):
        recipe = recipe_of(model=copy.deepcopy(model_recipe), training={**frozen, **settings})
        model, _, log, _ = fit(recipe, source, tmp_path / "run", progress=False)
        states.append((model.state_dict(), [entry["loss"] for entry in log if "loss" in entry]))
    assert list((tmp_path / "encoder").rglob("*.safetensors"))
    for state, losses in states[1:]:
        assert losses == pytest.approx(states[0][1], rel=1e-3)
        torch.testing.assert_close(state, states[0][0], rtol=1e-2, atol=1e-3)


def test_blocks_and_images_that_are_not_there_are_found_before_training(source, tmp_path, recipe_of):
    with pytest.raises(ValueError, match="^alignment.layers: got 5"):
        fit(recipe_of(alignment=AlignmentConfig(layers=[5])), source, tmp_path, progress=False)
    bare = copy.copy(source)
    bare.icons = None
    with pytest.raises(ValueError, match="^warm_start.steps: got 3, but this data has no single images"):
        fit(recipe_of(warm_start=WarmStartRecipe(steps=3)), bare, tmp_path, progress=False)


def stopped(recipe, source, folder, step):
    """Runs until the metrics of that step are asked for."""

    def measure(model, processor):
        seen.append(1)
        if len(seen) == step:
            raise KeyboardInterrupt
        return {"metric": len(seen)}

    seen = []
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, source, folder, measure=measure, progress=False)


def test_what_was_stopped_goes_on_from_its_last_checkpoint(source, tmp_path, capfd, recipe_of):
    training = {"steps": 5, "save_every": 2, "evaluate_every": 1, "log_every": 5, "vision": "frozen"}
    recipe = recipe_of(training=training, warm_start=WarmStartRecipe(steps=1, batch_size=4))

    def norm(model, processor):
        return {"norm": float(sum(p.norm() for p in model.parameters()))}

    for name in ("whole", "stopped", "early"):
        (tmp_path / name).mkdir()
    whole, _, log, curve = fit(recipe, source, tmp_path / "whole", measure=norm, progress=False)
    assert len(curve) == 5 and [entry["step"] for entry in log if "lm_loss" in entry] == [2, 4, 5]
    stopped(recipe, source, tmp_path / "early", 1)
    assert not list((tmp_path / "early").iterdir())  # nothing to go on from
    stopped(recipe, source, tmp_path / "stopped", 4)
    assert [path.name for path in (tmp_path / "stopped" / "trainer").iterdir()] == ["checkpoint-2"]
    capfd.readouterr()
    again, _, log_again, points = fit(recipe, source, tmp_path / "stopped", measure=norm, resume=True, progress=False)
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5] and points[2:] == curve[2:]
    assert points[0] == {"step": 1, "metric": 1}  # of the run that was stopped
    assert "missing keys" not in capfd.readouterr().err
    assert log_again[:-1] == log[:-1]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_tensorboard_gets_what_the_log_has(source, tmp_path, monkeypatch, recipe_of):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    recipe = recipe_of(name="told", training={"report_to": ["tensorboard"]})
    _, _, log, _ = fit(recipe, source, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    told = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy"):
        points = [(event.step, event.value) for event in told.Scalars(f"train/{name}")]
        assert points == [(entry["step"], pytest.approx(entry[name])) for entry in log if name in entry], name
        assert len(points) == 3
    assert "told" in told.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()


def test_packing_changes_what_a_run_costs_and_not_what_it_learns(source, tmp_path, recipe_of):
    logs = []
    for options in ({}, {"packing": True, "pack_length": 400}):
        (tmp_path / str(len(logs))).mkdir()
        _, _, log, _ = fit(recipe_of(training=options), source, tmp_path / str(len(logs)), progress=False)
        logs.append([entry for entry in log if "lm_loss" in entry])
    for one, other in zip(*logs, strict=True):
        for name in ("lm_loss", "alignment_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_training_arguments_are_those_of_the_recipe(tmp_path):
    recipe = TrainingRecipe(
        steps=40, batch_size=3, gradient_accumulation=2, learning_rate=0.3, weight_decay=0.2, warmup=0.1, workers=0,
        adam_beta2=0.87, max_grad_norm=0.4, schedule="linear", log_every=6,
    )  # fmt: skip
    arguments = training_arguments(recipe, 5, tmp_path, progress=False)
    assert (arguments.max_steps, arguments.per_device_train_batch_size) == (40, 3)
    assert (arguments.gradient_accumulation_steps, arguments.learning_rate) == (2, 0.3)
    assert (arguments.weight_decay, arguments.warmup_steps, arguments.seed) == (0.2, 4, 5)
    assert (arguments.adam_beta2, arguments.max_grad_norm, arguments.logging_steps) == (0.87, 0.4, 6)
    assert arguments.lr_scheduler_type == "linear"
    assert not arguments.bf16 and not arguments.fp16 and not arguments.remove_unused_columns
    assert arguments.save_strategy == "no" and not arguments.activation_checkpointing
    recipe = TrainingRecipe(save_every=7, gradient_checkpointing=True)
    arguments = training_arguments(recipe, 5, tmp_path, progress=False)
    assert (arguments.save_strategy, arguments.save_steps) == ("steps", 7)
    assert arguments.activation_checkpointing


@pytest.mark.parametrize("warmup, steps, expected", [(0, 40, 0), (0.0, 3, 0), (0.01, 40, 1), (0.5, 40, 20)])
def test_no_warmup_is_none(tmp_path, warmup, steps, expected):
    arguments = training_arguments(TrainingRecipe(steps=steps, warmup=warmup), 0, tmp_path, progress=False)
    assert arguments.get_warmup_steps(steps) == expected
