"""Images as people have them -> RGB: paths, URLs, PIL images, arrays and tensors of every mode."""

import os
from contextlib import suppress

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import torch
from transformers.image_utils import load_image


# By how much of its range interpolation may leave it.
OVERSHOOT = 0.5


def load_rgb(image) -> PIL.Image.Image | np.ndarray | torch.Tensor:
    """One image as RGB: a PIL image, or an array or tensor with three channels.

    EXIF rotation is applied, transparency is laid over white, values from 0 to 1 (float) or 65,535 (16 bits) become 0 to
    255. Floats may leave their range by half of it, as interpolation does, and are clipped to it.

    Args:
        image: path, URL (`data:` too), long base64 text, PIL image, array or tensor: (height, width), (channels, height, width) or
            (height, width, channels), with 1, 3 or 4 channels.

    Raises:
        ValueError: one sentence: no such file, not an image, truncated, a shape that is no image, values out of range.
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
            raise ValueError(f"images: '{shown}' is not a file, expected a path or URL of an image.")
        try:
            return load_image(source)
        except Exception as error:  # every HTTP library has its own
            raise ValueError(f"images: '{shown}' could not be fetched and read: {type(error).__name__}.") from error
    try:
        image = PIL.Image.open(source)
        image.load()
    except PIL.UnidentifiedImageError:
        raise ValueError(f"images: '{shown}' is not an image that Pillow can read.") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(f"images: '{shown}' is damaged: {error}.") from None
    return image


def _pil_to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        image = _upright(image)
        if image.mode[0] not in "IF":
            return _bytes_to_rgb(image)
        stored = np.asarray(image)
    except Exception as error:  # as above: only now are the pixels of an opened file decoded
        raise ValueError(f"images: the image is damaged: {error}.") from None
    # Of 16 bits too: some files of that depth are opened as 32.
    deep = image.mode == "I" and 0 <= stored.min() and 255 < stored.max() <= 65_535
    gray = _array_to_rgb(stored.astype(np.uint16) if deep else stored)[0].numpy().copy()
    gray[stored == image.info.get("transparency")] = 255
    return PIL.Image.fromarray(gray).convert("RGB")


def _bytes_to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A PIL image with at most 8 bits a channel."""
    if image.mode == "LAB":
        profiles = (PIL.ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
        return PIL.ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data:
        # Pillow converts "La" to "LA" alone.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    image.load()
    try:
        return PIL.ImageOps.exif_transpose(image)
    # Pillow cannot read, or not write again, tags of another type than they should have. The image is whole.
    except Exception:
        image = image.copy()
        with suppress(Exception):
            # In place it is turned before its tags are written.
            PIL.ImageOps.exif_transpose(image, in_place=True)
        return image


def _array_to_rgb(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    tensor = _channels_first(image)
    kind = tensor.dtype
    # Not every type can be compared.
    tensor = tensor.float() if kind.is_floating_point or kind in (torch.bool, torch.uint16) else tensor.long()
    low, high = tensor.min().item(), tensor.max().item()
    slack = OVERSHOOT if kind.is_floating_point else 0
    if kind.is_floating_point:
        top = 1 if high <= 1 + slack else 255
    else:
        top = {torch.bool: 1, torch.uint16: 65_535}.get(kind, 255)
    # Of what is there: an image whose mean was taken off goes as far below zero as above.
    if not (-slack * (1 if top == 1 else high) <= low and high <= top * (1 + slack)):
        raise ValueError(f"images: got values from {low:g} to {high:g}, expected 0 to 1 or 0 to 255.")
    # As a file would hold it: resizing rounds and clips bytes, and the same image must give the same pixels.
    tensor = (tensor.clamp(0, top) * (255 / top)).round().to(torch.uint8)
    if len(tensor) == 1:
        tensor = tensor.expand(3, -1, -1)
    if len(tensor) == 4:
        alpha = tensor[3:].float() / 255
        tensor = (tensor[:3].float() * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return tensor.contiguous()


def _channels_first(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(channels, height, width), channels 1, 3 or 4."""
    channels_last_first = isinstance(image, np.ndarray)
    try:
        if channels_last_first:
            # torch takes neither the other order of bytes nor long doubles, negative strides (a flipped image) nor
            # read-only memory.
            kind = np.float64 if image.dtype.char == "g" else image.dtype.newbyteorder("=")
            image = np.array(image, kind)
        tensor = torch.as_tensor(image).detach()
    except TypeError:
        tensor = None
    if tensor is None or tensor.is_complex():
        raise ValueError(f"images: got an array of {image.dtype}, expected numbers.")
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim == 3:
        # Each library's own habit decides where both readings are possible: arrays end with channels, tensors start.
        for dim in (2, 0) if channels_last_first else (0, 2):
            if tensor.shape[dim] in (1, 3, 4):
                tensor = tensor.movedim(dim, 0)
                break
    if tensor.ndim != 3 or len(tensor) not in (1, 3, 4) or 0 in tensor.shape:
        raise ValueError(
            f"images: got an array of shape {tuple(image.shape)}, expected height and width, with 1, 3 or 4 channels."
        )
    return tensor
