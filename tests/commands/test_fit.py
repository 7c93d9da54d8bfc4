import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TimmWrapperConfig, TimmWrapperModel

from age_vlm.atomic_files import replaced
from age_vlm.commands.build import build_model, set_trainable
from age_vlm.commands.environment import environment
from age_vlm.commands.fit import fit, training_arguments
from age_vlm.commands.recipe import DataRecipe, LoraRecipe, ModelRecipe, Recipe, TrainingRecipe, WarmStartRecipe
from age_vlm.commands.run_files import last_checkpoint
from age_vlm.commands.run_folder import check_run_folder, check_same_recipe, run_folder
from age_vlm.commands.sources import load_source
from age_vlm.data.scenes_tokenizer import build_scenes_tokenizer
from age_vlm.modeling_agevlm.components_agevlm import COMPONENTS, component_of
from age_vlm.training import AlignmentConfig
from age_vlm.training.loss_watch import BAD_BATCHES


DATA = DataRecipe(train=8, validation=1, test=1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """With several, the same sums may come out differently from one time to the next on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source():
    return load_source(DATA, 0)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of a random Llama, with the tokenizer of drawn scenes, and of a random timm ConvNeXt."""
    folder = tmp_path_factory.mktemp("backbones")
    tokenizer = build_scenes_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    arguments = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    TimmWrapperModel(
        TimmWrapperConfig.from_dict({"architecture": "convnext_atto", "num_classes": 0, "model_args": arguments})
    ).save_pretrained(folder / "vision")
    return folder


def recipe_of(**sections):
    training = {"steps": 3, "batch_size": 2, "learning_rate": 0.01, "log_every": 1, **sections.pop("training", {})}
    return Recipe(data=DATA, training=TrainingRecipe(**training), **sections)


def test_a_frozen_language_model_stays_the_llama_it_was(backbones, source, tmp_path):
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


def test_every_parameter_belongs_to_one_part(make_model):
    model, trained = make_model(), {}
    for part in COMPONENTS:
        modes = {other: "full" if other == part else "frozen" for other in COMPONENTS}
        assert set_trainable(model, TrainingRecipe(**modes)) is None
        trained[part] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained[part]
    everything = [name for names in trained.values() for name in names]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())
    llama = LlamaForCausalLM(model.config.text_config)
    renamed = {name.replace("model.language_model.", "model.") for name in trained["language_model"]}
    assert renamed == {name for name, _ in llama.named_parameters()}


def test_a_preset_takes_the_tokenizer_of_its_data(source):
    model, processor = build_model(ModelRecipe(), source)
    config = model.config
    assert config.text_config.vocab_size == len(source.tokenizer) == model.get_input_embeddings().num_embeddings
    assert config.image_token_id == processor.image_token_id
    assert config.text_config.eos_token_id == source.tokenizer.eos_token_id
    for settings, words in (
        ({"image_token_id": 3}, "^model.config.image_token_id: got one"),
        ({"cross_attention_layer": [0]}, "cross_attention_layer: unknown option"),
        ({"cross_attention_layers": [9]}, "cross_attention_layers: got 9"),
    ):
        with pytest.raises(ValueError, match=words):
            build_model(ModelRecipe(config=settings), source)


def test_a_recipe_goes_on_from_a_checkpoint(source, tmp_path):
    model, processor = build_model(ModelRecipe(), source)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    again, _ = build_model(ModelRecipe(checkpoint=str(tmp_path / "checkpoint")), source)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for checkpoint in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="^model.checkpoint: '.*' could not be loaded as an AGE-VLM") as caught:
            build_model(ModelRecipe(checkpoint=str(checkpoint)), source)
        assert "\n" not in str(caught.value)


def test_a_seed_gives_the_same_run_again_and_measures_on_the_way(source, tmp_path):
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


def test_blocks_and_images_that_are_not_there_are_found_before_training(source, tmp_path):
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


def test_what_was_stopped_goes_on_from_its_last_checkpoint(source, tmp_path, capfd):
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


def test_tensorboard_gets_what_the_log_has(source, tmp_path, monkeypatch):
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


