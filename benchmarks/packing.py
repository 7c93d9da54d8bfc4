"""Training steps with packed and with padded batches of drawn scenes, side by side: tokens a second, and the losses.

python benchmarks/packing.py
python benchmarks/packing.py --rounds 3 --mixes "scenes mix" training.vision=frozen

A step is forward and backward as the trainer makes them, alignment loss included, without the optimizer, which costs the same
for both. In every round each way takes one step with the same samples, in an order that turns from round to round, and what
is reported is the ratio within the round: median, lowest and highest. Tokens are those of the texts, without padding, and
the same for both. Writes docs/results/packing-<environment>.csv. Weights are random.

The time of the vision encoder is measured apart: it sees as many images either way, so packing cannot shorten it. With it
and the share of padding comes the ratio that were possible if all else cost as much as the row has tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from tables import environment_name, write_csv  # noqa: E402
from transformers import set_seed  # noqa: E402

from age_vlm.commands.build import build_model, set_trainable  # noqa: E402
from age_vlm.commands.environment import environment  # noqa: E402
from age_vlm.commands.fit import training_arguments  # noqa: E402
from age_vlm.commands.recipe_file import load_recipe  # noqa: E402
from age_vlm.commands.sources import load_sources  # noqa: E402
from age_vlm.data.collator import AgeVlmCollator  # noqa: E402
from age_vlm.data.packing import packed_rows  # noqa: E402
from age_vlm.training import AgeVlmTrainer  # noqa: E402


STAGE_4 = HERE.parent / "examples" / "recipes" / "scenes" / "stage4.yaml"
SCENES = 256
COMMON = ["model={preset: age-vlm-tiny}", f"data.train={SCENES}", "data.validation=1", "data.test=1"]
CHATS = "training.independent_turns=false"


def captions(weight: float) -> str:
    return f"mix=[{{texts: [caption], train: {SCENES}, weight: {weight}}}]"


# The data of stage 1, captions, with those of stage 4, all turns of a scene.
MIXES = {
    "scenes mix": [captions(1)],
    "scenes mix, chats": [captions(1), CHATS],
    "three captions to one": [captions(3)],
    "captions (stage 1)": ["data.texts=[caption]"],
    "all turns (stage 4)": [],
}
# Of rows that are as long as they may be, in tokens, to see what length costs: packing itself makes them no longer than it
# takes to save nearly all padding.
LENGTHS = (256, 512, 1024)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe, for all mixes")
    parser.add_argument(
        "--mixes", nargs="+", choices=MIXES, default=list(MIXES), help="which to measure (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="each with the next batch (default: 7)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default: 0)")
    parser.add_argument("--output", default="docs/results", help="folder of the CSV (default: docs/results)")
    return parser.parse_args()


class FullRows(AgeVlmCollator):
    """Packs with the least padding, however long the rows get."""

    def _packed(self, samples):
        return packed_rows([len(sample.input_ids) for sample in samples], self.pack_length, slack=0.0)


class Bench:
    """One mix: a model, its trainer, and a collator for each way to make batches."""

    def __init__(self, overrides: list[str], seed: int, folder: str):
        recipe = load_recipe(STAGE_4, [*COMMON, f"seed={seed}", *overrides])
        set_seed(seed)
        source = load_sources(recipe)
        model, processor = build_model(recipe.model, source)
        set_trainable(model, recipe.training)
        options = {"independent_turns": recipe.training.independent_turns}
        self.collators = {"padded": AgeVlmCollator.from_model(model, processor, **options)}
        self.collators["packed"] = AgeVlmCollator.from_model(model, processor, packing=True, **options)
        for length in LENGTHS:
            self.collators[f"full rows, {length}"] = FullRows.from_model(
                model, processor, packing=True, pack_length=length, **options
            )
        self.trainer = AgeVlmTrainer(
            model,
            training_arguments(recipe.training, seed, folder, progress=False),
            train_dataset=source.train,
            data_collator=self.collators["padded"],
            alignment=recipe.alignment,
        )
        self.batch_size = recipe.training.batch_size

    def samples(self, number: int) -> list:
        dataset, first = self.trainer.train_dataset, number * self.batch_size
        return [dataset[index % len(dataset)] for index in range(first, first + self.batch_size)]

    def step(self, batch: dict) -> tuple[float, float]:
        """Seconds of forward and backward, and the loss."""
        device = self.trainer.args.device
        (batch,), tokens = self.trainer.get_batch_samples(iter([batch]), 1, device)
        started = now(device)
        loss = self.trainer.training_step(self.trainer.model, batch, tokens)
        seconds = now(device) - started
        self.trainer.model.zero_grad()
        return seconds, float(loss)

    def vision(self, batch: dict) -> float:
        """Seconds of forward and, where the encoder learns, backward of its images alone."""
        device, model = self.trainer.args.device, self.trainer.model
        pixels = batch["pixel_values"].to(device)
        started = now(device)
        model.get_image_features(pixels).pooler_output.sum().backward()
        seconds = now(device) - started
        model.zero_grad()
        return seconds


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def measure(name: str, overrides: list[str], rounds: int, seed: int, folder: str) -> list[dict]:
    bench = Bench([*MIXES[name], *overrides], seed, folder)
    ways = list(bench.collators)
    seconds, collating = ({way: [] for way in ways} for _ in range(2))
    shapes, losses = ({way: [] for way in ways} for _ in range(2))
    vision, tokens, padding = [], [], {way: [] for way in ways}
    for number in track(range(-1, rounds), name, console=Console(stderr=True)):
        samples = bench.samples(max(number, 0))
        batches, spent = {}, {}
        for way, collator in bench.collators.items():
            collator(samples)  # encodings are kept: only what comes again in every epoch is timed
            started = time.perf_counter()
            batches[way] = collator(samples)
            spent[way] = time.perf_counter() - started
        turn = number % len(ways)
        took = {way: bench.step(batches[way]) for way in ways[turn:] + ways[:turn]}
        images = bench.vision(batches["padded"])
        if number < 0:  # to warm up
            continue
        total = sum(len(bench.collators["padded"]([sample])["input_ids"][0]) for sample in samples)
        tokens.append(total)
        vision.append(images)
        for way in ways:
            shape = tuple(batches[way]["input_ids"].shape)
            shapes[way].append(shape)
            padding[way].append(1 - total / (shape[0] * shape[1]))
            seconds[way].append(took[way][0])
            losses[way].append(took[way][1])
            collating[way].append(spent[way])
    share = statistics.median(images / padded for images, padded in zip(vision, seconds["padded"]))
    rows = []
    for way in ways:
        ratios = [padded / own for padded, own in zip(seconds["padded"], seconds[way])]
        filled = statistics.mean(padding[way]), statistics.mean(padding["padded"])
        differences = [abs(a - b) / abs(b) for a, b in zip(losses[way], losses["padded"])]
        rows.append(
            {
                "mix": name,
                "batches": way,
                "seed": seed,
                "rows": statistics.mean(shape[0] for shape in shapes[way]),
                "length": statistics.mean(shape[1] for shape in shapes[way]),
                "padding": filled[0],
                "tokens/s": statistics.median(total / own for total, own in zip(tokens, seconds[way])),
                "ratio": statistics.median(ratios),
                "ratio, lowest": min(ratios),
                "ratio, highest": max(ratios),
                "ratio, possible": 1 / (share + (1 - share) * (1 - filled[1]) / (1 - filled[0])),
                "vision's share of a padded step": share,
                "largest difference of losses": f"{max(differences):.1e}",
                "ms to collate": 1000 * statistics.median(collating[way]),
            }
        )
    return rows


def main() -> None:
    options = parse_arguments()
    if options.rounds < 1:
        sys.exit(f"--rounds: got {options.rounds}, expected at least 1.")
    here = environment()
    print(f"{here}, seed {options.seed}, {options.rounds} rounds, {' '.join(options.overrides)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.mixes:
            rows += measure(name, options.overrides, options.rounds, options.seed, folder)
            show([row for row in rows if row["mix"] == name])
    path = Path(options.output) / f"packing-{environment_name(here)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, [{**row, "threads": here["threads"], "overrides": " ".join(options.overrides)} for row in rows])
    print(f"Wrote {path}")


def show(rows: list[dict]) -> None:
    table = Table(
        "batches", "rows x length", "padding", "tokens/s", "ratio (lowest to highest)", "possible", "losses", "collate"
    )
    for row in rows:
        table.add_row(
            row["batches"],
            f"{row['rows']:.1f} x {row['length']:.0f}",
            f"{row['padding']:.1%}",
            f"{row['tokens/s']:.0f}",
            f"{row['ratio']:.2f} ({row['ratio, lowest']:.2f} to {row['ratio, highest']:.2f})",
            f"{row['ratio, possible']:.2f}",
            row["largest difference of losses"],
            f"{row['ms to collate']:.0f} ms",
        )
    share = rows[0]["vision's share of a padded step"]
    table.title = f"{rows[0]['mix']}: the vision encoder is {share:.0%} of a padded step"
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
