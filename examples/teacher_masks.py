"""Masks of a teacher instead of exact ones: how much of what alignment gains is kept.

    python examples/train_tiny_sam.py --output runs/tiny-sam
    python examples/teacher_masks.py --teacher runs/tiny-sam --work runs/teacher_masks

Training scenes become a data set with phrases and boxes but no masks, `age_vlm.grounding` makes the masks, and the scenes
recipe trains on them, beside the same recipe with exact masks and without alignment: the same scenes in the same order, the
same seeds, the same length. Stopped, the same command goes on. Writes docs/results/teacher-masks-<environment>.csv and .md.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
from ablation import arm_recipe, run_all, run_arm, save_result
from pycocotools import mask as coco
from tables import environment_name, write_csv, write_markdown
from train_tiny_sam import box_of

from age_vlm.commands.recipe import DataRecipe, Recipe
from age_vlm.commands.recipe_file import load_recipe
from age_vlm.commands.sources import DataSource, load_source
from age_vlm.data.masks import decode_mask, encode_mask
from age_vlm.data.scene_questions import scene_sample
from age_vlm.data.scenes import Scene, draw_scene
from age_vlm.data.schema import FEATURES, Sample, grounding
from age_vlm.errors import check_new_folder, run_command
from age_vlm.evaluation.benchmark import answer_metrics
from age_vlm.grounding import load_teacher
from age_vlm.grounding.run import ground


TEACHER = "alignment, masks of a teacher"
# No alignment, exact masks, masks of a teacher: a gain is counted from the first to the second.
ARMS = ("cross-attention", "alignment", TEACHER)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="runs/tiny-sam", help="folder of a Sam2Model, or its Hub id")
    parser.add_argument(
        "--work", default="runs/teacher_masks", help="where masks and runs are kept, to go on after a stop"
    )
    parser.add_argument("--output", default="docs/results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scenes", type=int, help="training scenes (default: those of the scenes recipe)")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the scenes recipe)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other keys of the scenes recipe")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_command("teacher_masks", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    recipe, told = scenes_recipe(options)
    work = Path(options.work)
    if options.run:
        recipe = arm_recipe(recipe, options.arm, options.seeds[0])
        source = load_source(recipe.data, recipe.seed)
        if options.arm == TEACHER:
            source = with_masks_of(masks_folder(work, recipe), source)
        result = run_arm(
            recipe, options.arm, curve_on="validation", metrics=lambda *a: answer_metrics(*a)[0], source=source
        )
        save_result(Path(options.run), result)
        return

    check_new_folder("--work", work)
    check_new_folder("--output", options.output)
    work.mkdir(parents=True, exist_ok=True)
    grounded = [
        grounded_scenes(dataclasses.replace(recipe, seed=seed), options.teacher, work) for seed in options.seeds
    ]
    jobs = [job(arm, seed, recipe, work, told) for seed in options.seeds for arm in ARMS]
    results = run_all(__file__, jobs, work, options.workers)
    rows = with_gain([row(result) for result in results], dict(zip(options.seeds, grounded)))
    name = Path(options.output) / f"teacher-masks-{environment_name(results[0]['environment'])}"
    name.parent.mkdir(parents=True, exist_ok=True)
    write_csv(Path(f"{name}.csv"), rows)
    write_markdown(Path(f"{name}.md"), sorted(rows, key=lambda row: ARMS.index(row["arm"])), by="arm")
    print(Path(f"{name}.md").read_text("utf-8"))


def scenes_recipe(options: argparse.Namespace) -> tuple[Recipe, list[str]]:
    """The scenes recipe as the options have it, and what they change in it."""
    given = {"data.train": options.scenes, "training.steps": options.steps}
    # Other test scenes than those whose metrics `age-vlm demo` prints at every change of the recipe.
    told = ["data.test_seed=1", *options.set, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    return load_recipe(files("age_vlm") / "recipes" / "scenes.yaml", told), told


def job(arm: str, seed: int, recipe: Recipe, work: Path, told: Sequence[str]) -> tuple[str, list[str]]:
    """Name and options of one run."""
    name = f"{arm} {seed} {recipe.data.train} {recipe.training.steps}".replace(", ", "-").replace(" ", "-")
    return name, ["--set", *told, "--arm", arm, "--seeds", str(seed), "--work", str(work)]


def masks_folder(work: Path, recipe: Recipe) -> Path:
    return work / f"masks-{recipe.seed}-{recipe.data.train}"


def without_masks(scene: Scene) -> Sample:
    """The training sample of a scene with a box for each object that a phrase names, and no mask."""
    sample = scene_sample(scene)
    groundings = []
    for item in sample["groundings"]:
        place, named = (item["message"], item["start"], item["end"], 0), decode_mask(item["mask"])
        # Objects of a scene have no pixel in common.
        boxes = [box_of(thing.mask) for thing in scene.objects if (thing.mask & named).any()]
        groundings += [grounding(*place, None, box) for box in boxes]
    return {**sample, "groundings": groundings}


def training_scenes(recipe: Recipe) -> Iterator[Scene]:
    return (draw_scene("train", index, seed=recipe.seed) for index in range(recipe.data.train))


def grounded_scenes(recipe: Recipe, teacher: str, work: Path) -> dict[str, float]:
    """Masks for the recipe's training scenes in `masks_folder`; what became of the phrases, and the mean IoU of the masks
    that are kept with the exact ones."""
    loaded = load_teacher("sam2-transformers", teacher)
    drawn, masks = work / f"scenes-{recipe.seed}-{recipe.data.train}", masks_folder(work, recipe)
    if not drawn.exists():
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            samples = [without_masks(scene) for scene in training_scenes(recipe)]
            datasets.Dataset.from_list(samples, features=FEATURES).save_to_disk(f"{scratch}/scenes")
            Path(scratch, "scenes").rename(drawn)
    summary = ground(datasets.load_from_disk(drawn), masks, loaded, batch_size=32)
    rejects = summary.rejected_phrases.counts
    metrics = {"phrases": summary.phrases, "left out": sum(rejects.values()), "mean IoU": mean_iou(recipe, masks)}
    print(json.dumps({"seed": recipe.seed, **metrics, "reasons": dict(rejects)}), flush=True)
    return metrics


def mean_iou(recipe: Recipe, masks: Path) -> float:
    """Of the masks in a folder with the exact ones, matched by the box that the teacher was told; 0 where there are none."""
    samples = grounded_samples(masks).select_columns(["groundings"])
    overlaps = []
    for scene, sample in zip(training_scenes(recipe), samples, strict=True):
        exact = {tuple(box_of(item.mask)): _coded(encode_mask(item.mask)) for item in scene.objects}
        for item in sample["groundings"]:
            overlaps.append(coco.iou([_coded(item["mask"])], [exact[tuple(item["box"])]], [0])[0, 0])
    return float(np.mean(overlaps)) if overlaps else 0.0


def _coded(mask: dict) -> dict:
    return {"size": mask["size"], "counts": mask["counts"].encode("ascii")}


def grounded_samples(masks: Path) -> datasets.Dataset:
    recipe = DataRecipe(kind="dataset", path=str(masks), held_out=0.0)
    return load_source(recipe, 0, evaluation=False).train


def with_masks_of(masks: Path, source: DataSource) -> DataSource:
    """The source with the grounded samples of a folder to train on, which are of the same scenes."""
    return dataclasses.replace(source, train=grounded_samples(masks))


def row(result: dict) -> dict:
    return {
        "arm": result["arm"],
        "seed": result["seed"],
        "training scenes": result["recipe"]["data"]["train"],
        "steps": result["recipe"]["training"]["steps"],
        **{key: value for key, value in result["test"].items() if not isinstance(value, dict)},
    }


def with_gain(rows: list[dict], grounded: dict[int, dict[str, float]]) -> list[dict]:
    """Rows of the teacher also say how good its masks are, and which share of the gain in pointing they keep."""
    pointing = {(row["arm"], row["seed"]): row["pointing"] for row in rows}
    for each in rows:
        if each["arm"] == TEACHER:
            none, exact, own = (pointing[arm, each["seed"]] for arm in ARMS)
            each |= {f"masks of the teacher: {name}": value for name, value in grounded[each["seed"]].items()}
            each["share of the gain in pointing"] = (own - none) / (exact - none) if exact != none else ""
    return rows


if __name__ == "__main__":
    sys.exit(main())
