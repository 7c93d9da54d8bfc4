"""Drawn scenes: four stages of training against one joint stage with the same number of steps.

    python examples/stages.py --work runs/stages

About an hour on 2 cores. Writes docs/results/stages-<environment>.csv and .md. The stages are examples/recipes/scenes; the
joint stage is the recipe of `age-vlm demo` with as many steps as they have together. Seeds are of weights, data order and
training scenes; test scenes are the same for all, and others than those the recipes were chosen on. Run again, it continues:
finished runs are kept, and a stopped one goes on from its last checkpoint.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ablation import run_all, save_result
from tables import environment_name, write_csv, write_markdown
from transformers import logging

from age_vlm.commands.pipeline import load_stages, run_stages
from age_vlm.commands.recipe import Recipe
from age_vlm.commands.recipe_file import load_recipe
from age_vlm.commands.train import run_recipe
from age_vlm.errors import run_command


ARMS = ("four stages", "one joint stage")
TARGET = 0.90


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="runs/stages", help="where runs are kept, to go on after a stop")
    parser.add_argument("--output", default="docs/results")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="keys of all recipes: section.key=value")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_command("stages", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if options.run:
        save_result(Path(options.run), run_arm(options.arms[0], options.seeds[0], options.set, Path(options.run)))
        return
    jobs = [
        (f"{arm} {seed}", ["--arms", arm, "--seeds", str(seed), "--set", *options.set])
        for seed in options.seeds
        for arm in options.arms
    ]
    results = run_all(__file__, jobs, Path(options.work), options.workers)
    results.sort(key=lambda result: (ARMS.index(result["arm"]), result["seed"]))
    rows = [row(result) for result in results]
    name = Path(options.output) / f"stages-{environment_name(results[0]['environment'])}"
    name.parent.mkdir(parents=True, exist_ok=True)
    write_csv(Path(f"{name}.csv"), rows)
    write_markdown(Path(f"{name}.md"), rows, by="arm")
    print(Path(f"{name}.md").read_text("utf-8"))


def recipes(overrides: list[str]) -> tuple[dict[str, Recipe], Recipe]:
    """The stages, and the joint stage with the same number of steps, batch size and new scenes."""
    stages = load_stages(Path(__file__).parent / "recipes" / "scenes", overrides)
    joint = load_recipe(files("age_vlm") / "recipes" / "scenes.yaml", overrides)
    first = next(iter(stages.values()))
    joint.training = dataclasses.replace(
        joint.training,
        steps=sum(stage.training.steps for stage in stages.values()),
        batch_size=first.training.batch_size,
        evaluate_every=first.training.evaluate_every,
        save_every=first.training.save_every,
    )
    joint.data = dataclasses.replace(joint.data, train=sum(stage.data.train for stage in stages.values()))
    joint.warm_start = first.warm_start
    for recipe in (*stages.values(), joint):
        # Other scenes than those whose metrics are printed whenever a recipe is changed.
        recipe.data = dataclasses.replace(recipe.data, test_seed=1)
    return stages, joint


def run_arm(arm: str, seed: int, overrides: list[str], result: Path) -> dict:
    """Trains one arm in a folder beside `result`, or goes on with it, and gathers its metrics and curve."""
    logging.set_verbosity_error()
    stages, joint = recipes(overrides)
    described = {**dataclasses.asdict(joint), "stages": [dataclasses.asdict(stage) for stage in stages.values()]}
    folder = result.with_suffix("")
    if arm == "four stages":
        # Each stage has new scenes, as the joint one has all along.
        stages = {
            name: dataclasses.replace(stage, seed=len(stages) * seed + number)
            for number, (name, stage) in enumerate(stages.items())
        }
        run_stages(stages, folder, progress=False)
        runs = [folder / name for name in stages]
    else:
        run_recipe(dataclasses.replace(joint, seed=seed), folder, resume=True, progress=False)
        runs = [folder]
    records = [json.loads((run / "metrics.json").read_text("utf-8")) for run in runs]
    curve, done = [], 0
    for record in records:
        curve += [{**point, "step": point["step"] + done} for point in record["validation_curve"]]
        done = curve[-1]["step"]
    return {
        "arm": arm,
        "seed": seed,
        "steps": done,
        "metrics": records[-1]["metrics"],
        "curve": curve,
        "recipe": described,
        "environment": records[-1]["environment"],
    }


def row(result: dict) -> dict:
    name = "adversarial_accuracy"
    reached = [point["step"] for point in result["curve"] if point.get(name, 0) >= TARGET]
    return {
        "arm": result["arm"],
        "seed": result["seed"],
        "steps": result["steps"],
        f"steps to adversarial {TARGET:.2f}, validation": reached[0] if reached else "never",
        **result["metrics"]["model"],
    }


if __name__ == "__main__":
    sys.exit(main())
