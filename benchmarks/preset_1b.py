"""Builds the 1B preset with random weights, runs one image through it, and prints parameters, seconds and memory.

python benchmarks/preset_1b.py
"""

import resource
import time

import torch
from transformers import set_seed

from age_vlm import AgeVlmForConditionalGeneration, preset_config


PARTS = {
    "vision encoder": lambda name: ".vision_tower." in name,
    "projector": lambda name: ".multi_modal_projector." in name,
    "gated cross-attention blocks": lambda name: ".cross_attention." in name,
    "language model": lambda name: ".language_model." in name and ".cross_attention." not in name,
}


def main() -> None:
    set_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    started = time.perf_counter()
    model = AgeVlmForConditionalGeneration(preset_config("age-vlm-1b")).eval()
    built = time.perf_counter() - started
    torch.set_default_dtype(torch.float32)

    print("| component | parameters |", "|---|---|", sep="\n")
    for component, belongs in PARTS.items():
        count = sum(p.numel() for name, p in model.named_parameters() if belongs(name))
        print(f"| {component} | {count:,} |")
    print(f"| total | {sum(p.numel() for p in model.parameters()):,} |")

    ids = torch.randint(0, 100_000, (1, 24))
    ids[0, 5] = model.config.image_token_id
    started = time.perf_counter()
    with torch.inference_mode():
        outputs = model(input_ids=ids, pixel_values=torch.randn(1, 3, 768, 768, dtype=torch.bfloat16))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{outputs.image_outputs.pooler_output.shape[1]} image tokens, logits finite: {outputs.logits.isfinite().all().item()}"
    )
    print(
        f"built in {built:.1f} s, forward {seconds:.1f} s, peak memory {peak:.2f} GiB, torch {torch.__version__}, {model.dtype}"
    )


if __name__ == "__main__":
    main()
