"""What a metric depends on besides the code."""

from __future__ import annotations

import platform

import torch
import transformers

from ..training.distributed import engine, process_count


def environment() -> dict[str, str | int]:
    """What a metric depends on besides the code: versions, processor, threads, and how many processes, if several."""
    several = {"processes": process_count(), "engine": engine()} if process_count() > 1 else {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        **several,
    }
