import dataclasses
import json

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from age_vlm.data.sources import load_source
from age_vlm.evaluation.answers import generate_answers
from age_vlm.training.pipeline import run_recipe, table_rows
from age_vlm.training.recipe import load_recipe


SHORT = [
    "seed=3",
    "data.train=8",
    "data.validation=2",
    "data.test=3",
    "warm_start.steps=2",
    "warm_start.batch_size=4",
    "training.steps=2",
    "training.batch_size=2",
    "training.log_every=1",
    "training.evaluate_every=1",
    "alignment.heads=all",
]


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
    assert [entry["step"] for entry in log if "lm_loss" in entry] == [1, 2]
    record = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert record["figures"] == metrics and record["seed"] == 3
    assert record["environment"] == json.loads((folder / "environment.json").read_text("utf-8"))
    assert [point["step"] for point in record["validation_curve"]] == [1, 2]
    expected = {f"pope/{mode}/{name}" for mode in ("random", "popular", "adversarial") for name in ("accuracy", "f1")}
    expected |= {"count/accuracy", "colour/accuracy", "relation/accuracy"}
    assert expected | {"attention_mass", "pointing_accuracy"} <= set(metrics["model"])
    assert expected <= set(metrics["blank picture"]) and "attention_mass" not in metrics["blank picture"]


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
    for words in ("pope/adversarial/accuracy", "blank picture", "pointing_accuracy (training)"):
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


def test_one_row_a_figure():
    rows = table_rows({"model": {"a": 0.5, "b": 1.0}, "control": {"c": 0.25, "a": 0.75}})
    assert rows == [
        {"figure": "a", "model": 0.5, "control": 0.75},
        {"figure": "b", "model": 1.0},
        {"figure": "c", "control": 0.25},
    ]
