"""A model made from a vision encoder gives it the pixels that it was trained on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    SiglipImageProcessor,
    TimmWrapperConfig,
    ViTConfig,
    ViTImageProcessor,
)

from age_vlm import AgeVlmProcessor
from age_vlm.processing.image_settings_agevlm import encoder_image_processor, whole_image_processor


SQUARE = {"height": 48, "width": 48}
EDGE = {"shortest_edge": 48}
PROCESSORS = {
    "vit": ViTImageProcessor(size=SQUARE),
    "bilinear": ViTImageProcessor(size=SQUARE, resample=Image.Resampling.BILINEAR, image_mean=[0.1, 0.2, 0.3]),
    "nearest": ViTImageProcessor(size=SQUARE, resample=Image.Resampling.NEAREST),
    "siglip": SiglipImageProcessor(size=SQUARE),
    "clip": CLIPImageProcessor(size=EDGE, crop_size=SQUARE),
    "bit": BitImageProcessor(size=EDGE, crop_size=SQUARE),
    "convnext": ConvNextImageProcessor(size=EDGE),
    "not normalised": ViTImageProcessor(size=SQUARE, do_normalize=False),
    "not rescaled": ViTImageProcessor(size=SQUARE, do_rescale=False),
    "neither": ViTImageProcessor(size=SQUARE, do_rescale=False, do_normalize=False),
    "other factor": ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5),
    "offset": EfficientNetImageProcessor(size=SQUARE, rescale_offset=True, rescale_factor=1 / 127.5, include_top=False),
    "normalised twice": EfficientNetImageProcessor(size=SQUARE, include_top=True),
    "blue first": MobileViTImageProcessor(size=EDGE, crop_size=SQUARE),
    "blue first, normalised": MobileViTImageProcessor(size=EDGE, crop_size=SQUARE, image_mean=[0.1, 0.2, 0.3]),
    "red first": MobileViTImageProcessor(size=EDGE, crop_size=SQUARE, do_flip_channel_order=False),
}


@pytest.fixture(params=PROCESSORS)
def own(request, tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    PROCESSORS[request.param].save_pretrained(tmp_path)
    return tmp_path


def noise(size=(48, 48)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def pixels(image_processor, image):
    return image_processor(images=image, return_tensors="pt")["pixel_values"]


def test_a_colour_is_what_the_encoder_knows(own, tokenizer, tmp_path):
    reference, made = AutoImageProcessor.from_pretrained(own), encoder_image_processor(own)
    for colour in ("black", "white", "#ff0000", "#00c0ff", "#102030"):
        image = Image.new("RGB", (80, 60), colour)
        expected = pixels(reference, image)[0][:, 24, 24]
        got = pixels(made, image)[0]
        assert got.shape == (3, 48, 48)
        torch.testing.assert_close(got, expected[:, None, None].expand_as(got), rtol=1e-4, atol=1e-4)
    AgeVlmProcessor(made, tokenizer).save_pretrained(tmp_path / "saved")
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert torch.equal(pixels(loaded.image_processor, noise()), pixels(made, noise()))
    assert loaded.image_geometry(20, 30).source_box == (0, 0, 30, 20), "the whole image is seen"


def test_an_image_is_resampled_as_the_encoder_knows(own):
    reference, made = AutoImageProcessor.from_pretrained(own), encoder_image_processor(own)
    # Of a square one nothing is cropped away, but by ConvNeXt's.
    reference.do_center_crop = False
    reference.crop_pct = 1.0
    for side in (48, 97, 31):
        torch.testing.assert_close(
            pixels(made, noise((side, side)))[0], pixels(reference, noise((side, side)))[0], rtol=1e-4, atol=1e-3
        )


def test_another_size_is_taken(own):
    made = encoder_image_processor(own, (32, 64))
    assert pixels(made, noise((20, 30))).shape == (1, 3, 32, 64)


def test_the_whole_image_is_seen_in_a_size_of_one_call_too():
    processor, size = whole_image_processor(48), {"height": 32, "width": 64}
    got = processor(noise(), size=size, return_tensors="pt")["pixel_values"]
    assert torch.equal(got, pixels(whole_image_processor((32, 64)), noise()))


@pytest.mark.parametrize("sides", [(40, 64), (64, 40)])
def test_the_encoder_s_own_size_need_not_be_square(tmp_path, sides):
    ViTConfig().save_pretrained(tmp_path)
    ViTImageProcessor(size=dict(zip(("height", "width"), sides))).save_pretrained(tmp_path)
    assert pixels(encoder_image_processor(tmp_path), noise()).shape == (1, 3, *sides)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", None])
@pytest.mark.parametrize("mean", [(0.5, 0.4, 0.3), None])
def test_timm_s_own_transform(tmp_path, interpolation, mean):
    data = {"input_size": (3, 48, 48), "interpolation": interpolation, "mean": mean, "std": mean, "crop_pct": 1.0}
    data = {key: value for key, value in data.items() if value is not None}
    config = TimmWrapperConfig.from_dict({"architecture": "convnext_atto", "num_classes": 0, "pretrained_cfg": data})
    config.save_pretrained(tmp_path)
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=data))
    got = pixels(encoder_image_processor(tmp_path), noise((97, 97)))[0]
    # Pillow and torchvision round in other places.
    assert (got - transform(noise((97, 97)))).abs().max() < 0.05
    wide = encoder_image_processor(tmp_path, (32, 64))
    assert pixels(wide, noise()).shape == (1, 3, 32, 64)


def test_timm_s_size_need_not_be_square(tmp_path):
    data = {"input_size": (3, 40, 64)}
    TimmWrapperConfig.from_dict(
        {"architecture": "convnext_atto", "num_classes": 0, "pretrained_cfg": data}
    ).save_pretrained(tmp_path)
    assert pixels(encoder_image_processor(tmp_path), noise()).shape == (1, 3, 40, 64)


def test_an_unknown_interpolation_is_one_sentence(tmp_path):
    data = {"interpolation": "psychic"}
    TimmWrapperConfig.from_dict(
        {"architecture": "convnext_atto", "num_classes": 0, "pretrained_cfg": data}
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^vision: got 'psychic' as pretrained_cfg\['interpolation'\], expected .*\.$"
    ):
        encoder_image_processor(tmp_path)


def test_a_processor_of_patches_is_one_sentence(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    settings = {"image_processor_type": "Pix2StructImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^vision: got the image processor Pix2Struct.*, expected one that .*\.$"):
        encoder_image_processor(tmp_path)