def test_packing_changes_what_a_run_costs_and_not_what_it_learns(source, tmp_path):
    logs = []
    for options in ({}, {"packing": True, "pack_length": 400}):
        (tmp_path / str(len(logs))).mkdir()
        _, _, log, _ = fit(recipe_of(training=options), source, tmp_path / str(len(logs)), progress=False)
        logs.append([entry for entry in log if "lm_loss" in entry])
    for one, other in zip(*logs, strict=True):
        for name in ("lm_loss", "alignment_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_a_run_may_be_resumed_with_another_answer_to_bad_steps(tmp_path):
    begun = recipe_of(training={"non_finite": "stop"})
    (tmp_path / "recipe.yaml").write_text(begun.to_yaml())
    check_same_recipe(tmp_path, recipe_of(training={"non_finite": "skip", "spike_threshold": 3.0}))
    with pytest.raises(ValueError, match=r"belongs to a different recipe \(training.packing: False there, True here\)"):
        check_same_recipe(tmp_path, recipe_of(training={"packing": True, "non_finite": "skip"}))


def test_what_is_frozen_full_or_adapted(make_model):
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    adapted = set_trainable(
        model, TrainingRecipe(vision="frozen", cross_attention="lora", language_model="lora", lora=LoraRecipe(rank=2))
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(component_of(name) == "vision" for name in trained)
    projector = {name for name in names if component_of(name) == "projector"}
    assert projector <= trained
    rest = trained - projector
    gates = {name for name in rest if ".modules_to_save." in name}
    assert len(gates) == 4 and all("_gate." in name for name in gates)
    assert {component_of(name) for name in rest - gates} == {"cross_attention", "language_model"}
    assert all(".lora_" in name for name in rest - gates)
    merged = adapted.merge_and_unload()
    assert merged is model and [name for name, _ in model.named_parameters()] == names


def test_the_recipe_before_is_known_in_a_pipeline_only(source, tmp_path):
    recipe = ModelRecipe(checkpoint="previous")
    with pytest.raises(ValueError, match="^model.checkpoint: got 'previous', expected a folder or Hub id"):
        build_model(recipe, source)
    model, processor = build_model(ModelRecipe(), source)
    model.save_pretrained(tmp_path / "before")
    processor.save_pretrained(tmp_path / "before")
    again, _ = build_model(recipe, source, tmp_path / "before")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_backbones_come_in_the_type_that_is_asked_for(backbones, source):
    names = {"text": str(backbones / "text"), "vision": str(backbones / "vision"), "image_size": 64}
    options = {**names, "config": {"cross_attention_layers": [1]}}
    assert build_model(ModelRecipe(**options, dtype="bfloat16"), source)[0].dtype == torch.bfloat16
    assert build_model(ModelRecipe(**options), source)[0].dtype == torch.float32


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


def test_the_environment_can_be_written_down():
    assert torch.__version__ in json.dumps(environment())


# Run folders


def earlier_run(folder):
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: earlier")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "model.safetensors").write_bytes(b"earlier weights")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "deep/new", "empty"):
        with run_folder(tmp_path / name, overwrite=False) as folder:
            (folder / "recipe.yaml").write_text("name: new")
        assert content(tmp_path / name)


def test_an_earlier_run_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path):
    earlier_run(tmp_path / "run")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="^run folder: '.*run' exists, expected a new one .or --overwrite"):
        with run_folder(tmp_path / "run", overwrite=False):
            pytest.fail("was entered")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            with run_folder(tmp_path / "run", overwrite=True) as folder:
                (folder / "recipe.yaml").write_text("name: new")
                (folder / "metrics.json").write_text("{}")
                raise error
        assert content(tmp_path) == before
    with run_folder(tmp_path / "run", overwrite=True) as folder:
        assert not content(folder)
        (folder / "recipe.yaml").write_text("name: new")
    assert list(content(tmp_path).values()) == [b"name: new"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_can_be_resumed_stays_and_is_continued(tmp_path):
    def begin(step):
        with run_folder(tmp_path / "run", overwrite=False, resume=True) as folder:
            (folder / "recipe.yaml").write_text("name: new")
            whole = folder / "trainer" / f"checkpoint-{step}"
            whole.mkdir(parents=True)
            (whole / "whole").touch()
            raise KeyboardInterrupt

    for step in (2, 10):
        with pytest.raises(KeyboardInterrupt):
            begin(step)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-10"
    # The run that it was to replace, had it not been killed.
    earlier_run(tmp_path / "earlier")
    (tmp_path / "earlier").rename(tmp_path / ".run.earlier.abcd0123.part")
    with run_folder(tmp_path / "run", overwrite=False, resume=True) as folder:
        assert (folder / "recipe.yaml").read_text() == "name: new"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(ValueError, match="exists, expected a new one .or --overwrite to replace it, --resume to cont"):
        check_run_folder(tmp_path / "run", overwrite=False)
    (tmp_path / "thesis").mkdir()
    # What a process leaves that was killed while it wrote the first file of a run.
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "thesis" / "recipe.yaml"):
        (unfinished,) = (tmp_path / "thesis").iterdir()
        raise KeyboardInterrupt
    unfinished.touch()
    check_run_folder(tmp_path / "thesis", overwrite=False, resume=True)
    (tmp_path / "thesis" / "draft.txt").touch()
    with pytest.raises(ValueError, match="holds no run, expected one to resume"):
        check_run_folder(tmp_path / "thesis", overwrite=False, resume=True)


def test_what_is_no_run_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before = content(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="holds no earlier run, and is not replaced even with --overwrite"):
            with run_folder(tmp_path / name, overwrite=True):
                pytest.fail("was entered")
    assert content(tmp_path) == before


def test_the_ids_of_a_bad_batch_outlast_the_run_that_failed_of_it(tmp_path):
    for overwrite in (False, True):
        with pytest.raises(ValueError):
            with run_folder(tmp_path / "run", overwrite=overwrite) as folder:
                (folder / "recipe.yaml").write_text("name: later" if overwrite else "name: first")
                (folder / BAD_BATCHES).write_text(str(overwrite))
                raise ValueError
        assert (tmp_path / "run" / "recipe.yaml").read_text() == "name: first"
        assert (tmp_path / "run" / BAD_BATCHES).read_text() == str(overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_failed_early_leaves_nothing_a_later_one_its_metrics(tmp_path):
    for done, left in (([], []), (["metrics.json"], ["metrics.json", "recipe.yaml"])):
        with pytest.raises(RuntimeError):
            with run_folder(tmp_path / "run", overwrite=False) as folder:
                for name in ("recipe.yaml", *done):
                    (folder / name).write_text("{}")
                raise RuntimeError
        assert sorted(path.name for path in tmp_path.rglob("*.*") if path.is_file()) == left
