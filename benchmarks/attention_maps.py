"""What maps cost while a model generates: `output_attention_maps=True` beside the same without, step against step.

python benchmarks/attention_maps.py
python benchmarks/attention_maps.py --shapes 135m 1b --rounds 5 --tokens 32

In every round both generate the same tokens of the same prompt, in an order that turns, and what is reported is the ratio of
their times within the round: median, lowest and highest. The prefill is in both. Weights are random. Writes
docs/results/attention-maps-<environment>.csv.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from tables import environment_name, write_csv  # noqa: E402
from transformers import GenerationConfig, set_seed  # noqa: E402

from age_vlm import AgeVlmForConditionalGeneration, preset_config  # noqa: E402
from age_vlm.commands.environment import environment  # noqa: E402
from age_vlm.console import plain_console  # noqa: E402


# Shapes of language models; the encoder is that of the smallest preset, which decoding does not run.
SHAPES = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49_152,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
    },
}


def build(shape: str) -> AgeVlmForConditionalGeneration:
    vision = preset_config("age-vlm-tiny").vision_config
    config = AgeVlmForConditionalGeneration.config_class(
        text_config=SHAPES[shape] | {"eos_token_id": None, "pad_token_id": 0},
        vision_config=vision,
        image_token_id=2,
        cross_attention_gate_init=0.5,
    )
    return AgeVlmForConditionalGeneration(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["135m"], help="of the language model (default: 135m)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="both ways, after one to warm up (default: 7)")
    parser.add_argument("--tokens", type=int, default=32, help="generated (default: 32)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="texts at once (default: 1 8)")
    parser.add_argument("--image-size", type=int, default=128, help="side in pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="docs/results", help="folder of the table (default: docs/results)")
    options = parser.parse_args()
    here, rows = environment(), []
    print(f"{here}, seed {options.seed}, {options.rounds} rounds of {options.tokens} tokens")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for shape in options.shapes:
        set_seed(options.seed)
        model = build(shape).to(device)
        grid = model.image_grid((options.image_size, options.image_size))
        for batch in options.batches:
            rows.append(
                {"shape": shape, "batch": batch, "image tokens": grid[0] * grid[1], **measure(model, batch, options)}
            )
    table = Table("shape", "texts", "image tokens", "ms a token", "ratio (lowest to highest)")
    for row in rows:
        ratio = f"{row['ratio']:.3f} ({row['ratio, lowest']:.3f} to {row['ratio, highest']:.3f})"
        cells = row["shape"], row["batch"], row["image tokens"], f"{row['ms a token']:.1f}", ratio
        table.add_row(*map(str, cells))
    plain_console().print(table)
    path = Path(options.output) / f"attention-maps-{environment_name(here)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(
        path, [{**row, "threads": here["threads"], "seed": options.seed, "rounds": options.rounds} for row in rows]
    )
    print(f"Wrote {path}")


@torch.inference_mode()
def measure(model: AgeVlmForConditionalGeneration, batch: int, options: argparse.Namespace) -> dict[str, float]:
    ids = torch.randint(10, 1000, (batch, 32), device=model.device)
    ids[:, 4] = model.config.image_token_id
    pixels = torch.randn(batch, 3, options.image_size, options.image_size, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    config = GenerationConfig(
        do_sample=False, max_new_tokens=options.tokens, min_new_tokens=options.tokens, return_dict_in_generate=True
    )
    ratios, plain = [], []
    for number in track(range(-1, options.rounds), f"{batch} texts", console=plain_console(stderr=True)):
        seconds = {}
        for maps in (False, True) if number % 2 else (True, False):
            started = now(model.device)
            output = model.generate(**inputs, generation_config=config, output_attention_maps=maps)
            seconds[maps] = now(model.device) - started
            assert not maps or output.attention_maps.shape[1] == options.tokens
        if number >= 0:  # the first is to warm up
            ratios.append(seconds[True] / seconds[False])
            plain.append(1000 * seconds[False] / options.tokens)
    return {
        "ms a token": statistics.median(plain),
        "ratio": statistics.median(ratios),
        "ratio, lowest": min(ratios),
        "ratio, highest": max(ratios),
    }


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
