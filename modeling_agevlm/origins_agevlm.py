"""Where a pretrained component came from, and which weights it had: what a configuration keeps of it."""

import hashlib
import os

import torch
from torch import nn


# Component -> its argument of `from_backbones`, and so its key in `parts`.
ARGUMENTS = {"language_model": "text", "vision": "vision"}


def origin(files, component: str, config, state: dict[str, torch.Tensor]) -> dict:
    """What a configuration keeps of a pretrained component: where it came from, and a hash of its weights.

    Args:
        files: the `BackboneFiles` that it is one of.
        config: its own. A `source` in it says how to get it, where it is on no Hub.
        state: its weights.
    """
    argument = ARGUMENTS[component]
    name = getattr(files, argument)
    if not isinstance(name, (str, os.PathLike)):
        name = config.name_or_path
    found = {
        "name": None if not name or os.path.exists(name) else str(name),  # a path of this machine is nobody else's
        "revision": getattr(files, f"{argument}_revision"),
        "gguf_file": files.gguf_file if component == "language_model" else None,
        "source": getattr(config, "source", None),
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "vocab_size": getattr(config, "vocab_size", None),
        "sha256": weights_hash(state),
    }
    return {key: value for key, value in found.items() if value is not None}


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types and values of weights, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def language_model_state(language_model: nn.Module, head: nn.Module | None, vocab_size: int | None = None) -> dict:
    """The weights of a Llama by name, without cross-attention.

    Args:
        head: None where it is tied.
        vocab_size: so many rows of the embeddings; tokens that came later are behind them.
    """
    state = {name: value for name, value in language_model.state_dict().items() if ".cross_attention." not in name}
    state["embed_tokens.weight"] = state["embed_tokens.weight"][:vocab_size]
    if head is not None:
        state["lm_head.weight"] = head.weight[:vocab_size]
    return state
