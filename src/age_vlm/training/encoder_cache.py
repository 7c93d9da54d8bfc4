"""Outputs of a frozen vision encoder, kept on disk: what trains for several epochs, or in several runs, encodes an image once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..atomic_files import replaced
from ..errors import UserError, filling
from ..modeling_agevlm.origins_agevlm import weights_hash


@contextmanager
def encoder_cache(vision_tower: nn.Module, folder: str | Path) -> Iterator[None]:
    """While it lasts, the encoder's last map comes from a file an image in `folder`; what is missing is computed and written.

    A file is named by the encoder's weights and the image's pixels: runs may share a folder, at the same time too, and no
    other encoder, size or crop is ever taken for one. What is stored is what was computed, in the type it was computed in.

    Args:
        vision_tower: frozen, and in `eval()` whenever it is called.
        folder: made where it is not there. Nothing in it is ever removed: 12 x 12 tokens of width 1,280 take 0.7 MB.

    Raises:
        UserError: one sentence, for an encoder that is trained, and where the disk is full or may not be written to.
    """
    if any(parameter.requires_grad for parameter in vision_tower.parameters()):
        raise UserError("vision_tower: got one that is trained, expected a frozen one.")
    encode = vision_tower.forward
    own = Path(folder) / weights_hash(vision_tower.state_dict())[:16]

    def forward(pixel_values: torch.Tensor, **kwargs):
        if kwargs.get("output_hidden_states"):
            return encode(pixel_values, **kwargs)
        paths = [own / f"{_name(image)}.safetensors" for image in pixel_values]
        states = {path: _stored(path) for path in paths}
        missing = {path: image for path, image in zip(paths, pixel_values) if states[path] is None}
        if missing:
            computed = encode(torch.stack([*missing.values()]), **kwargs).last_hidden_state
            computed = computed[-1] if isinstance(computed, (list, tuple)) else computed
            with filling("encoder_cache", own):
                own.mkdir(parents=True, exist_ok=True)
                for path, state in zip(missing, computed):
                    states[path] = state
                    with replaced(path) as file:
                        file.write(save({"state": state.detach().cpu().contiguous()}))
        found = [states[path].to(pixel_values.device) for path in paths]
        return BaseModelOutputWithPooling(last_hidden_state=torch.stack(found))

    # On the instance: neither the module's name nor those of its weights change.
    vision_tower.forward = forward
    try:
        yield
    finally:
        del vision_tower.forward


def _name(image: torch.Tensor) -> str:
    device = image.device.type
    computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image.dtype
    digest = hashlib.blake2b(f"{image.dtype} {computed_in} {tuple(image.shape)}".encode(), digest_size=16)
    digest.update(image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _stored(path: Path) -> torch.Tensor | None:
    try:
        return load_file(path)["state"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
