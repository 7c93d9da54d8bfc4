"""Trains two steps of each case and prints the most memory they took beside what `age-vlm plan` says they would.

python benchmarks/plan_memory.py
python benchmarks/plan_memory.py --cases "1B, stage 2, bfloat16 weights" --output docs/results

On an accelerator the measured figure is `max_memory_allocated`. On a CPU it is the growth of the resident set from before the
model is built to its highest point in training, in a process of its own. glibc would keep freed blocks for later, and grows
the size from which it does not: MALLOC_MMAP_THRESHOLD_ fixes that size at 64 KiB, so that a freed tensor leaves the process.
A step of a tiny model comes first, so that what the libraries load is not counted. Weights are random.
"""

import argparse
import csv
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from tables import environment_name, write_csv  # noqa: E402
from transformers import TrainerCallback, logging, set_seed  # noqa: E402

from age_vlm.commands.environment import environment  # noqa: E402
from age_vlm.commands.fit import training_arguments  # noqa: E402
from age_vlm.commands.planning.model import PlannedModel  # noqa: E402
from age_vlm.commands.planning.plan import Hardware, plan  # noqa: E402
from age_vlm.commands.recipe import Recipe  # noqa: E402
from age_vlm.commands.recipe_file import load_recipe  # noqa: E402
from age_vlm.training.trainer import AgeVlmTrainer  # noqa: E402


SCENES = HERE.parent / "src" / "age_vlm" / "recipes" / "scenes.yaml"
STAGE_2 = HERE.parent / "examples" / "recipes" / "age-vlm-1b" / "stage2.yaml"
NO_DATA = ["data.path=not-named-yet", "mix.0.path=not-named-yet"]
# 74 million parameters, 7 x 7 image tokens of 224 pixels.
MIDDLE = """model={preset: age-vlm-tiny, image_size: 224, config: {
  text_config: {model_type: llama, vocab_size: 32000, hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 8,
    num_attention_heads: 8, num_key_value_heads: 4, max_position_embeddings: 2048, tie_word_embeddings: true},
  vision_config: {model_type: timm_wrapper, architecture: convnext_tiny, do_pooling: false,
    model_args: {head_hidden_size: null}, hidden_size: 768},
  cross_attention_layers: [2, 6]}}"""
ALL_LEARN = [f"training.{part}=full" for part in ("vision", "projector", "cross_attention", "language_model")]
ONE_B = ["model={preset: age-vlm-1b}", "training.batch_size=1", "training.gradient_accumulation=2", *NO_DATA]

BATCH_8 = ["training.batch_size=8", "training.gradient_accumulation=1"]
PLAIN = ["training.precision=fp32", "training.gradient_checkpointing=false"]

# Name -> recipe, overrides, tokens of a text (None: of the data), type of the weights.
CASES = {
    "scenes, batch 32": (SCENES, ["data.train=200"], None, None),
    "74M, all parts, batch 8": (STAGE_2, [MIDDLE, *NO_DATA, *ALL_LEARN, *BATCH_8, *PLAIN], 256, None),
    "74M, the same, checkpointing": (STAGE_2, [MIDDLE, *NO_DATA, *ALL_LEARN, *BATCH_8, PLAIN[0]], 256, None),
    "74M, stage 2, batch 8, bf16": (STAGE_2, [MIDDLE, *NO_DATA, *BATCH_8], 256, None),
    "1B, stage 2, bfloat16 weights": (STAGE_2, ONE_B, 256, torch.bfloat16),
    "1B, stage 2, float32 weights": (STAGE_2, ONE_B, 256, None),
}


def load_case(name: str) -> tuple[Recipe, int | None, torch.dtype | None]:
    path, overrides, length, dtype = CASES[name]
    return load_recipe(path, overrides), length, dtype


class StepSeconds(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def train_two_steps(planned: PlannedModel, recipe: Recipe) -> float:
    """Seconds of the second step, when the optimizer has its states."""
    batch = planned.batch(recipe.training.batch_size)
    batch["pixel_values"] = torch.zeros(batch["pixel_values"].shape)
    model = planned.copy()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.zero_()
    settings = dataclasses.replace(recipe.training, steps=2, workers=0, save_every=0, batch_size=1)
    timer = StepSeconds()
    with tempfile.TemporaryDirectory() as folder:
        trainer = AgeVlmTrainer(
            model,
            training_arguments(settings, 0, folder, progress=False),
            train_dataset=[batch] * 64,
            data_collator=lambda features: features[0],
            callbacks=[timer],
            alignment=recipe.alignment,
            learning_rates=recipe.training.learning_rates,
        )
        reset_peak()
        trainer.train()
    return timer.times[3] - timer.times[2]


def resident(key: str) -> int:
    """Bytes of `VmRSS`, now, or `VmHWM`, at most since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(name: str) -> dict[str, float]:
    """Runs in a process of its own."""
    logging.set_verbosity_error()
    set_seed(0)
    warm_up = load_recipe(SCENES, ["data.train=4", "training.batch_size=2"])
    train_two_steps(PlannedModel(warm_up), warm_up)
    recipe, length, dtype = load_case(name)
    planned = PlannedModel(recipe, length=length, dtype=dtype)
    gc.collect()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else resident("VmRSS")
    seconds = train_two_steps(planned, recipe)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
    return {"measured": peak - before, "seconds": seconds}


def measure_apart(name: str) -> dict[str, float]:
    settings = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-W", "ignore::FutureWarning", __file__, "--measure", name]
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--output", help="folder for a CSV file named by the environment")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return

    rows = []
    for name in options.cases:
        recipe, length, dtype = load_case(name)
        result = plan(recipe, Hardware(overhead=0.0), length=length, dtype=dtype)
        found = measure_apart(name)
        row = {
            "case": name,
            "parameters": sum(result.parameters.values()),
            "learning": sum(result.trainable.values()),
            "rows": result.batch_size,
            "tokens": result.length,
            "precision": result.precision,
            "checkpointing": result.checkpointing,
            "measured_gb": found["measured"] / 1e9,
            "planned_gb": result.tensors / 1e9,
            "planned_to_measured": result.tensors / found["measured"],
            "seconds_a_step": found["seconds"],
        }
        rows.append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    table = Table(*rows[0], title=f"peak memory of a training step, {environment_name(environment())}")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=180).print(table)
    if options.output:
        path = Path(options.output) / f"plan-memory-{environment_name(environment())}.csv"
        # Cases that were measured before stay, since the large ones need a machine to themselves.
        earlier = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
        kept = {row["case"]: row for row in [*earlier, *rows]}
        write_csv(path, [kept[name] for name in CASES if name in kept])


if __name__ == "__main__":
    main()
