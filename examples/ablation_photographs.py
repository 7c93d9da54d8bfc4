"""Everyday photographs and pretrained components: what alignment does, beside cross-attention alone and masks of others.

    python examples/offline_parts.py components
    python examples/ablation_photographs.py --images coco/images --instances coco/instances.json

One recipe (examples/recipes/photographs/joint.yaml), and for each arm what the arm is about. Splits are by image; all arms of a
seed start from the same weights and see the same crops and questions. Figures are of the test photographs; which layer points
best is chosen on validation. Runs that are done are not run again, and what a frozen encoder returned is kept in --work for all
arms: about 6 MB a step and seed.
Writes docs/results/photographs-<steps>-steps-<environment>.csv and .md, with 95 % intervals over the photographs.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from ablation import ARMS, arm_recipe, run_all, run_arm, save_result
from tables import environment_name, write_csv, write_markdown

from age_vlm.commands.recipe_file import load_recipe
from age_vlm.commands.train import mode_aucs
from age_vlm.data.questions import POPE_MODES
from age_vlm.errors import run_command
from age_vlm.evaluation.answers import yes_scores
from age_vlm.evaluation.metrics import auc


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of the photographs")
    parser.add_argument("--instances", required=True, help="their instances, in COCO's format")
    parser.add_argument(
        "--recipe", default=str(Path(__file__).parent / "recipes" / "photographs" / "joint.yaml"), help="of all arms"
    )
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys: section.key=value")
    parser.add_argument("--arms", nargs="+", default=list(ARMS[1:]), choices=ARMS[1:])
    parser.add_argument(
        "--work", default="runs/ablation_photographs", help="where runs are kept, to go on after a stop"
    )
    parser.add_argument("--output", default="docs/results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each with its share of the cores")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_command("ablation_photographs", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    work = Path(options.work)
    data = [f"data.images={json.dumps(options.images)}", f"data.instances={json.dumps(options.instances)}"]
    recipe = load_recipe(options.recipe, [*data, *options.set])
    if recipe.training.vision == "frozen":
        recipe.training = dataclasses.replace(recipe.training, encoder_cache=str(work / "encoder"))
    if options.run:
        recipe = arm_recipe(recipe, options.arms[0], options.seeds[0])
        save_result(
            Path(options.run), run_arm(recipe, options.arms[0], curve_on="validation", metrics=measure_presence)
        )
        return

    passed = ["--images", options.images, "--instances", options.instances, "--recipe", options.recipe]
    passed += ["--work", options.work, "--set", *options.set]
    jobs = [
        (f"{arm} {seed} {recipe.training.steps}", [*passed, "--arms", arm, "--seeds", str(seed)])
        for seed in options.seeds
        for arm in options.arms
    ]
    results = run_all(__file__, jobs, work, options.workers)
    rows = [row(result) for result in results]
    environment = environment_name(results[0]["environment"])
    name = Path(options.output) / f"photographs-{recipe.training.steps}-steps-{environment}"
    name.parent.mkdir(parents=True, exist_ok=True)
    write_csv(Path(f"{name}.csv"), rows)
    write_markdown(Path(f"{name}.md"), rows, by="arm")
    print(Path(f"{name}.md").read_text("utf-8"))


def measure_presence(model, processor, items) -> dict:
    """AUC of presence in each of POPE's modes, from logit(yes) - logit(no): as they are, with half the width of a 95 %
    interval over photographs, and on a blank image, which is the text-only prior."""
    blank = PIL.Image.new("RGB", items[0].image.size, "grey")
    metrics = {}
    for name, shown in (("", items), (", blank image", [dataclasses.replace(item, image=blank) for item in items])):
        scores = yes_scores(model, processor, shown)
        for key, value in mode_aucs(scores, items).items():
            mode = key.removeprefix("presence/").removesuffix("_auc")
            metrics[f"AUC {mode}{name}"] = value
            if not name:
                metrics[f"AUC {mode}, 95 % +-"] = half_interval(scores, items, mode)
    for mode in POPE_MODES:
        if f"AUC {mode}" in metrics:
            metrics[f"AUC {mode}, drop on a blank image"] = metrics[f"AUC {mode}"] - metrics[f"AUC {mode}, blank image"]
    return metrics


def half_interval(scores, items, mode: str, *, times: int = 1000, seed: int = 0) -> float:
    """Half the width of a 95 % interval of an AUC: photographs drawn again with replacement, as questions about one of
    them are not independent."""
    asked = [[(scores[q.id], q.answer == "yes") for q in item.questions if q.mode == mode] for item in items]
    rng, values = np.random.default_rng(seed), []
    for _ in range(times):
        drawn = [pair for number in rng.integers(len(asked), size=len(asked)) for pair in asked[number]]
        values.append(auc(*zip(*drawn)) if drawn else float("nan"))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(high - low) / 2


def row(result: dict) -> dict:
    test = {name: value for name, value in result["test"].items() if not isinstance(value, dict)}
    validation = {
        f"{name}, validation": result["validation"][name] for name in test if name.startswith("AUC") and "," not in name
    }
    return {
        "arm": result["arm"],
        "seed": result["seed"],
        "trained parameters": result["trained"],
        "minutes": result["seconds"] / 60,
        **test,
        **validation,
    }


if __name__ == "__main__":
    sys.exit(main())
