"""Drawn scenes: what alignment does, beside cross-attention alone, concatenation, and masks of other scenes.

    python examples/ablation_scenes.py --work runs/ablation_scenes

About 2 hours on 2 cores. Writes docs/results/scenes-<environment>.csv, .png (accuracy against training steps) and .md.
Seeds are of weights, data order and training scenes; the test scenes are the same for all and were not looked at before
the recipe was fixed. The concatenation's learning rate is chosen on validation scenes, among `--rates`, by the mean accuracy
over all kinds of questions, with the first seed.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
from ablation import ARMS, arm_recipe, run_all, run_arm, save_result
from tables import environment_name, write_csv, write_markdown

from age_vlm.commands.recipe_file import load_recipe
from age_vlm.errors import run_command
from age_vlm.evaluation.benchmark import answer_metrics


TARGET = 0.90
# What more arms reach, so that steps can be compared.
HALFWAY = 0.70


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="runs/ablation_scenes", help="where runs are kept, to go on after a stop")
    parser.add_argument("--output", default="docs/results")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_command("ablation_scenes", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    recipe = load_recipe(files("age_vlm") / "recipes" / "scenes.yaml")
    recipe.training = dataclasses.replace(
        recipe.training, evaluate_every=50, steps=options.steps or recipe.training.steps
    )
    # Other scenes than those whose metrics `age-vlm demo` prints at every change of the recipe.
    recipe.data = dataclasses.replace(recipe.data, test_seed=1)
    if options.run:
        recipe = arm_recipe(recipe, options.arm, options.seeds[0])
        if options.rate:
            recipe.training = dataclasses.replace(recipe.training, learning_rate=options.rate)
        result = run_arm(recipe, options.arm, curve_on="test", metrics=lambda *a: answer_metrics(*a)[0])
        save_result(Path(options.run), result | {"learning_rate": recipe.training.learning_rate})
        return

    steps = recipe.training.steps

    def job(arm: str, seed: int, rate: float | None = None):
        name, arguments = f"{arm} {seed}", ["--arm", arm, "--seeds", str(seed), "--steps", str(steps)]
        if rate is not None:
            name, arguments = f"{name} {rate} {steps}", [*arguments, "--rate", str(rate)]
        return name, arguments

    work = Path(options.work)
    jobs = [job(arm, seed) for seed in options.seeds for arm in options.arms if arm != "concatenation"]
    if "concatenation" in options.arms:
        trials = [job("concatenation", options.seeds[0], rate) for rate in options.rates]
        tuned = run_all(__file__, trials, work, options.workers)
        for result in tuned:
            metrics = result["validation"]
            adversarial = metrics["pope/adversarial/accuracy"]
            print(f"{result['learning_rate']}: mean {mean_accuracy(metrics):.3f}, adversarial {adversarial:.3f}")
        rate = max(tuned, key=lambda result: mean_accuracy(result["validation"]))["learning_rate"]
        print(f"concatenation: learning rate {rate}, chosen on validation")
        jobs += [job("concatenation", seed, rate) for seed in options.seeds]
    results = run_all(__file__, jobs, work, options.workers)
    results.sort(key=lambda result: (ARMS.index(result["arm"]), result["seed"]))

    rows = [row(result) for result in results]
    name = Path(options.output) / f"scenes-{environment_name(results[0]['environment'])}"
    name.parent.mkdir(parents=True, exist_ok=True)
    write_csv(Path(f"{name}.csv"), rows)
    plot(results, Path(f"{name}.png"))
    write_markdown(Path(f"{name}.md"), rows, by="arm")
    print(Path(f"{name}.md").read_text("utf-8"))


def mean_accuracy(metrics: dict) -> float:
    return statistics.mean(value for name, value in metrics.items() if name.endswith("/accuracy"))


def steps_to(accuracy: float, result: dict) -> int | str:
    """First measured step with that adversarial accuracy."""
    reached = (point["step"] for point in result["curve"] if point["adversarial_accuracy"] >= accuracy)
    return next(reached, "never")


def row(result: dict) -> dict:
    test = result["test"]
    return {
        "arm": result["arm"],
        "seed": result["seed"],
        "parameters": result["parameters"],
        "learning rate": result["learning_rate"],
        **{f"steps to adversarial {accuracy:.2f}": steps_to(accuracy, result) for accuracy in (HALFWAY, TARGET)},
        **{key: value for key, value in test.items() if not isinstance(value, dict)},
    }


def plot(results: list[dict], path: Path) -> None:
    metric, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    colours = dict(zip(ARMS, ("#7f7f7f", "#0072b2", "#d55e00", "#009e73")))
    for axis, key, title in (
        (axes[0], "adversarial_accuracy", "existence, adversarial: accuracy"),
        (axes[1], "pointing_accuracy", "pointing accuracy of the aligned heads, existence questions"),
    ):
        for arm in ARMS:
            curves = [result["curve"] for result in results if result["arm"] == arm and key in result["curve"][0]]
            for curve in curves:
                axis.plot(
                    [p["step"] for p in curve], [p[key] for p in curve], color=colours[arm], alpha=0.25, linewidth=1
                )
            if curves:
                middle = [statistics.median(points) for points in zip(*([p[key] for p in curve] for curve in curves))]
                axis.plot([p["step"] for p in curves[0]], middle, color=colours[arm], label=arm, linewidth=2)
        axis.set(title=title, xlabel="training step", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].axhline(TARGET, color="black", linewidth=0.8, linestyle=":")
    axes[0].legend(loc="lower right", fontsize=8)
    metric.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
