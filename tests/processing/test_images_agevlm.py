"""Pictures of every mode and container come out as the RGB that a person sees."""

import base64
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from age_vlm.processing.images_agevlm import load_rgb


def rgb(image) -> np.ndarray:
    """(height, width, 3) float."""
    image = load_rgb(image)
    if isinstance(image, torch.Tensor):
        assert image.shape[0] == 3
        return image.permute(1, 2, 0).float().numpy()
    assert image.mode == "RGB"
    return np.asarray(image).astype(float)


@pytest.fixture
def picture():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_containers_agree(picture, tmp_path):
    expected = picture.astype(float)
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for image in (
        Image.fromarray(picture),
        str(path),
        path,
        picture,
        picture.transpose(2, 0, 1),
        picture[::-1][::-1],
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        tensor,
        tensor.permute(1, 2, 0),
        tensor.float() / 255,
        picture.astype(np.float64),
        tensor.to(torch.int64),
    ):
        np.testing.assert_allclose(rgb(image), expected, atol=1e-3)
    np.testing.assert_allclose(rgb(picture[:, ::-1]), expected[:, ::-1])


def test_file_modes_agree(picture, tmp_path):
    image = Image.fromarray(picture).quantize(8).convert("RGB")
    expected = np.asarray(image).astype(float)
    np.testing.assert_array_equal(rgb(image.quantize(8)), expected)
    np.testing.assert_allclose(rgb(image.convert("CMYK")), expected, atol=2)
    np.testing.assert_allclose(rgb(image.convert("YCbCr")), expected, atol=3)
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    np.testing.assert_allclose(rgb(tmp_path / "cmyk.tif"), expected, atol=2)


def test_gray_is_three_times_the_same(picture):
    gray = picture[..., 0]
    expected = np.repeat(gray[..., None], 3, -1).astype(float)
    for image in (
        Image.fromarray(gray),
        gray,
        gray[..., None],
        gray[None],
        torch.from_numpy(gray),
        torch.from_numpy(gray)[None],
    ):
        np.testing.assert_array_equal(rgb(image), expected)
    black_and_white = Image.fromarray(gray > 127)
    np.testing.assert_array_equal(rgb(black_and_white), (expected > 127) * 255.0)
    np.testing.assert_array_equal(rgb(gray > 127), (expected > 127) * 255.0)


def test_sixteen_bits_are_scaled_not_clipped(picture, tmp_path):
    gray = picture[..., 0]
    expected = np.repeat(gray[..., None], 3, -1).astype(float)
    deep = gray.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for image in (Image.fromarray(deep), tmp_path / "deep.png", deep, Image.fromarray(deep.astype(np.int32))):
        np.testing.assert_array_equal(rgb(image), expected)
    np.testing.assert_array_equal(rgb(picture.astype(np.uint16) * 257), picture.astype(float))


def test_transparency_lies_over_white(picture, tmp_path):
    alpha = np.zeros((5, 7), np.uint8)
    alpha[:, 3:] = 255
    expected = np.where(alpha[..., None] > 0, picture, 255).astype(float)
    rgba = np.dstack([picture, alpha])
    for image in (Image.fromarray(rgba), rgba, torch.from_numpy(rgba).permute(2, 0, 1), rgba / 255):
        np.testing.assert_allclose(rgb(image), expected, atol=1e-3)
    gray = np.dstack([picture[..., 0], alpha])
    np.testing.assert_array_equal(
        rgb(Image.fromarray(gray, "LA")), np.where(alpha > 0, picture[..., 0], 255)[..., None].repeat(3, -1)
    )

    palette = Image.fromarray(picture).quantize(8)
    first = palette.getpixel((0, 0))
    palette.info["transparency"] = first
    indices = np.asarray(palette)
    shown = rgb(palette)
    assert (shown[indices == first] == 255).all()
    np.testing.assert_array_equal(shown[indices != first], np.asarray(palette.convert("RGB"))[indices != first])
    palette.save(tmp_path / "palette.png", transparency=first)
    np.testing.assert_array_equal(rgb(tmp_path / "palette.png"), shown)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photographs_stand_upright(picture, tmp_path, orientation):
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photograph.png"
    Image.fromarray(picture).save(path, exif=exif)
    np.testing.assert_array_equal(rgb(path), undo(picture))


@pytest.mark.parametrize(
    "tag, type, count, value", [(0x0100, 2, 4, b"wide"), (0x011A, 2, 4, b"fine"), (0x0132, 3, 2, b"\x00\x01\x00\x02")]
)
def test_exif_tags_of_a_wrong_type(tmp_path, tag, type, count, value):
    """Pillow cannot write such tags again, which `exif_transpose` would have it do."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (tag, type, count, value)]
    fields = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)
    picture = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 8, 0), 8, 1)
    Image.fromarray(picture).save(tmp_path / "photograph.png", exif=exif)
    np.testing.assert_array_equal(rgb(tmp_path / "photograph.png")[..., 0], np.rot90(picture, 3))


def test_exif_that_cannot_be_read(tmp_path):
    picture = np.arange(60, dtype=np.uint8).reshape(6, 10)
    Image.fromarray(picture).save(tmp_path / "photograph.png", exif=b"Exif\0\0MM no tags at all")
    np.testing.assert_array_equal(rgb(tmp_path / "photograph.png")[..., 0], picture)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (1, 1)])
def test_one_pixel_wide(shape):
    image = np.full((*shape, 3), (10, 20, 30), np.uint8)
    for one in (Image.fromarray(image), image, torch.from_numpy(image).permute(2, 0, 1)):
        np.testing.assert_array_equal(rgb(one), image.astype(float))


def _truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def test_bad_pictures_are_one_sentence_with_their_name(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    for image, words in (
        (tmp_path / "missing.png", ["missing.png", "not a file"]),
        (tmp_path, [tmp_path.name, "not a file"]),
        (text, ["notes.png", "not a picture"]),
        (empty, ["empty.jpg", "not a picture"]),
        (_truncated(tmp_path / "half.png"), ["half.png", "damaged"]),
        (_truncated(tmp_path / "half.jpg"), ["half.jpg", "damaged"]),
        (np.zeros((6, 5, 2)), ["(6, 5, 2)"]),
        (np.zeros((4,)), ["(4,)"]),
        (np.zeros((0, 5, 3)), ["(0, 5, 3)"]),
        (np.array([["a"]]), ["numbers"]),
        (np.full((4, 5, 3), -1.0), ["-1"]),
        (np.full((4, 5, 3), 300), ["300"]),
        (np.full((4, 5, 3), np.nan), ["nan"]),
        ("http://localhost:9/cat.png", ["http://localhost:9/cat.png", "fetched"]),
        ("data:image/png;base64,AAAA", ["data:image", "read"]),
        ("A" * 2000, ["AAAA...", "read"]),
        (3, ["int"]),
        (None, ["NoneType"]),
    ):
        with pytest.raises(ValueError) as error:
            load_rgb(image)
            pytest.fail(f"{words} was read")
        message = str(error.value)
        assert message.startswith("images:") and "\n" not in message
        assert all(word in message for word in words), message
