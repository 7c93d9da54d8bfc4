"""Trains a small SAM 2 from random weights on drawn scenes: a promptable teacher that needs no download.

    python examples/train_tiny_sam.py --output runs/tiny-sam
    age-vlm ground DATA --teacher sam2-transformers --model runs/tiny-sam

The classes are those of transformers, so the folder loads like a published SAM 2. It learns from boxes, from a point on the
object, and from a second point where its answer to the first one is wrong (Kirillov et al. 2023, arXiv 2304.02643,
appendix A). The metrics on the way are of validation scenes, those at the end of test scenes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor, Trainer, logging, set_seed

from age_vlm.commands.callbacks import CurveCallback
from age_vlm.commands.environment import environment
from age_vlm.commands.fit import train, training_arguments
from age_vlm.commands.recipe import TrainingRecipe
from age_vlm.console import plain_console, plain_table
from age_vlm.data.scenes import Scene, draw_scene
from age_vlm.errors import UserError, check_new_folder, run_command
from age_vlm.grounding import Prompt
from age_vlm.grounding.sam2 import Sam2Teacher
from age_vlm.hub import save_checkpoint


# Pixels of a side that the model sees; its masks have half as many.
SIDE = 64
# Objects a scene that are asked about in training.
PROMPTS = 4
# Scenes of a seed that no recipe has: what a teacher is to ground later shall be new to it.
UNSEEN = 1_000_000
# Beside the dice loss and the error of the predicted IoU, as SAM weighs them.
FOCAL_WEIGHT = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of the model, a new one")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=8, help=f"scenes a step, each with {PROMPTS} objects")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--validation", type=int, default=100, help="scenes of the metrics in training")
    parser.add_argument("--test", type=int, default=500, help="scenes of the metrics at the end")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training scenes and prompts")
    options = parser.parse_args(arguments)
    return run_command("train_tiny_sam", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "validation", "test"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected at least 1.")
    if not 0 < options.learning_rate < float("inf"):
        raise UserError(f"--learning-rate: got {options.learning_rate}, expected more than 0.")
    if options.seed < 0:
        raise UserError(f"--seed: got {options.seed}, expected at least 0.")
    output = Path(options.output)
    if output.exists():
        raise UserError(f"--output: '{output}' exists, expected a new folder.")
    check_new_folder("--output", output)
    logging.set_verbosity_error()
    set_seed(options.seed)
    started, cpu = time.monotonic(), time.process_time()
    model, processor = tiny_sam()
    validation = [draw_scene("validation", index) for index in range(options.validation)]

    def measure(model: Sam2Model) -> dict[str, float]:
        metrics = evaluate(Sam2Teacher(model, processor), validation)
        print({name: round(value, 3) for name, value in metrics.items()}, flush=True)
        return metrics

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        recipe = TrainingRecipe(
            steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate, adam_beta2=0.98
        )
        curve = CurveCallback(measure, max(1, options.steps // 10))
        trainer = PromptTrainer(
            model,
            training_arguments(recipe, options.seed, scratch, sys.stderr.isatty()),
            train_dataset=PromptedScenes(options.steps * options.batch_size, options.seed),
            data_collator=Collator(processor),
            callbacks=[curve],
        )
        train(trainer, sys.stderr.isatty())
        metrics = evaluate(Sam2Teacher(model, processor), [draw_scene("test", index) for index in range(options.test)])
        metrics = {
            "test": metrics,
            "validation_curve": curve.points,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": time.monotonic() - started,
            "cpu_seconds": time.process_time() - cpu,
            "settings": {name: value for name, value in vars(options).items() if name != "output"},
            "environment": environment(),
        }
        folder = save_checkpoint(model, processor, Path(scratch) / "model")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), "utf-8")
        folder.rename(output)
    show(metrics)
    print(f"Teacher: {output}")


def tiny_sam() -> tuple[Sam2Model, Sam2Processor]:
    """Random weights, and the processor that goes with them."""
    size, mask_size = ({"height": side, "width": side} for side in (SIDE, SIDE // 2))
    model = Sam2Model(tiny_config())
    # As SAM's own code begins: those of transformers, of a spread of 0.02, are made for far wider layers.
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    # SAM has one encoding of places, for prompts and for images; random weights would give each its own.
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)
    return model, Sam2Processor(Sam2ImageProcessor(size=size, mask_size=mask_size))


def tiny_config() -> Sam2Config:
    """SAM 2 with three stages of Hiera instead of four, at strides 2, 4 and 8, for images of `SIDE` pixels."""
    widths, grids = [32, 64, 128], [SIDE // 2, SIDE // 4, SIDE // 8]
    return Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "image_size": [SIDE, SIDE],
                "hidden_size": widths[0],
                "patch_kernel_size": [3, 3],
                "patch_stride": [2, 2],
                "patch_padding": [1, 1],
                "blocks_per_stage": [1, 1, 2],
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [1, 2, 4],
                "window_size_per_stage": [8, 4, 8],
                "global_attention_blocks": [],
                "num_query_pool_stages": 2,
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[grid, grid] for grid in grids],
            "fpn_hidden_size": 96,
            "fpn_top_down_levels": [0, 1, 2],
        },
        prompt_encoder_config={"hidden_size": 96, "image_size": SIDE, "patch_size": 8},
        # A mask of few pixels passes for unstable whenever one of them is in doubt.
        mask_decoder_config={
            "hidden_size": 96,
            "mlp_dim": 192,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 96,
            "dynamic_multimask_via_stability": False,
        },
    )


def box_of(mask: np.ndarray) -> np.ndarray:
    """[x0, y0, x1, y1] in pixels, right and lower edge exclusive, of a mask (height, width) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def point_in(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(x, y) of a pixel of the mask."""
    places = np.argwhere(mask)
    return places[rng.integers(len(places))][::-1].astype(np.float64)


class PromptedScenes(torch.utils.data.Dataset):
    """Training scenes with `PROMPTS` of their objects: image, masks, boxes that are a little off, points on them."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        scene = draw_scene("train", index, seed=UNSEEN + self.seed)
        rng = np.random.default_rng([self.seed, index])
        order = rng.permutation(len(scene.objects))
        masks = [scene.objects[order[number % len(order)]].mask for number in range(PROMPTS)]
        height, width = masks[0].shape
        boxes = np.stack([box_of(mask) for mask in masks])
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + rng.uniform(-0.1, 0.1, size=boxes.shape) * sides
        return {
            "image": scene.image,
            "masks": np.stack(masks),
            "boxes": boxes.clip(0, [width, height, width, height]),
            "points": np.stack([point_in(mask, rng) for mask in masks])[:, None],
        }


class Collator:
    """Scenes -> what `Sam2Model` takes, and `masks`, float32 (scenes, prompts, height, width)."""

    def __init__(self, processor: Sam2Processor) -> None:
        self.processor = processor

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        inputs = self.processor(
            images=[item["image"] for item in items],
            input_boxes=[item["boxes"].tolist() for item in items],
            input_points=[item["points"].tolist() for item in items],
            return_tensors="pt",
        )
        masks = torch.from_numpy(np.stack([item["masks"] for item in items])).float()
        return {**{name: inputs[name] for name in ("pixel_values", "input_boxes", "input_points")}, "masks": masks}


class PromptTrainer(Trainer):
    """Each image is encoded once, and its prompts are answered three times: from boxes, points, and corrected points."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        target, points = inputs["masks"], inputs["input_points"]
        labels = torch.ones(points.shape[:-1], dtype=torch.int64, device=points.device)
        boxed = model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"], multimask_output=False)
        seen = {"image_embeddings": boxed.image_embeddings}
        pointed = model(**seen, input_points=points, input_labels=labels, multimask_output=True)
        point, label = correction(pointed, target)
        corrected = model(
            **seen,
            input_points=torch.cat([points, point], dim=2),
            input_labels=torch.cat([labels, label], dim=2),
            multimask_output=False,
        )
        loss = sum(mask_loss(output, target) for output in (boxed, pointed, corrected))
        return (loss, boxed) if return_outputs else loss


@torch.no_grad()
def correction(output, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A point where the best of the masks is wrong, anywhere where it is right: (scenes, prompts, 1, 2) in pixels of the
    model, and whether it is on the object, (scenes, prompts, 1)."""
    height, width = target.shape[-2:]
    chosen = output.iou_scores.argmax(-1)[..., None, None, None].expand(*target.shape[:2], 1, height, width)
    found = enlarged(output.pred_masks, (height, width)).gather(2, chosen)[:, :, 0] > 0
    wrong = (found != target.bool()).flatten(2).float() + 1e-6
    place = torch.multinomial(wrong.flatten(0, 1), 1).view(*target.shape[:2], 1)
    label = target.flatten(2).gather(2, place).long()
    return torch.stack([place % width * (SIDE / width), place // width * (SIDE / height)], dim=-1), label


def enlarged(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits (scenes, prompts, masks, height, width) at the size of the image, as the processor enlarges them."""
    return F.interpolate(masks.flatten(0, 1), size, mode="bilinear").unflatten(0, masks.shape[:2])


def mask_loss(output, target: torch.Tensor) -> torch.Tensor:
    """Focal and dice loss, and the error of the predicted IoU; of several masks only the best learns the shape."""
    logits = enlarged(output.pred_masks, target.shape[-2:])
    target = target[:, :, None].expand_as(logits)
    focal = sigmoid_focal_loss(logits, target).mean((-2, -1))
    probable = logits.sigmoid()
    dice = 1 - (2 * (probable * target).sum((-2, -1)) + 1) / ((probable + target).sum((-2, -1)) + 1)
    shape = (FOCAL_WEIGHT * focal + dice).amin(-1)
    found = logits > 0
    iou = (found & target.bool()).sum((-2, -1)) / (found | target.bool()).sum((-2, -1))
    return (shape + F.l1_loss(output.iou_scores, iou, reduction="none").mean(-1)).mean()


def evaluate(teacher: Sam2Teacher, scenes: Sequence[Scene]) -> dict[str, float]:
    """Mean IoU with the exact masks over all objects, prompted by their boxes and by one point each, and the mean of the
    scores that the teacher gives itself."""
    metrics: dict[str, list[float]] = {}
    for first in range(0, len(scenes), 16):
        part = scenes[first : first + 16]
        prompts = {"box": [], "point": []}
        for scene in part:
            rng = np.random.default_rng([scene.seed, scene.index])
            prompts["box"].append([Prompt("", tuple(box_of(item.mask))) for item in scene.objects])
            prompts["point"].append([Prompt("", points=(tuple(point_in(o.mask, rng)),)) for o in scene.objects])
        for kind, asked in prompts.items():
            answers = teacher.ground([scene.image for scene in part], asked)
            for scene, found in zip(part, answers):
                for item, masks in zip(scene.objects, found):
                    iou = (masks.masks[0] & item.mask).sum() / (masks.masks[0] | item.mask).sum()
                    metrics.setdefault(f"{kind}: IoU", []).append(iou)
                    metrics.setdefault(f"{kind}: score", []).append(masks.scores[0])
    return {name: float(np.mean(values)) for name, values in metrics.items()}


def show(metrics: dict) -> None:
    settings = metrics["settings"]
    table = plain_table(["metric", "value"], f"{settings['test']} test scenes, seed {settings['seed']}")
    for name, value in metrics["test"].items():
        table.add_row(f"{name}, mean", f"{value:.3f}")
    table.add_row("steps", f"{settings['steps']:,}")
    table.add_row("parameters", f"{metrics['parameters']:,}")
    table.add_row("seconds", f"{metrics['seconds']:.0f}")
    table.add_row("CPU seconds", f"{metrics['cpu_seconds']:.0f}")
    plain_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
