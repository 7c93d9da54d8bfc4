import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from age_vlm.commands.recipe_file import load_recipe
from age_vlm.commands.sources import load_source
from age_vlm.commands.train import run_recipe, table_rows
from age_vlm.data.scene_datasets import to_dataset
from age_vlm.evaluation.answers import generate_answers


SHORT = [
    "seed=3",
    "data.train=8",
    "data.validation=2",
    "data.test=3",
    "warm_start.steps=2",
    "warm_start.batch_size=4",
    "training.steps=4",
    "training.batch_size=2",
    "training.log_every=3",
    "training.evaluate_every=2",
    "training.save_every=1",
    "training.language_model=lora",
    "training.lora.dropout=0.2",
    "training.learning_rates={vision: 1e-4}",
    "mix=[{texts: [caption], train: 5, weight: 0.5}]",
    "alignment.heads=all",
    "alignment.schedule=linear",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """With several, the same sums may come out differently from one time to the next on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text("name: short <run>\n")
    return load_recipe(path, SHORT)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "short"
    metrics = run_recipe(recipe, folder, progress=False)
    return folder, metrics


def test_the_folder_holds_what_is_promised_and_nothing_else(run):
    folder, _ = run
    names = {"recipe.yaml", "environment.json", "log.jsonl", "metrics.json", "checkpoint", "examples", "report.html"}
    names.add("adapter")
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in folder.parent.iterdir()] == ["short"]
    sizes = [Image.open(path).size for path in sorted((folder / "examples").iterdir())]
    assert sizes == [(64, 64)] * 3


def test_the_recipe_can_be_run_again(run, recipe):
    folder, _ = run
    assert load_recipe(folder / "recipe.yaml").to_yaml() == recipe.to_yaml()


def test_what_was_logged_and_measured_is_written(run):
    folder, metrics = run
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    assert [entry["step"] for entry in log if "lm_loss" in entry] == [1, 2, 3]  # wherever it can be resumed from
    assert [entry["alignment_weight"] for entry in log[:3]] == pytest.approx([0.2, 0.2 * 2 / 3, 0.2 / 3])
    record = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert record["metrics"] == metrics and record["seed"] == 3
    assert record["environment"] == json.loads((folder / "environment.json").read_text("utf-8"))
    assert [point["step"] for point in record["validation_curve"]] == [2, 4]
    expected = {f"pope/{mode}/{name}" for mode in ("random", "popular", "adversarial") for name in ("accuracy", "f1")}
    expected |= {"count/accuracy", "colour/accuracy", "relation/accuracy"}
    assert expected | {"attention_mass", "pointing_accuracy"} <= set(metrics["model"])
    assert expected <= set(metrics["blank image"]) and "attention_mass" not in metrics["blank image"]


def test_the_checkpoint_is_the_model_that_was_measured(run, recipe):
    folder, metrics = run
    model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    processor = AutoProcessor.from_pretrained(folder / "checkpoint")
    items = load_source(recipe.data, recipe.seed).test
    answers = generate_answers(model, processor, items)
    for kind in ("count", "colour", "relation"):
        questions = [q for item in items for q in item.questions if q.kind == kind]
        right = sum(answers[q.id] == q.answer for q in questions)
        assert right / len(questions) == pytest.approx(metrics["model"][f"{kind}/accuracy"])
    assert model.config.alignment == json.loads(json.dumps(dataclasses.asdict(recipe.alignment)))
    card = (folder / "checkpoint" / "README.md").read_text("utf-8")
    assert "short <run>" in card and f"{metrics['model']['attention_mass']:.3f}" in card


def test_the_report_needs_nothing_beside_it(run):
    folder, _ = run
    page = (folder / "report.html").read_text("utf-8")
    assert "short &lt;run&gt;" in page and "<run>" not in page
    for reference in ('src="', 'href="'):
        assert all(part.startswith("data:") for part in page.split(reference)[1:])
    for words in ("pope/adversarial/accuracy", "blank image", "pointing_accuracy (training)"):
        assert words in page


def test_the_same_recipe_gives_the_same_weights_and_replaces_when_asked(run, recipe):
    folder, metrics = run
    weights = folder / "checkpoint" / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(ValueError, match="^run folder: .* exists"):
        run_recipe(recipe, folder, progress=False)
    assert weights.read_bytes() == before
    assert run_recipe(recipe, folder, overwrite=True, progress=False) == metrics
    assert weights.read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["short"]


def test_adapters_are_merged_into_a_whole_checkpoint_and_kept_beside_it(run):
    folder, _ = run
    whole = load_file(folder / "checkpoint" / "model.safetensors")
    assert whole and not any("lora" in name or "base_layer" in name for name in whole)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter and all(".language_model." in name and ".lora_" in name for name in adapter)


RUN = """
import sys
from age_vlm.commands.train import run_recipe
from age_vlm.commands.recipe_file import load_recipe
run_recipe(load_recipe(sys.argv[1]), sys.argv[2], progress=False)
"""


@pytest.fixture(scope="module")
def killed_once(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed") / "run"
    command = [sys.executable, "-c", RUN, str(run[0] / "recipe.yaml"), str(folder)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not (folder / "trainer" / "checkpoint-2" / "whole").exists():
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    return folder


@pytest.fixture
def killed(killed_once, tmp_path):
    """Folder of a run that was killed in the middle, after a whole checkpoint."""
    return shutil.copytree(killed_once, tmp_path / "killed" / "run")


def test_a_killed_run_is_only_resumed_by_the_same_recipe(killed, recipe):
    before = sorted(killed.rglob("*"))
    for settings, words in (
        (
            {"resume": True},
            r"belongs to a different recipe \(training.steps: 4 there, 5 here\); use that recipe or a new folder",
        ),
        ({}, "exists, expected a new one .or --overwrite to replace it, --resume to continue it"),
    ):
        other = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, steps=5))
        with pytest.raises(ValueError, match=f"^run folder: '.*' {words}"):
            run_recipe(other, killed, progress=False, **settings)
    assert sorted(killed.rglob("*")) == before


def test_a_killed_run_ends_as_one_that_was_not(killed, run, recipe):
    folder, metrics = run
    # What a kill leaves of files that were being written.
    (killed / "trainer" / "checkpoint-4").mkdir()
    (killed / "trainer" / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    (killed / ".checkpoint.abcd0123.part").mkdir()
    assert run_recipe(recipe, killed, resume=True, progress=False) == metrics
    assert {path.name for path in killed.iterdir()} == {path.name for path in folder.iterdir()}
    for name in ("checkpoint/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (killed / name).read_bytes() == (folder / name).read_bytes(), name
    first, second = (json.loads((each / "metrics.json").read_text("utf-8")) for each in (folder, killed))
    assert first["validation_curve"] == second["validation_curve"]
    logs = [(each / "log.jsonl").read_text("utf-8").splitlines() for each in (folder, killed)]
    first, second = ([json.loads(line) for line in lines] for lines in logs)
    assert first[:-1] == second[:-1]  # the last line has the time it took


def test_there_is_nothing_to_resume_in_a_complete_run(run, recipe):
    folder, metrics = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run_recipe(recipe, folder, resume=True, progress=False) == json.loads(json.dumps(metrics))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


TINY = ["training.steps=1", "training.batch_size=2", "warm_start.steps=0", "data.kind=dataset", "data.held_out=0.5"]


def test_a_stored_data_set_is_trained_and_measured_on(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: stored\n")
    to_dataset("train", 6).save_to_disk(tmp_path / "data")
    recipe = load_recipe(path, [*TINY, f"data.path={tmp_path / 'data'}"])
    metrics = run_recipe(recipe, tmp_path / "run", progress=False)
    assert set(metrics["model"]) == {"yes_no/accuracy", "yes_no/auc", "attention_mass", "pointing_accuracy"}
    assert set(metrics["blank image"]) == {"yes_no/accuracy", "yes_no/auc"}
    (point,) = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))["validation_curve"]
    assert 0 <= point["yes_no_accuracy"] <= 1
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text("utf-8")
    assert "It was trained on a local folder" in card and str(tmp_path) not in card


def test_data_without_questions_are_trained_on_and_the_lack_is_said(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: captions\n")
    captions = to_dataset("train", 4, texts=["caption"])
    (tmp_path / "data").mkdir()
    captions.to_parquet(tmp_path / "data" / "part-0.parquet")
    recipe = load_recipe(path, [*TINY, f"data.path={tmp_path / 'data'}", "training.language_model=frozen"])
    with pytest.warns(UserWarning, match="asks no question about one image that is answered by yes or no"):
        metrics = run_recipe(recipe, tmp_path / "run", progress=False)
    assert metrics == {"model": {}, "blank image": {}}
    assert "No metrics" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_one_row_a_metric():
    rows = table_rows({"model": {"a": 0.5, "b": 1.0}, "control": {"c": 0.25, "a": 0.75}})
    assert rows == [
        {"metric": "a", "model": 0.5, "control": 0.75},
        {"metric": "b", "model": 1.0},
        {"metric": "c", "control": 0.25},
    ]
