"""The chain from boxes over a teacher's masks to metrics: what it compares, and that it runs and goes on."""

import argparse
import csv
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from age_vlm.commands.recipe import DataRecipe, Recipe
from age_vlm.commands.sources import load_source
from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.masks import decode_mask, encode_mask
from age_vlm.data.scene_questions import scene_sample
from age_vlm.data.scenes import draw_scene
from age_vlm.data.schema import FEATURES


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("teacher_masks", EXAMPLES / "teacher_masks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture(scope="module")
def teacher(example, tmp_path_factory) -> Path:
    """A folder of the small SAM 2 that has learned nothing, but takes all its masks to be good."""
    from train_tiny_sam import tiny_sam

    torch.manual_seed(0)
    model, processor = tiny_sam()
    torch.nn.init.constant_(model.mask_decoder.iou_prediction_head.proj_out.bias, 5.0)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def with_exact_masks(example, index: int, spoil=lambda mask: mask) -> dict:
    """What a teacher makes of `without_masks` that finds every object exactly, or spoilt."""
    scene = draw_scene("train", index, seed=4)
    sample = example.without_masks(scene)
    exact = {tuple(example.box_of(item.mask)): item.mask for item in scene.objects}
    found = [{**item, "mask": encode_mask(spoil(exact[tuple(item["box"])]))} for item in sample["groundings"]]
    return {**sample, "groundings": found}


def test_a_perfect_teacher_gives_the_batches_of_the_exact_run(example, processor):
    collator = AgeVlmCollator(processor, (8, 8), independent_turns=True)
    several = 0
    for index in range(12):
        exact, found = scene_sample(draw_scene("train", index, seed=4)), with_exact_masks(example, index)
        expected, batch = collator([exact]), collator([found])
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch[key], value), key
        several += len(exact["groundings"]) < len(found["groundings"])
    assert several, "no phrase of these scenes names several things"


def test_no_mask_goes_into_what_is_grounded(example):
    for index in range(5):
        groundings = example.without_masks(draw_scene("train", index))["groundings"]
        assert groundings and all(item["mask"] is None and len(item["box"]) == 4 for item in groundings)


@pytest.mark.parametrize("spoil", [lambda mask: mask, np.ones_like], ids=["exact", "whole image"])
def test_the_mean_iou_is_that_of_the_masks(example, spoil, tmp_path):
    recipe = Recipe(seed=4, data=DataRecipe(train=3))
    samples = [with_exact_masks(example, index, spoil) for index in range(3)]
    datasets.Dataset.from_list(samples, features=FEATURES).save_to_disk(tmp_path / "masks")
    shares = [decode_mask(item["mask"]).mean() for n in range(3) for item in with_exact_masks(example, n)["groundings"]]
    expected = 1.0 if spoil is not np.ones_like else np.mean(shares)
    assert example.mean_iou(recipe, tmp_path / "masks") == pytest.approx(expected)


def test_the_chain_runs_and_goes_on(example, teacher, tmp_path, capsys):
    work, output = tmp_path / "work", tmp_path / "results"
    small = ["warm_start.steps=0", "training.batch_size=2", "data.validation=4", "data.test=4"]
    recipe, told = example.scenes_recipe(argparse.Namespace(scenes=4, steps=2, set=small))
    recipe.seed = 1
    # In this process: `run_all` starts one for each run, and three more would have to load torch. It finds these done.
    work.mkdir()
    metrics = example.grounded_scenes(recipe, str(teacher), work)
    results = {}
    for arm in example.ARMS:
        name, arguments = example.job(arm, 1, recipe, work, told)
        assert example.main(["--run", str(work / f"{name}.json"), *arguments]) == 0
        results[arm] = json.loads((work / f"{name}.json").read_text("utf-8"))
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}

    told = ["--work", str(work), "--seeds", "1", "--scenes", "4", "--steps", "2", "--set", *small]
    assert example.main(["--teacher", str(teacher), "--output", str(output), *told]) == 0
    done = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if done[path] != before[path]} <= {"report.html"}, "what is done stays"

    asked = [item for n in range(4) for item in example.without_masks(draw_scene("train", n, seed=1))["groundings"]]
    assert metrics["phrases"] and metrics["phrases"] + metrics["left out"] == len(asked)
    assert 0 < metrics["mean IoU"] < 1
    (table,) = output.glob("teacher-masks-*.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == list(example.ARMS)
    for row in rows:
        assert (row["training scenes"], row["steps"], row["seed"]) == ("4", "2", "1")
        for metric in ("pointing", "attention mass", "pope/adversarial/accuracy"):
            assert float(row[metric]) == pytest.approx(results[row["arm"]]["test"][metric], abs=1e-4)
    assert int(rows[-1]["masks of the teacher: phrases"]) == metrics["phrases"]
    shown = table.with_suffix(".md").read_text("utf-8")
    assert all(name in shown for name in ("share of the gain in pointing", *example.ARMS))


def test_the_teachers_arm_trains_on_its_masks(example, tmp_path):
    samples = [with_exact_masks(example, index, np.ones_like) for index in range(3)]
    datasets.Dataset.from_list(samples, features=FEATURES).save_to_disk(tmp_path / "masks")
    scenes = load_source(DataRecipe(train=3, validation=2, test=2), 4)
    source = example.with_masks_of(tmp_path / "masks", scenes)
    assert [item.image_id for item in source.test] == [item.image_id for item in scenes.test]
    for index in range(3):
        assert source.train[index]["images"][0].tobytes() == scenes.train[index]["images"][0].tobytes()
        assert source.train[index]["messages"] == scenes.train[index]["messages"]
        assert all(decode_mask(item["mask"]).all() for item in source.train[index]["groundings"])
        assert not any(decode_mask(item["mask"]).all() for item in scenes.train[index]["groundings"])


def test_the_gain_is_counted_from_no_alignment_to_exact_masks(example):
    pointing = {"cross-attention": 0.4, "alignment": 0.9, example.TEACHER: 0.85}
    rows = [{"arm": arm, "seed": 2, "pointing": value} for arm, value in pointing.items()]
    found = example.with_gain(rows, {2: {"mean IoU": 0.8}})[-1]
    assert found["share of the gain in pointing"] == pytest.approx(0.9)
    assert found["masks of the teacher: mean IoU"] == 0.8
    assert all("share of the gain in pointing" not in row for row in rows[:2])


def test_a_teacher_that_is_not_there_is_one_sentence(example, tmp_path, capsys):
    told = ["--work", str(tmp_path / "work"), "--output", str(tmp_path), "--teacher", str(tmp_path / "none" / "there")]
    assert example.main([*told, "--scenes", "2"]) == 2
    assert capsys.readouterr().err.startswith(f"teacher_masks: model: got '{tmp_path / 'none' / 'there'}', expected")


def test_a_result_says_which_recipe_it_is_of(example):
    recipe = dataclasses.asdict(Recipe(data=DataRecipe(train=7)))
    result = {"arm": "alignment", "seed": 1, "recipe": recipe, "test": {"pointing": 0.5, "pointing by class": {}}}
    assert example.row(result) == {
        "arm": "alignment",
        "seed": 1,
        "training scenes": 7,
        "steps": 1000,
        "pointing": 0.5,
    }
