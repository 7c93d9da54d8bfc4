"""What the ablations on scenes and on label maps share: the arms, one run of one arm, and the runs in parallel."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from concatenation import (
    ConcatenationCollator,
    concatenation_model,
    concatenation_processor,
    matched_intermediate_size,
)
from transformers import Trainer, logging, set_seed

from age_vlm.atomic_files import write_whole
from age_vlm.commands.build import build_model
from age_vlm.commands.callbacks import CurveCallback
from age_vlm.commands.environment import environment
from age_vlm.commands.fit import fit, train, training_arguments, warm_vision
from age_vlm.commands.recipe import Recipe
from age_vlm.commands.sources import DataSource, load_source
from age_vlm.commands.train import curve_measure
from age_vlm.data.questions import EvaluationItem
from age_vlm.errors import UserError, check_new_folder
from age_vlm.evaluation.answers import yes_scores
from age_vlm.evaluation.benchmark import split_items
from age_vlm.evaluation.grounding import PhraseAttention, phrase_attention, phrase_samples


ARMS = ("concatenation", "cross-attention", "alignment", "alignment, masks of others")


def arm_recipe(recipe: Recipe, arm: str, seed: int) -> Recipe:
    """The recipe of one arm: the same for all but for what the arm is about."""
    recipe = dataclasses.replace(recipe, seed=seed)
    if arm in ("concatenation", "cross-attention"):
        recipe.alignment = dataclasses.replace(recipe.alignment, weight=0.0)
    if arm == "alignment, masks of others":
        recipe.data = dataclasses.replace(recipe.data, masks="other")
    return recipe


def run_arm(recipe: Recipe, arm: str, *, curve_on: str, metrics, source: DataSource | None = None) -> dict:
    """Trains one arm and measures it.

    Args:
        recipe: of this arm, see `arm_recipe`.
        curve_on: split of the data, `validation` or `test`, on which the curve against steps is taken.
        metrics: (model, processor, items) -> metrics of the answers.
        source: data instead of what the recipe says.

    Returns:
        Metrics on validation and test, the curve, the number of parameters, the seconds that all of it took.
    """
    started = time.perf_counter()
    logging.set_verbosity_error()
    source = source or load_source(recipe.data, recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        if arm == "concatenation":
            model, processor, curve = _fit_concatenation(recipe, source, folder, getattr(source, curve_on))
            attention = concatenation_attention
        else:
            measure = printed(curve_measure(recipe, getattr(source, curve_on), images=200))
            model, processor, _, curve = fit(recipe, source, folder, measure=measure, progress=False)
            attention = _cross_attention
    result = {
        "arm": arm,
        "seed": recipe.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "curve": curve,
        "environment": environment(),
    }
    result["recipe"] = dataclasses.asdict(recipe)
    best = best_head = None
    for split in ("validation", "test"):
        items = getattr(source, split)
        phrases = attention(model, processor, items)
        layers, heads = range(phrases.attention.shape[1]), range(phrases.attention.shape[2])
        if best is None:  # chosen on validation, reported on test
            best = max(layers, key=lambda layer: float(phrases.scores([layer], heads)[1].mean()))
            single = [(layer, head) for layer in layers for head in heads]
            best_head = max(single, key=lambda pair: float(phrases.scores([pair[0]], [pair[1]])[1].mean()))
        result[split] = metrics(model, processor, items)
        result[split]["pointing, best layer"] = float(phrases.scores([best], heads)[1].mean())
        result[split]["attention mass, best layer"] = float(phrases.scores([best], heads)[0].mean())
        result[split]["pointing, best head"] = float(phrases.scores([best_head[0]], [best_head[1]])[1].mean())
        result[split]["pointing, chance"] = float((phrases.coverage > 0).float().mean())
        result[split]["attention mass, chance"] = float(phrases.coverage.mean())
        if arm != "concatenation":
            mass, hits = phrases.scores(recipe.alignment.layers, recipe.alignment.head_indices(len(heads)))
            result[split] |= {"attention mass": float(mass.mean()), "pointing": float(hits.mean())}
            result[split]["pointing by class"] = _by_class(phrases, hits)
    return result | {"seconds": time.perf_counter() - started}


def printed(measure):
    """`measure` that also prints what it found: the log of a run in the background says how far it is."""

    def measured(*arguments):
        metrics = measure(*arguments)
        print({name: round(value, 3) for name, value in metrics.items()}, flush=True)
        return metrics

    return measured


def _by_class(phrases: PhraseAttention, hits: torch.Tensor) -> dict[str, float]:
    classes: dict[str, list[float]] = {}
    for question, hit in zip(phrases.questions, hits.tolist()):
        classes.setdefault(question.subject, []).append(hit)
    return {name: sum(values) / len(values) for name, values in classes.items()}


def _cross_attention(model, processor, items: Sequence[EvaluationItem]) -> PhraseAttention:
    return phrase_attention(model, processor, items)


def _fit_concatenation(recipe: Recipe, source, folder: str, curve_items):
    set_seed(recipe.seed)
    crossing, processor = build_model(recipe.model, source)
    grid = crossing.image_grid(processor.image_geometry(64, 64).size)
    size = matched_intermediate_size(crossing.config, sum(p.numel() for p in crossing.parameters()))
    model = concatenation_model(crossing.config, size)
    processor = concatenation_processor(processor, grid)
    warm_vision(recipe, source, model.model.vision_tower, processor.image_processor, folder, False)
    asked = split_items(curve_items[:200], lambda q: q.kind == "existence" and q.mode == "adversarial")
    questions = [question for item in asked for question in item.questions]

    def measure(model) -> dict[str, float]:
        scores = yes_scores(model, processor, asked)
        right = sum((scores[q.id] > 0) == (q.answer == "yes") for q in questions)
        return {"adversarial_accuracy": right / len(questions)}

    curve = CurveCallback(printed(measure), recipe.training.evaluate_every)
    trainer = Trainer(
        model,
        training_arguments(recipe.training, recipe.seed, folder, False),
        train_dataset=source.train,
        data_collator=ConcatenationCollator(processor, grid[0] * grid[1]),
        callbacks=[curve],
    )
    train(trainer, False)
    return model.eval(), processor, curve.points


@torch.inference_mode()
def concatenation_attention(model, processor, items: Sequence[EvaluationItem], batch_size: int = 64) -> PhraseAttention:
    """Self-attention of a phrase's last token over the image tokens, as if that were all it could see."""
    from age_vlm.data.masks import decode_mask
    from age_vlm.processing import image_geometry

    samples, questions = phrase_samples(items)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attention, coverage = [], []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        texts = [processor.apply_chat_template(sample["messages"], tokenize=False) for sample in part]
        ends = [text.index(q.text) + q.phrase[1] for text, q in zip(texts, questions[start:])]
        inputs = processor(
            images=[sample["images"][0] for sample in part],
            text=texts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        offsets = [
            processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            for text in texts
        ]
        image = inputs["input_ids"] == processor.image_token_id
        tokens = int(image[0].sum())
        # One image token of the text became `tokens` of the input, all of them before the phrase.
        last = [
            max(i for i, (_, right) in enumerate(spans) if right <= end) + tokens - 1
            for spans, end in zip(offsets, ends)
        ]
        outputs = model(
            **{key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}, output_attentions=True
        )
        rows = torch.arange(len(part))
        weights = torch.stack([layer[rows, :, last] for layer in outputs.attentions], dim=1)
        weights = torch.stack([weights[row][:, :, image[row]] for row in rows])
        attention.append(weights / weights.sum(-1, keepdim=True))
        for sample in part:
            mask = torch.from_numpy(decode_mask(sample["groundings"][0]["mask"]))
            geometry = image_geometry(processor.image_processor, *mask.shape)
            grid = [side // processor.patch_size for side in geometry.size]
            coverage.append(geometry.mask_coverage(mask[None], *grid)[0].flatten())
    model.set_attn_implementation(implementation)
    return PhraseAttention(torch.cat(attention), torch.stack(coverage), questions)


def run_all(script: str, jobs: Sequence[tuple[str, list[str]]], work: Path, workers: int) -> list[dict]:
    """Runs `script --run ...` for every job, so many at a time, each in a process with its share of the cores.

    A job that is done already is not run again: an ablation that was stopped goes on where it was.
    """
    check_new_folder("--work", work)
    work.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    variables = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    waiting = [(work / f"{name.replace(', ', '-').replace(' ', '-')}.json", arguments) for name, arguments in jobs]
    results = [path for path, _ in waiting]
    waiting = [(path, arguments) for path, arguments in waiting if not path.exists()]
    running: list[tuple[Path, subprocess.Popen]] = []
    while waiting or running:
        while waiting and len(running) < workers:
            path, arguments = waiting.pop(0)
            with path.with_suffix(".log").open("w") as log:
                command = [sys.executable, script, "--run", str(path), *arguments]
                running.append((path, subprocess.Popen(command, env=variables, stdout=log, stderr=log)))
        path, process = running.pop(0)
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            running.append((path, process))
            continue
        if code:
            for _, other in running:
                other.terminate()
            raise UserError(f"{path.stem} failed, see {path.with_suffix('.log')}.")
        print(f"done: {path.stem}", flush=True)
    loaded = [json.loads(path.read_text("utf-8")) for path in results]
    for path, result in zip(results, loaded):
        if _without_arm(result["recipe"]) != _without_arm(loaded[0]["recipe"]):
            raise UserError(
                f"--work: '{path}' belongs to a different recipe than '{results[0]}'; use that recipe or a new folder."
            )
    return loaded


def _without_arm(recipe: dict) -> dict:
    """A recipe without what differs from arm to arm and from seed to seed."""
    data = {key: value for key, value in recipe["data"].items() if key != "masks"}
    alignment = {key: value for key, value in recipe["alignment"].items() if key != "weight"}
    training = {key: value for key, value in recipe["training"].items() if key != "learning_rate"}
    return {**recipe, "seed": None, "data": data, "alignment": alignment, "training": training}


def save_result(path: Path, result: dict) -> None:
    write_whole(path, json.dumps(result, indent=1))
