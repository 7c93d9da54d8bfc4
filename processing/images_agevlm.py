"""Pictures as people have them -> RGB: paths, URLs, PIL images, arrays and tensors of every mode."""

import os
from contextlib import suppress

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_utils import load_image


def load_rgb(image) -> PIL.Image.Image | np.ndarray | torch.Tensor:
    """One picture as RGB: a PIL image, or an array or tensor with three channels.

    EXIF rotation is applied, transparency is laid over white, values from 0 to 1 (float) or 65,535 become 0 to 255.

    Args:
        image: path, URL (`data:` too), long base64 text, PIL image, array or tensor: (height, width), (channels, height, width) or
            (height, width, channels), with 1, 3 or 4 channels.

    Raises:
        ValueError: one sentence: no such file, not an image, truncated, a shape that is no picture.
    """
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if isinstance(image, str):
        image = _open(image)
    if isinstance(image, PIL.Image.Image):
        return _pil_to_rgb(image)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(image)
    raise ValueError(f"images: got a {type(image).__name__}, expected a path, URL, PIL image, array or tensor.")


def _open(source: str) -> PIL.Image.Image:
    shown = source if len(source) <= 200 else source[:60] + "..."
    if not os.path.isfile(source):
        if len(source) <= 1024 and not source.startswith(("http://", "https://", "data:")):
            raise ValueError(f"images: '{shown}' is not a file, expected a path or URL of a picture.")
        try:
            return load_image(source)
        except Exception as error:  # every HTTP library has its own
            raise ValueError(f"images: '{shown}' could not be fetched and read: {type(error).__name__}.") from error
    try:
        image = PIL.Image.open(source)
        image.load()
    except PIL.UnidentifiedImageError:
        raise ValueError(f"images: '{shown}' is not a picture that Pillow can read.") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(f"images: '{shown}' is damaged: {error}.") from None
    return image


def _pil_to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        image = _upright(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
            image = PIL.Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        elif image.mode[-1] in "Aa" or "transparency" in image.info:
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # as above: only now are the pixels of an opened file decoded
        raise ValueError(f"images: the picture is damaged: {error}.") from None


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    image.load()
    try:
        return PIL.ImageOps.exif_transpose(image)
    # Pillow cannot read, or not write again, tags of another type than they should have. The picture is whole.
    except Exception:
        image = image.copy()
        with suppress(Exception):
            # In place it is turned before its tags are written.
            PIL.ImageOps.exif_transpose(image, in_place=True)
        return image


def _array_to_rgb(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    channels_last_first = isinstance(image, np.ndarray)
    if channels_last_first and image.dtype == np.uint16:
        image = (image / 257).round().astype(np.uint8)
    try:
        # A copy: torch takes neither negative strides (a flipped picture) nor read-only memory.
        tensor = torch.as_tensor(np.array(image) if channels_last_first else image)
    except TypeError:
        raise ValueError(f"images: got an array of {image.dtype}, expected numbers.") from None
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim == 3:
        # Each library's own habit decides where both readings are possible: arrays end with channels, tensors start.
        for dim in (2, 0) if channels_last_first else (0, 2):
            if tensor.shape[dim] in (1, 3, 4):
                tensor = tensor.movedim(dim, 0)
                break
        else:
            tensor = None
    else:
        tensor = None
    if tensor is None or 0 in tensor.shape:
        raise ValueError(
            f"images: got an array of shape {tuple(image.shape)}, expected height and width, with 1, 3 or 4 channels."
        )
    low, high = tensor.min().item(), tensor.max().item()
    if not (0 <= low and high <= 255):
        raise ValueError(f"images: got values from {low:g} to {high:g}, expected 0 to 1 or 0 to 255.")
    if tensor.dtype == torch.bool or (tensor.is_floating_point() and high <= 1):
        tensor = tensor * 255
    # As a file would hold it: resizing rounds and clips bytes, and the same picture must give the same pixels.
    tensor = tensor.round().to(torch.uint8) if tensor.is_floating_point() else tensor.to(torch.uint8)
    if len(tensor) == 1:
        tensor = tensor.expand(3, -1, -1)
    if len(tensor) == 4:
        alpha = tensor[3:].float() / 255
        tensor = (tensor[:3].float() * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return tensor.contiguous()
