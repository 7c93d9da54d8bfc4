"""The image processor of a model made from a vision encoder: its colours, resampling and size, over the whole image."""

import os
from collections.abc import Sequence

import PIL.Image
import torch
from transformers import AutoConfig, AutoImageProcessor, CLIPImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .backbone_files_agevlm import load_component


def whole_image_processor(size: int | Sequence[int], **settings) -> CLIPImageProcessor:
    """CLIP's image processor, which here stretches the whole image to `size` (a side, or height and width, pixels): what
    is cropped away can be neither seen nor grounded."""
    size = _height_and_width(size)
    return CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, **settings)


def encoder_image_processor(
    vision: str | os.PathLike, image_size: int | Sequence[int] | None = None, revision: str | None = None
):
    """An image processor that gives the encoder the colours that its own does, of the whole image.

    Args:
        vision: Hub id or folder of the vision encoder, or its image processor.
        image_size: a side or height and width in pixels, the encoder's own when left out.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: one sentence, for an encoder that cannot be read, or whose image processor does something else to a
            image than resize it, crop it and map its colours.
    """
    own = vision
    if isinstance(vision, (str, os.PathLike)):
        config = load_component("vision", vision, AutoConfig, revision=revision)
        if config.model_type == "timm_wrapper":
            # timm's own processor can neither be saved beside a model nor tell what it does to a mask.
            return _timm_image_processor(getattr(config, "pretrained_cfg", None) or {}, image_size)
        own = load_component("vision", vision, AutoImageProcessor, revision=revision)
    names = ("resample", "rescale_factor", "image_mean", "image_std")
    settings = {name: getattr(own, name) for name in names if getattr(own, name, None) is not None}
    for name in ("do_rescale", "do_normalize"):
        settings[name] = bool(getattr(own, name, False))
    try:
        size = _height_and_width(image_size or _seen_size(own))
        expected = _colours(own)
        # Its own class for what CLIP's has no setting for, such as another order of the channels.
        for candidate in (
            lambda: whole_image_processor(tuple(size.values()), **settings),
            lambda: type(own)(**{**own.to_dict(), "size": size, "do_center_crop": False, "do_pad": False}),
        ):
            if _maps_whole_image(made := candidate(), size, expected, settings.get("resample")):
                return made
    # Processors for other kinds of input fail in their own ways.
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        cause = error
    else:
        cause = None
    where = "" if own is vision else f" in '{vision}'"
    raise ValueError(
        f"vision: got the image processor {type(own).__name__}{where}, expected one that resizes, crops and maps colours."
    ) from cause


def _height_and_width(size: int | Sequence[int]) -> dict[str, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return {"height": height, "width": width}


def _timm_image_processor(data: dict, image_size: int | Sequence[int] | None) -> CLIPImageProcessor:
    # What `pretrained_cfg` leaves out is as in timm's own `resolve_data_config`.
    name = data.get("interpolation") or "bicubic"
    resampling = PIL.Image.Resampling.__members__.get(name.upper())
    if resampling is None:
        raise ValueError(f"vision: got '{name}' as pretrained_cfg['interpolation'], expected one that Pillow has.")
    return whole_image_processor(
        image_size or tuple((data.get("input_size") or (3, 224, 224))[1:]),
        resample=resampling,
        image_mean=data.get("mean") or IMAGENET_DEFAULT_MEAN,
        image_std=data.get("std") or IMAGENET_DEFAULT_STD,
    )


def _seen_size(image_processor) -> tuple[int, int]:
    """Height and width in pixels of what an image processor gives its encoder."""
    size = dict(image_processor.size)
    if getattr(image_processor, "do_center_crop", False):
        size = dict(image_processor.crop_size)
    edge = size.get("shortest_edge") or size.get("longest_edge")
    return size.get("height") or edge, size.get("width") or edge


def _pixels(image_processor, image: PIL.Image.Image) -> torch.Tensor:
    """(3, height, width) float"""
    pixels = torch.as_tensor(image_processor(images=image, return_tensors="pt")["pixel_values"][0])
    if pixels.ndim != 3 or len(pixels) != 3:
        raise ValueError(f"got pixel_values of shape {tuple(pixels.shape)}, expected 3 channels, height and width.")
    return pixels.float()


def _colours(image_processor) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 3) and (3,): the linear map from red, green, blue of 0 to 255 to what the encoder gets."""
    black, *primaries = (
        _pixels(image_processor, PIL.Image.new("RGB", (64, 64), colour))
        for colour in ("#000000", "#ff0000", "#00ff00", "#0000ff")
    )
    # The middle: what is put around an image does not count.
    black, *primaries = (pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2] for pixels in (black, *primaries))
    return torch.stack([(primary - black) / 255 for primary in primaries], 1), black


def _maps_whole_image(image_processor, size: dict[str, int], colours: tuple, resample) -> bool:
    """Whether it stretches an image to that size, and maps its colours like this."""
    noise = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = PIL.Image.fromarray(noise.numpy())
    settings = {"do_rescale": False, "do_normalize": False} | ({} if resample is None else {"resample": resample})
    stretched = _pixels(whole_image_processor(tuple(size.values()), **settings), image)
    expected = torch.einsum("ij,jhw->ihw", colours[0], stretched) + colours[1][:, None, None]
    made = _pixels(image_processor, image)
    return made.shape == expected.shape and torch.allclose(made, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
