"""Images of every mode and container come out as the RGB that a person sees."""

import base64
import struct

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image, ImageCms

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
    path = tmp_path / "image.png"
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


def converted(picture: np.ndarray, mode: str) -> Image.Image:
    """The image in that mode: of modes without colour its first channel."""
    gray = picture[..., 0]
    if mode == "LAB":
        profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
        return ImageCms.profileToProfile(Image.fromarray(picture), *profiles, outputMode="LAB")
    if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
        return Image.frombytes(mode, gray.shape[::-1], (gray.astype(np.uint16) * 257).astype(order).tobytes())
    if mode == "1":
        return Image.fromarray(gray > 127)
    if mode in ("I", "F", "L"):
        return Image.fromarray(gray.astype({"I": np.int32, "F": np.float32, "L": np.uint8}[mode]))
    if mode in ("LA", "PA", "La"):
        with_alpha = Image.fromarray(gray).convert("LA")
        return with_alpha if mode == "LA" else with_alpha.convert(mode)
    if mode == "RGBa":
        return Image.fromarray(picture).convert("RGBA").convert("RGBa")
    return Image.fromarray(picture).quantize(256) if mode == "P" else Image.fromarray(picture).convert(mode)


@pytest.mark.parametrize("mode", [mode for mode in Image.MODES if not mode.startswith("BGR")])
@pytest.mark.parametrize("orientation", [1, 6])
def test_every_mode_of_pillow_is_the_image(picture, mode, orientation):
    image = converted(picture, mode)
    assert image.mode == mode or (mode == "I;16L" and image.mode == "I;16") or mode == "I;16N"
    image.getexif()[0x0112] = orientation
    expected = picture.astype(float)
    if (mode[0] in "1LIF" and mode != "LAB") or mode == "PA":
        expected = np.repeat(expected[..., :1], 3, -1)
    if mode == "1":
        expected = (expected > 127) * 255.0
    if orientation == 6:
        expected = np.rot90(expected, -1)
    np.testing.assert_allclose(rgb(image), expected, atol={"LAB": 24, "HSV": 6, "YCbCr": 3, "CMYK": 2}.get(mode, 0))


def test_lab_is_read_by_its_definition():
    """Values of the CIE: black, middle gray, white, sRGB's red and blue."""
    lab = np.array([[0, 0, 0], [53.6, 0, 0], [100, 0, 0], [54.3, 80.8, 69.9], [29.6, 68.3, -112.0]])
    stored = np.stack([lab[:, 0] * 2.55, lab[:, 1], lab[:, 2]], 1).round().astype(np.int16).astype(np.uint8)
    image = Image.frombytes("LAB", (5, 1), stored.tobytes())
    expected = [[0, 0, 0], [128, 128, 128], [255, 255, 255], [255, 0, 0], [0, 0, 255]]
    np.testing.assert_allclose(rgb(image)[0], expected, atol=24)


def test_transparency_of_every_mode(picture, tmp_path):
    gray = picture[..., 0].copy()
    gray[0, 0], gray[1, 1] = 77, 77
    hidden = gray == 77
    expected = np.where(hidden, 255, gray)[..., None].repeat(3, -1).astype(float)
    Image.fromarray(gray).save(tmp_path / "8.png", transparency=77)
    # Old releases of Pillow write it from 32 bits alone, new ones from 16.
    deep = np.uint16 if Version(PIL.__version__) >= Version("11") else np.int32
    Image.fromarray(gray.astype(deep) * 257).save(tmp_path / "16.png", transparency=77 * 257)
    for depth in ("8", "16"):
        np.testing.assert_array_equal(rgb(tmp_path / f"{depth}.png"), expected)
    alpha = Image.merge("LA", (Image.fromarray(gray), Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))))
    for mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        middle = alpha.convert("RGBA") if mode == "RGBa" else alpha
        image = middle.convert(mode)
        if mode == "PA":  # to which Pillow takes no alpha
            image.putalpha(alpha.getchannel("A"))
        np.testing.assert_array_equal(rgb(image), expected)
    palette = alpha.convert("RGBA").quantize(256)
    np.testing.assert_allclose(rgb(palette), expected, atol=8)
    black_and_white = Image.fromarray(gray > 127)
    black_and_white.save(tmp_path / "1.png", transparency=0)
    assert (rgb(tmp_path / "1.png") == 255).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_deep_values_that_are_no_image_are_one_sentence(mode):
    for value in (-140, 70_000):
        pixels = np.array([[0, 100], [200, value]], {"I": np.int32, "F": np.float32}[mode])
        with pytest.raises(ValueError, match=f"^images: got values from .*{value}.*, expected 0 to 1 or 0 to 255.$"):
            load_rgb(Image.fromarray(pixels))


def test_float_files_from_0_to_1(picture, tmp_path):
    gray = picture[..., 0]
    Image.fromarray(gray.astype(np.float32) / 255).save(tmp_path / "unit.tif")
    np.testing.assert_array_equal(rgb(tmp_path / "unit.tif"), np.repeat(gray[..., None], 3, -1).astype(float))


NUMBERS = ["bool", "u1", "i1", "<u2", ">u2", "<i2", ">i4", "<u4", "<u8", "<i8", "<f2", ">f4", "<f8", "longdouble"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_arrays_of_every_type_of_number(kind):
    gray = np.array([[0, 1, 100], [127, 3, 60]], np.uint8)
    expected = gray.astype(float)
    if kind == "bool":
        gray, expected = gray > 50, (gray > 50) * 255.0
    array = (gray.astype(int) * 257 if kind[1:] == "u2" else gray).astype(kind)
    np.testing.assert_array_equal(rgb(array)[..., 1], expected)
    native = array.astype(array.dtype.newbyteorder("="))
    if kind != "longdouble":
        np.testing.assert_array_equal(rgb(torch.from_numpy(native))[..., 1], expected)


@pytest.mark.parametrize("container", [np.array, torch.tensor, lambda values: Image.fromarray(np.float32(values))])
@pytest.mark.parametrize("top", [1.0000001, 1.02, 1.2])
@pytest.mark.parametrize("low", [0.0, -1e-7, -0.02, -0.2])
def test_what_interpolation_overshoots_is_clipped(container, top, low):
    got = rgb(container([[low, 0.5], [0.25, top]]))
    np.testing.assert_array_equal(got[..., 0], [[0, 128], [64, 255]])


@given(st.integers(0, 2**32 - 1), st.sampled_from(["bicubic", "bilinear"]), st.sampled_from([1.0, 255.0]))
@settings(max_examples=40, deadline=None)
def test_a_resized_image_is_as_bright_as_it_was(seed, mode, top):
    generator = torch.Generator().manual_seed(seed)
    picture = (torch.rand(1, 3, 6, 6, generator=generator) > 0.5).float()
    resized = torch.nn.functional.interpolate(picture, scale_factor=3, mode=mode)[0]
    expected = (resized.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_allclose(rgb(resized * top), expected, atol=1)


def test_images_without_their_mean_are_refused(picture):
    for mean, deviation in ((0.5, 0.5), (0.45, 0.22)):
        with pytest.raises(ValueError, match="^images: got values from -"):
            load_rgb((picture / 255 - mean) / deviation)


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


def test_bad_images_are_one_sentence_with_their_name(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    for image, words in (
        (tmp_path / "missing.png", ["missing.png", "not a file"]),
        (tmp_path, [tmp_path.name, "not a file"]),
        (text, ["notes.png", "not an image"]),
        (empty, ["empty.jpg", "not an image"]),
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
