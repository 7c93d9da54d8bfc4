"""What training computes once instead of again and again: a step with each of `shared_prefix`, `text_cache` and `encoder_cache`.

python benchmarks/training_step.py data.images=coco/images data.instances=coco/instances.json training.precision=fp32

In every round all ways take a step, without an optimizer, on the same samples; what is reported is the ratio to the first way,
packed rows and all logits, within the round: median, lowest and highest. The caches are warm, as from the second epoch on. Needs
the components and photographs of examples/recipes/photographs/joint.yaml. Writes docs/results/training-step-<environment>.csv.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.table import Table


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from tables import environment_name, write_csv  # noqa: E402
from transformers import set_seed  # noqa: E402

from age_vlm.commands.build import build_model, set_trainable  # noqa: E402
from age_vlm.commands.environment import environment  # noqa: E402
from age_vlm.commands.recipe_file import load_recipe  # noqa: E402
from age_vlm.commands.sources import load_source  # noqa: E402
from age_vlm.console import plain_console  # noqa: E402
from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator  # noqa: E402
from age_vlm.training.encoder_cache import encoder_cache  # noqa: E402
from age_vlm.training.learned_positions import learned_positions  # noqa: E402
from age_vlm.training.text_cache import text_cache  # noqa: E402


# Each with what the one before it has.
WAYS = ("packing", "learned logits", "shared_prefix", "text_cache", "encoder_cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="recipe keys: section.key=value")
    parser.add_argument("--recipe", default=str(HERE.parent / "examples" / "recipes" / "photographs" / "joint.yaml"))
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up (default: 5)")
    parser.add_argument("--output", default="docs/results", help="folder of the table (default: docs/results)")
    options = parser.parse_args()
    recipe, here = load_recipe(options.recipe, options.overrides), environment()
    set_seed(recipe.seed)
    source = load_source(recipe.data, recipe.seed)
    model, processor = build_model(recipe.model, source)
    set_trainable(model, recipe.training)
    model.train()
    samples = [source.train[number] for number in range(recipe.training.batch_size)]
    batches = {
        shared: AgeVlmCollator.from_model(
            model, processor, independent_turns=True, packing=not shared, shared_prefix=shared
        )(samples)
        for shared in (False, True)
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, options.rounds):
            for way in WAYS if number % 2 else reversed(WAYS):
                taken, losses[way] = step(model, batches[WAYS.index(way) >= 2], way, folder, recipe.training.precision)
                if number >= 0:
                    seconds[way].append(taken)
    rows = []
    for way in WAYS:
        ratios = [own / first for own, first in zip(seconds[way], seconds[WAYS[0]])]
        rows.append(
            {
                "with": way,
                "text tokens": batches[WAYS.index(way) >= 2]["input_ids"].numel(),
                "seconds": statistics.median(seconds[way]),
                "ratio": statistics.median(ratios),
                "ratio, lowest": min(ratios),
                "ratio, highest": max(ratios),
                "loss": losses[way],
            }
        )
    table = Table("with", "text tokens", "seconds a step", "ratio (lowest to highest)", "loss")
    for row in rows:
        ratio = f"{row['ratio']:.3f} ({row['ratio, lowest']:.3f} to {row['ratio, highest']:.3f})"
        table.add_row(row["with"], str(row["text tokens"]), f"{row['seconds']:.2f}", ratio, f"{row['loss']:.5f}")
    plain_console().print(table)
    path = Path(options.output) / f"training-step-{environment_name(here)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(
        path, [{**row, "threads": here["threads"], "seed": recipe.seed, "rounds": options.rounds} for row in rows]
    )
    print(f"Wrote {path}")


def step(model, batch: dict, way: str, folder: str, precision: str) -> tuple[float, float]:
    """Seconds of a forward and a backward pass, with caches that have seen the batch, and the loss."""
    inputs = {key: value.to(model.device) for key, value in batch.items() if key not in GROUNDING_KEYS}
    learned = int((inputs["labels"][:, 1:] != -100).sum())
    level = WAYS.index(way)
    if level >= 1:
        inputs |= learned_positions(inputs["labels"])
    with ExitStack() as kept:
        if level >= 3:
            kept.enter_context(text_cache(model.model))
        if level >= 4:
            kept.enter_context(encoder_cache(model.model.vision_tower, folder))
        kept.enter_context(torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"))
        if level >= 3:
            with torch.no_grad():
                model(**inputs, use_cache=False)
        model.zero_grad()
        started = now(model.device)
        loss = model(**inputs, use_cache=False, num_items_in_batch=learned).loss
        loss.backward()
        return now(model.device) - started, loss.item()


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
