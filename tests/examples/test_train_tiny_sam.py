"""The small SAM 2 that is trained here: prompts, losses, and a folder that loads like a published one."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes
from transformers import Sam2Model

from age_vlm.cli import main as age_vlm
from age_vlm.data.scene_datasets import to_dataset
from age_vlm.data.scenes import draw_scene
from age_vlm.grounding import load_teacher


SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny_sam.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_tiny_sam", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny-sam"
    told = ["--steps", "2", "--batch-size", "2", "--validation", "2", "--test", "3", "--seed", "5"]
    assert example.main(["--output", str(folder), *told]) == 0
    return folder


def test_what_is_saved_is_what_was_measured(example, trained):
    assert list(trained.parent.iterdir()) == [trained], "nothing unfinished is left beside it"
    assert sum(file.stat().st_size for file in trained.iterdir()) < 10e6
    metrics = json.loads((trained / "metrics.json").read_text("utf-8"))
    teacher = load_teacher("sam2-transformers", trained, device="cpu")
    again = example.evaluate(teacher, [draw_scene("test", index) for index in range(3)])
    assert set(again) == {"box: IoU", "box: score", "point: IoU", "point: score"}
    assert metrics["test"] == pytest.approx(again, abs=1e-6)
    assert (metrics["settings"]["seed"], metrics["settings"]["steps"]) == (5, 2)
    assert metrics["seconds"] > 0 and metrics["cpu_seconds"] > 0
    untrained = example.tiny_config()
    assert metrics["parameters"] == sum(p.numel() for p in Sam2Model(untrained).parameters())


def test_the_command_line_grounds_with_it(trained, tmp_path, capsys):
    to_dataset("validation", 3).save_to_disk(tmp_path / "data")
    told = ["--teacher", "sam2-transformers", "--model", str(trained), "--min-score", "0"]
    assert age_vlm(["ground", str(tmp_path / "data"), *told, "--output", str(tmp_path / "masks")]) == 0
    assert "masks by sam2-transformers" in capsys.readouterr().out
    assert len(datasets.load_dataset(str(tmp_path / "masks"), split="train", cache_dir=str(tmp_path / "cache"))) == 3


def test_it_learns_a_batch(example):
    torch.manual_seed(0)
    model, processor = example.tiny_sam()
    model.train()
    scenes = example.PromptedScenes(2, seed=0)
    batch = example.Collator(processor)([scenes[0], scenes[1]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = example.PromptTrainer.compute_loss(None, model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_prompts_are_of_the_objects(example):
    scenes = example.PromptedScenes(8, seed=3)
    for index in range(8):
        item, again = scenes[index], scenes[index]
        assert all(np.array_equal(item[name], again[name]) for name in ("masks", "boxes", "points"))
        exact = masks_to_boxes(torch.from_numpy(item["masks"])).numpy() + np.array([0, 0, 1, 1])
        assert np.array_equal(exact, np.stack([example.box_of(mask) for mask in item["masks"]]))
        sides = np.tile(exact[:, 2:] - exact[:, :2], 2)
        assert (np.abs(item["boxes"] - exact) <= 0.1 * sides).all() and not np.array_equal(item["boxes"], exact)
        for mask, ((x, y),) in zip(item["masks"], item["points"].astype(int)):
            assert mask[y, x]
    # The images that it will ground are those of the recipes' seeds.
    assert scenes[0]["image"].tobytes() != draw_scene("train", 0, seed=3).image.tobytes()


def answer(target: torch.Tensor, *logits: float, scores: list[float]) -> SimpleNamespace:
    """An output whose masks are the target, so many times as large; the last one is of the opposite sign."""
    signs = 2 * target - 1
    return SimpleNamespace(
        pred_masks=torch.stack([value * signs for value in logits], dim=2).requires_grad_(),
        iou_scores=torch.tensor(scores).expand(*target.shape[:2], len(logits)),
    )


@pytest.fixture
def target() -> torch.Tensor:
    target = torch.zeros(1, 2, 16, 16)
    target[0, 0, 2:7, 3:9] = 1
    target[0, 1, 10:, :4] = 1
    return target


def test_a_mask_that_is_right_costs_nothing_and_only_the_best_of_several_learns(example, target):
    assert example.mask_loss(answer(target, 30.0, scores=[1.0]), target).item() == pytest.approx(0, abs=1e-4)
    assert example.mask_loss(answer(target, 30.0, scores=[0.25]), target).item() == pytest.approx(0.75, abs=1e-4)
    several = answer(target, -2.0, 2.0, -1.0, scores=[0.0, 1.0, 0.0])
    example.mask_loss(several, target).backward()
    learns = several.pred_masks.grad.abs().sum((0, 1, 3, 4)) > 0
    assert learns.tolist() == [False, True, False]


def test_a_corrective_point_lies_where_the_chosen_mask_is_wrong(example, target):
    torch.manual_seed(0)
    side = target.shape[-1]
    chosen = target.clone()
    chosen[0, 0, 2:4] = 0
    chosen[0, 1, :2, 12:] = 1
    masks = 10 * (2 * torch.stack([target, chosen], dim=2) - 1)
    output = SimpleNamespace(pred_masks=masks, iou_scores=torch.tensor([0.2, 0.9]).expand(1, 2, 2))
    for _ in range(5):
        points, labels = example.correction(output, target)
        assert points.shape == (1, 2, 1, 2) and labels.tolist() == [[[1], [0]]]
        x, y = (points * side / example.SIDE).long().unbind(-1)
        for number in (0, 1):
            row, column = y[0, number, 0], x[0, number, 0]
            assert chosen[0, number, row, column] != target[0, number, row, column]


def test_a_folder_that_is_there_stays_as_it_is(example, tmp_path, capsys):
    output = tmp_path / "tiny-sam"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert example.main(["--output", str(output), "--steps", "1"]) == 2
    assert capsys.readouterr().err == f"train_tiny_sam: --output: '{output}' exists, expected a new folder.\n"
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", "0"], "--steps: got 0, expected at least 1."),
        (["--batch-size", "-1"], "--batch-size: got -1, expected at least 1."),
        (["--learning-rate", "nan"], "--learning-rate: got nan, expected more than 0."),
        (["--seed", "-1"], "--seed: got -1, expected at least 0."),
    ],
)
def test_bad_options_are_one_sentence(example, options, sentence, tmp_path, capsys):
    assert example.main(["--output", str(tmp_path / "sam"), *options]) == 2
    assert capsys.readouterr().err == f"train_tiny_sam: {sentence}\n"
    assert not list(tmp_path.iterdir())
