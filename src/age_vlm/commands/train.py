"""A recipe from start to end: data, training, metrics on the test split, checkpoint, report."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import PIL.Image

from ..atomic_files import write_whole
from ..data.questions import POPE_MODES, EvaluationItem
from ..errors import filling
from ..evaluation.answers import yes_scores
from ..evaluation.benchmark import answer_metrics, grounding_metrics, presence_metrics, split_items
from ..evaluation.metrics import auc
from ..hub import save_checkpoint
from ..training.distributed import from_main, is_main, together
from .ask import ask
from .environment import environment
from .fit import fit
from .model_card import model_card
from .recipe import Recipe
from .report import write_report
from .run_files import CHECKPOINT_FOLDER, EXAMPLES_FOLDER, remove_resumable, remove_unfinished
from .run_folder import check_run_folder, check_same_processes, check_same_recipe, is_complete, run_folder
from .sources import DataSource, load_sources


def run_recipe(
    recipe: Recipe,
    folder: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    previous: Path | None = None,
    progress: bool = True,
) -> dict[str, dict]:
    """Trains, measures and saves.

    The folder then holds `recipe.yaml`, `environment.json`, `log.jsonl`, `metrics.json`, `checkpoint/`, `examples/` (test
    images to ask about), `report.html`, `adapter/` where parts were trained by LoRA, and `bad_batches.jsonl` where a step
    was not finite.

    Args:
        overwrite: replace an earlier run in the folder, once this one is complete.
        resume: go on where a run of the same recipe in the folder was stopped, if there is one; with one that is
            complete there is nothing to do.
        previous: checkpoint that a recipe with `model.checkpoint: previous` starts from.

    Returns:
        Metrics on the test split, one dict a row of the table: the model, and the controls `blank image` (the same
        model, shown a grey image: what it can answer from the language alone).

    Raises:
        UserError: one sentence, for a folder that exists, another recipe in it, data that cannot be read, a full disk.
    """
    folder = Path(folder)
    resume, metrics = from_main(_checked, recipe, folder, overwrite, resume)
    if metrics is not None:
        return metrics
    started = time.monotonic()
    with together():
        source = load_sources(recipe)
    kept = run_folder(folder, overwrite, resume) if is_main() else nullcontext(folder)
    with kept as folder, filling("run folder", folder):
        from_main(_begin, recipe, folder)
        measure = curve_measure(recipe, source.validation)
        fitted = fit(recipe, source, folder, measure=measure, resume=resume, previous=previous, progress=progress)
        return from_main(_finish, recipe, source, folder, *fitted, started, resume)


def _checked(recipe: Recipe, folder: Path, overwrite: bool, resume: bool) -> tuple[bool, dict[str, dict] | None]:
    """Whether there is a run to resume, and its metrics if it is complete."""
    check_run_folder(folder, overwrite, resume)
    if not resume or not (folder / "recipe.yaml").is_file():
        return False, None
    check_same_recipe(folder, recipe)
    if is_complete(folder):
        remove_resumable(folder)
        return True, stored_metrics(folder)
    check_same_processes(folder)
    return True, None


def stored_metrics(folder: Path) -> dict[str, dict]:
    """The metrics of a complete run, as `run_recipe` returned them."""
    return json.loads((folder / "metrics.json").read_text("utf-8"))["metrics"]


def _begin(recipe: Recipe, folder: Path) -> None:
    remove_unfinished(folder)
    write_whole(folder / "recipe.yaml", recipe.to_yaml())
    write_whole(folder / "environment.json", json.dumps(environment(), indent=2))


def _finish(
    recipe: Recipe,
    source: DataSource,
    folder: Path,
    model,
    processor,
    log: list[dict],
    curve: list[dict],
    started: float,
    resume: bool,
) -> dict[str, dict]:
    """What is left to do when a model is trained: metrics, checkpoint, report."""
    write_whole(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    metrics = test_metrics(model, processor, recipe, source)
    seconds = time.monotonic() - started
    record = {"metrics": metrics, "seed": recipe.seed, "seconds": round(seconds, 1), "environment": environment()}
    write_whole(folder / "metrics.json", json.dumps(record | {"validation_curve": curve}, indent=2))
    card = model_card(recipe, metrics, environment(), source, model.config)
    save_checkpoint(model, processor, folder / CHECKPOINT_FOLDER, card, parts=recipe.training.save_parts)

    images = folder / EXAMPLES_FOLDER
    images.mkdir(exist_ok=True)
    for number, item in enumerate(source.test[:8]):
        item.image.save(images / f"{number}.png")
    curves = {
        f"{name} (validation)": [(point["step"], point[name]) for point in curve] for name in curve[0] if name != "step"
    }
    for name in ("lm_loss", "alignment_loss", "alignment_weight", "attention_mass", "pointing_accuracy"):
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
            f"Metrics are on {len(source.test)} test images that were neither trained on nor chosen on; one seed."
            if source.test
            else "No metrics: the held-out samples ask no question that can be scored.",
            f"The {'run, since it was resumed,' if resume else 'whole run'} took {seconds / 60:.1f} minutes.",
        ],
    )
    remove_resumable(folder)
    return metrics


def curve_measure(recipe: Recipe, items: Sequence[EvaluationItem], images: int = 100):
    """Metrics that are cheap enough to take while training: existence by logits, and pointing, on some images."""
    items = items[:images]
    mode, name = (None, "yes_no_accuracy") if recipe.data.kind == "dataset" else ("adversarial", "adversarial_accuracy")
    asked = split_items(items, lambda question: question.kind == "existence" and question.mode == mode)
    questions = [question for item in asked for question in item.questions]
    visible = split_items(items, lambda question: question.mask is not None)

    def measure(model, processor) -> dict[str, float]:
        metrics = {}
        if questions:
            scores = yes_scores(model, processor, asked)
            right = sum((scores[question.id] > 0) == (question.answer == "yes") for question in questions)
            metrics[name] = right / len(questions)
        if visible:
            pointed = split_items(asked, lambda question: question.mask is not None) or visible
            metrics |= grounding_metrics(model, processor, pointed, recipe.alignment)
        return metrics

    return measure


def test_metrics(model, processor, recipe: Recipe, source: DataSource) -> dict[str, dict[str, float]]:
    """Rows of metrics on the test split."""
    metrics, _ = answer_metrics(model, processor, source.test)
    if split_items(source.test, lambda question: question.mask is not None):
        metrics |= grounding_metrics(model, processor, source.test, recipe.alignment)
    grey = cache(lambda size: PIL.Image.new("RGB", size, "grey"))  # one object a size: nothing is asked of it twice
    blank = [dataclasses.replace(item, image=grey(item.image.size)) for item in source.test]
    control, _ = answer_metrics(model, processor, blank)
    if recipe.data.kind == "label_maps":
        for row, images in ((metrics, source.test), (control, blank)):
            value = presence_metrics(yes_scores(model, processor, images), images)["macro_auc"]
            if not math.isnan(value):  # no class is both present and absent
                row["presence/macro_auc"] = value
    if recipe.data.kind == "coco":
        for row, images in ((metrics, source.test), (control, blank)):
            row |= mode_aucs(yes_scores(model, processor, images), images)
    if recipe.data.kind == "dataset":
        for row, images in ((metrics, source.test), (control, blank)):
            row |= yes_no_metrics(yes_scores(model, processor, images), images)
    return {"model": metrics, "blank image": control}


def mode_aucs(scores: Mapping[str, float], items: Sequence[EvaluationItem]) -> dict[str, float]:
    """`presence/MODE_auc` of each of POPE's modes, over logit(yes) - logit(no) of its questions."""
    metrics = {}
    for mode in POPE_MODES:
        asked = [question for item in items for question in item.questions if question.mode == mode]
        value = auc([scores[question.id] for question in asked], [question.answer == "yes" for question in asked])
        if not math.isnan(value):
            metrics[f"presence/{mode}_auc"] = value
    return metrics


def yes_no_metrics(scores: Mapping[str, float], items: Sequence[EvaluationItem]) -> dict[str, float]:
    """`yes_no/accuracy` of questions by the sign of logit(yes) - logit(no), and `yes_no/auc` where both answers occur."""
    questions = [question for item in items for question in item.questions]
    if not questions:
        return {}
    given, truth = [scores[q.id] for q in questions], [q.answer == "yes" for q in questions]
    right = sum((score > 0) == yes for score, yes in zip(given, truth))
    metrics = {"yes_no/accuracy": right / len(questions), "yes_no/auc": auc(given, truth)}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def table_rows(metrics: dict[str, dict[str, float]]) -> list[dict[str, str | float]]:
    """One row a metric, one column a model or control."""
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    return [
        {"metric": name, **{column: values[name] for column, values in metrics.items() if name in values}}
        for name in names
    ]


def examples(model, processor, items: Sequence[EvaluationItem], count: int = 6) -> list[dict]:
    """Images with a question each and where the model looked; a different kind of question from one to the next."""
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
