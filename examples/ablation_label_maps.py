"""Photographs with masks: what alignment does, beside cross-attention alone and masks of other photographs.

    python examples/ablation_label_maps.py --images IMAGES --labels LABELS --classes sky building --ignore 11

Under an hour on 2 cores for 600 steps. The last 20 % of the frames by name are held out; random crops of
the others train, from scratch. Writes docs/results/label-maps-<steps>-steps-<environment>.csv and .md. Seeds are of weights, crops and
their order, and are paired: all arms of a seed start from the same weights and see the same crops.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ablation import ARMS, arm_recipe, run_all, run_arm, save_result
from tables import environment_name, write_csv, write_markdown

from age_vlm.commands.recipe_file import load_recipe
from age_vlm.commands.sources import load_source
from age_vlm.errors import run_command
from age_vlm.evaluation.answers import yes_scores
from age_vlm.evaluation.benchmark import presence_metrics, split_items


# A class that nearly every image shows, or none, has an AUC of chance: also the mean over those with this many of each.
BALANCED = 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--labels", required=True)
    parser.add_argument("--classes", nargs="+", required=True)
    parser.add_argument("--ignore", type=int, nargs="*", default=[])
    parser.add_argument("--small", nargs="*", default=["pole", "sign", "fence", "car", "pedestrian", "bicyclist"])
    parser.add_argument("--recipe", default=str(Path(__file__).parent / "recipes" / "label_maps.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys: section.key=value")
    parser.add_argument("--arms", nargs="+", default=list(ARMS[1:]), choices=ARMS)
    parser.add_argument("--work", default="runs/ablation_label_maps", help="where runs are kept, to go on after a stop")
    parser.add_argument("--output", default="docs/results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, nargs="+", help="lengths of training to compare; without, the recipe's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_command("ablation_label_maps", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    data = [
        f"data.images={json.dumps(options.images)}",
        f"data.labels={json.dumps(options.labels)}",
        f"data.classes={json.dumps(options.classes)}",
        f"data.ignore={options.ignore}",
    ]
    recipe = load_recipe(options.recipe, [*data, *options.set])
    lengths = options.steps or [recipe.training.steps]
    if options.run:
        recipe.training = dataclasses.replace(recipe.training, steps=lengths[0])
        recipe = arm_recipe(recipe, options.arms[0], options.seeds[0])
        result = run_arm(recipe, options.arms[0], curve_on="validation", metrics=measure_presence)
        save_result(Path(options.run), result | {"learning_rate": recipe.training.learning_rate})
        return

    passed = ["--images", options.images, "--labels", options.labels, "--classes", *options.classes]
    passed += ["--recipe", options.recipe, "--ignore", *map(str, options.ignore), "--set", *options.set]
    for steps in lengths:
        jobs = [
            (f"{arm} {seed} {steps}", [*passed, "--arms", arm, "--seeds", str(seed), "--steps", str(steps)])
            for seed in options.seeds
            for arm in options.arms
        ]
        results = run_all(__file__, jobs, Path(options.work), options.workers)
        rows = [row(result, options.small) for result in results] + prior_rows(recipe)
        name = Path(options.output) / f"label-maps-{steps}-steps-{environment_name(results[0]['environment'])}"
        name.parent.mkdir(parents=True, exist_ok=True)
        write_csv(Path(f"{name}.csv"), rows)
        write_markdown(Path(f"{name}.md"), rows, by="arm")
        print(Path(f"{name}.md").read_text("utf-8"))


def measure_presence(model, processor, items) -> dict:
    """AUC of presence, from logit(yes) - logit(no), over all classes that are clearly there or not; POPE accuracies."""
    scores = yes_scores(model, processor, items)
    return metrics_of_scores(scores, items)


def metrics_of_scores(scores: dict[str, float], items) -> dict:
    presence = presence_metrics(scores, items)
    metrics = {
        "macro AUC": presence["macro_auc"],
        "pooled AUC": presence["pooled_auc"],
        "AUC by class": presence["class_auc"],
        "absent by class": presence["absent"],
        "present by class": presence["present"],
    }
    for mode in ("random", "popular", "adversarial"):
        part = split_items(items, lambda question, mode=mode: question.mode == mode)
        questions = [question for item in part for question in item.questions]
        right = sum((scores[q.id] > 0) == (q.answer == "yes") for q in questions)
        if questions:
            metrics[f"{mode} accuracy"] = right / len(questions)
    return metrics


def row(result: dict, small: list[str]) -> dict:
    test = result["test"]
    small = [name.lower() for name in small]
    pointing = [value for name, value in test.get("pointing by class", {}).items() if name in small]
    balanced = [
        value
        for name, value in test["AUC by class"].items()
        if min(test["absent by class"][name], test["present by class"][name]) >= BALANCED
    ]
    return {
        "arm": result["arm"],
        "seed": result["seed"],
        "parameters": result["parameters"],
        "minutes": result["seconds"] / 60,
        **{key: value for key, value in test.items() if not isinstance(value, dict)},
        f"AUC, mean over classes with {BALANCED} of each": sum(balanced) / len(balanced) if balanced else "",
        **({"pointing, mean over small classes": sum(pointing) / len(pointing)} if pointing else {}),
        "macro AUC on validation frames": result["validation"]["macro AUC"],
        **{
            f"AUC {name} ({test['present by class'][name]} present, {test['absent by class'][name]} absent)": value
            for name, value in test["AUC by class"].items()
        },
        **{
            f"AUC {name} on validation frames ({result['validation']['present by class'][name]} present)": value
            for name, value in result["validation"]["AUC by class"].items()
        },
    }


def prior_rows(recipe) -> list[dict]:
    """What the share of training crops that show a class gives, without looking: constant within a class."""
    source = load_source(recipe.data, recipe.seed)
    scores = {
        q.id: source.prior[q.subject] - 0.5 for item in source.test for q in item.questions if q.kind == "existence"
    }
    metrics = metrics_of_scores(scores, source.test)
    metrics = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    shares = {f"training crops that show {name}": share for name, share in source.prior.items()}
    return [{"arm": "text-only class prior", "seed": "", **metrics, **shares}]


if __name__ == "__main__":
    sys.exit(main())
