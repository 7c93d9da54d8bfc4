"""A recipe from start to end: data, training, figures on the test part, checkpoint, report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from ..analysis.report import write_report
from ..ask import ask
from ..data.collator import token_grid_size
from ..data.questions import EvaluationItem
from ..data.sources import DataSource, load_source
from ..evaluation.answers import yes_scores
from ..evaluation.benchmark import answer_metrics, grounding_metrics, presence_metrics, split_items
from ..hub import save_checkpoint
from ..model_card import model_card
from .recipe import Recipe
from .run import check_run_folder, environment, fit, run_folder


def run_recipe(
    recipe: Recipe, folder: str | Path, *, overwrite: bool = False, progress: bool = True
) -> dict[str, dict]:
    """Trains, measures and saves.

    The folder then holds `recipe.yaml`, `environment.json`, `log.jsonl`, `metrics.json`, `checkpoint/`, `examples/` (test
    pictures to ask about) and `report.html`.

    Returns:
        Figures on the test part, one dict a row of the table: the model, and the controls `blank picture` (the same
        model, shown a grey picture: what it can answer from the language alone).

    Raises:
        ValueError: one sentence, for a folder that exists, data that cannot be read, a full disk.
    """
    check_run_folder(folder, overwrite)
    started = time.monotonic()
    source = load_source(recipe.data, recipe.seed)
    with run_folder(folder, overwrite) as folder:
        return _run(recipe, source, folder, started, progress)


def _run(recipe: Recipe, source: DataSource, folder: Path, started: float, progress: bool) -> dict[str, dict]:
    write_atomically(folder / "recipe.yaml", recipe.to_yaml())
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=2))

    model, processor, log, curve = fit(
        recipe, source, folder, measure=curve_measure(recipe, source.validation), progress=progress
    )
    model.config.alignment = dataclasses.asdict(recipe.alignment)
    write_atomically(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    metrics = test_metrics(model, processor, recipe, source)
    seconds = time.monotonic() - started
    record = {"figures": metrics, "seed": recipe.seed, "seconds": round(seconds, 1), "environment": environment()}
    write_atomically(folder / "metrics.json", json.dumps(record | {"validation_curve": curve}, indent=2))
    save_checkpoint(model, processor, folder / "checkpoint", model_card(recipe, metrics, environment(), source))

    pictures = folder / "examples"
    pictures.mkdir(exist_ok=True)
    for number, item in enumerate(source.test[:8]):
        item.image.save(pictures / f"{number}.png")
    curves = {
        f"{name} (validation)": [(point["step"], point[name]) for point in curve] for name in curve[0] if name != "step"
    }
    for name in ("lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy"):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        if points:
            curves[f"{name} (training)"] = points
    write_report(
        folder / "report.html",
        title=recipe.name,
        settings={"seed": recipe.seed, **dataclasses.asdict(recipe), "environment": environment()},
        metrics=table_rows(metrics),
        curves=curves,
        examples=examples(model, processor, source.test),
        notes=[
            f"Figures are on {len(source.test)} test pictures that were neither trained on nor chosen on; one seed.",
            f"The whole run took {seconds / 60:.1f} minutes.",
        ],
    )
    return metrics


def curve_measure(recipe: Recipe, items: Sequence[EvaluationItem], pictures: int = 100):
    """Figures that are cheap enough to take while training: existence by logits, and pointing, on some pictures."""
    items = items[:pictures]
    asked = split_items(items, lambda question: question.kind == "existence" and question.mode == "adversarial")
    questions = [question for item in asked for question in item.questions]
    visible = split_items(items, lambda question: question.mask is not None)

    def measure(model, processor) -> dict[str, float]:
        figures = {}
        if questions:
            scores = yes_scores(model, processor, asked)
            right = sum((scores[question.id] > 0) == (question.answer == "yes") for question in questions)
            figures["adversarial_accuracy"] = right / len(questions)
        if visible:
            grid = token_grid_size(model, processor)
            figures |= grounding_metrics(model, processor, asked or visible, grid, recipe.alignment)
        return figures

    return measure


def test_metrics(model, processor, recipe: Recipe, source: DataSource) -> dict[str, dict[str, float]]:
    """Rows of figures on the test part."""
    metrics, _ = answer_metrics(model, processor, source.test)
    metrics |= grounding_metrics(model, processor, source.test, token_grid_size(model, processor), recipe.alignment)
    blank = [dataclasses.replace(item, image=PIL.Image.new("RGB", item.image.size, "grey")) for item in source.test]
    control, _ = answer_metrics(model, processor, blank)
    if recipe.data.kind == "label_maps":
        for row, pictures in ((metrics, source.test), (control, blank)):
            value = presence_metrics(yes_scores(model, processor, pictures), pictures)["macro_auc"]
            if not math.isnan(value):  # no class is both present and absent
                row["presence/macro_auc"] = value
    return {"model": metrics, "blank picture": control}


def table_rows(metrics: dict[str, dict[str, float]]) -> list[dict[str, str | float]]:
    """One row a figure, one column a model or control."""
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    return [
        {"figure": name, **{column: values[name] for column, values in metrics.items() if name in values}}
        for name in names
    ]


def examples(model, processor, items: Sequence[EvaluationItem], count: int = 6) -> list[dict]:
    """Pictures with a question each and where the model looked; a different kind of question from one to the next."""
    kinds = ("existence", "colour", "count", "relation")
    shown = []
    for number, item in enumerate(item for item in items if item.questions):
        if len(shown) == count:
            break
        wanted = [q for q in item.questions if q.kind == kinds[number % len(kinds)]] or list(item.questions)
        question = wanted[number % len(wanted)]
        answer = ask(model, processor, item.image, question.text)
        shown.append(
            {
                "image": item.image,
                "question": question.text,
                "answer": answer.text,
                "expected": question.answer,
                "sheet": answer.sheet() if answer.words else None,
            }
        )
    return shown


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
