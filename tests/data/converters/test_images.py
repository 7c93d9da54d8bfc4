from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.converters.images import ImageFolder, open_image, open_named, require_size, stored_image
from age_vlm.data.rejects import Unusable


def encoded(format="JPEG", size=(24, 16)):
    buffer = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


def test_a_file_is_stored_as_its_path_and_bytes_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded())
    monkeypatch.chdir(tmp_path)
    image = open_image("a.jpg")
    assert stored_image(image) == {"path": str(tmp_path / "a.jpg"), "bytes": None}
    assert stored_image(open_image({"bytes": None, "path": "a.jpg"})) == stored_image(image)
    inside = open_image({"bytes": encoded(), "path": "of another machine.jpg"})
    assert stored_image(inside) == {"path": None, "bytes": encoded()}
    assert np.array_equal(np.asarray(inside), np.asarray(image))
    drawn = Image.new("RGB", (3, 3))
    assert stored_image(drawn) is drawn


@pytest.mark.parametrize("source", ["nowhere.jpg", {"bytes": None, "path": None}, {"bytes": None, "path": "nowhere"}])
def test_a_missing_image_is_unusable(source):
    with pytest.raises(Unusable, match="missing"):
        open_image(source)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_cut_off_image_is_unusable(format):
    data = encoded(format, (64, 64))
    open_image({"bytes": data})
    with pytest.raises(Unusable, match="cannot be read"):
        open_image({"bytes": data[: len(data) // 2]})


@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF"]), st.data())
@settings(max_examples=30, deadline=None)
def test_a_damaged_image_opens_or_is_unusable(format, data):
    damaged = bytearray(encoded(format))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        open_image({"bytes": bytes(damaged)}).convert("RGB")
    except Unusable as error:
        assert str(error) == "image cannot be read"


def test_the_first_name_that_is_there_is_found(tmp_path):
    (tmp_path / "b.jpg").touch()
    folder = ImageFolder(tmp_path, "images")
    assert folder.find(["a.jpg", "b.jpg"]) == tmp_path / "b.jpg"
    for name in ("a.jpg", "", "\0", "x" * 5000):
        with pytest.raises(Unusable, match="image file is missing"):
            folder.find([name])


@pytest.fixture
def folder(tmp_path):
    """Files inside and outside of `images`, and links from it to each."""
    for name in ("images/in/a.jpg", "outside/b.jpg", "images-too/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded())
    for name, target in (("link.jpg", "outside/b.jpg"), ("linked", "outside"), ("in.jpg", "images/in/a.jpg")):
        (tmp_path / "images" / name).symlink_to(tmp_path / target)
    (tmp_path / "images/loop").symlink_to(tmp_path / "images/loop")
    (tmp_path / "alias").symlink_to(tmp_path / "images")
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["in/a.jpg", "./in/a.jpg", "in/../in/a.jpg", "in.jpg"])
def test_what_lies_inside_is_found(folder, name):
    for given_folder in (folder, folder.parent / "alias"):
        assert open_image(ImageFolder(given_folder, "images").find([name])).size == (24, 16)


@pytest.mark.parametrize(
    "name",
    ["../outside/b.jpg", "../images-too/c.jpg", "link.jpg", "linked/b.jpg", "in/../../outside/b.jpg", "absolute"],
)
def test_what_lies_outside_is_refused_unless_allowed(folder, name):
    name = str(folder / "in/a.jpg") if name == "absolute" else name
    with pytest.raises(Unusable, match="outside of its folder"):
        ImageFolder(folder, "images").find([name])
    # Nor is another one taken in its place.
    with pytest.raises(Unusable, match="outside of its folder"):
        ImageFolder(folder, "images").find([name, "in/a.jpg"])
    assert ImageFolder(folder, "images", allow_outside=True).find([name]).is_file()


@pytest.mark.parametrize(
    "name", ["http://x/a.jpg", "HTTPS://x/a.jpg", "data:image/png;base64,xx", "file:///a.jpg", "s3://a/b"]
)
@pytest.mark.parametrize("allow_outside", [False, True])
def test_urls_are_refused(folder, name, allow_outside):
    with pytest.raises(Unusable, match="image is a URL"):
        ImageFolder(folder, "images", allow_outside).find([name])


def test_an_image_of_a_record_is_in_the_folder_or_in_the_record(folder):
    inside = ImageFolder(folder, "images")
    for source in ("in/a.jpg", {"path": "in/a.jpg"}, {"bytes": encoded(), "path": "/nowhere/x.jpg"}):
        assert open_named(source, inside).size == (24, 16)
    for source in ("../outside/b.jpg", {"path": str(folder.parent / "outside/b.jpg"), "bytes": None}):
        with pytest.raises(Unusable, match="outside"):
            open_named(source, inside)
        with pytest.raises(Unusable, match="no folder of images was given"):
            open_named(source, None)
    for source in (None, {}, {"path": None}, 7, ["in/a.jpg"]):
        with pytest.raises(Unusable):
            open_named(source, inside)


def test_sizes_are_those_of_the_upright_image():
    image = Image.new("RGB", (8, 6))
    require_size(image, 8, 6)
    image.getexif()[0x0112] = 6
    require_size(image, 6, 8)
    with pytest.raises(Unusable, match="size"):
        require_size(image, 8, 6)
