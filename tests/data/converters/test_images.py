from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.converters.images import ImageFolder, open_named, open_picture, require_size, stored_picture
from age_vlm.data.rejects import Unusable


def encoded(format="JPEG", size=(24, 16)):
    buffer = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


def test_a_file_is_stored_as_its_path_and_bytes_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded())
    monkeypatch.chdir(tmp_path)
    picture = open_picture("a.jpg")
    assert stored_picture(picture) == {"path": str(tmp_path / "a.jpg"), "bytes": None}
    assert stored_picture(open_picture({"bytes": None, "path": "a.jpg"})) == stored_picture(picture)
    inside = open_picture({"bytes": encoded(), "path": "of another machine.jpg"})
    assert stored_picture(inside) == {"path": None, "bytes": encoded()}
    assert np.array_equal(np.asarray(inside), np.asarray(picture))
    drawn = Image.new("RGB", (3, 3))
    assert stored_picture(drawn) is drawn


@pytest.mark.parametrize("source", ["nowhere.jpg", {"bytes": None, "path": None}, {"bytes": None, "path": "nowhere"}])
def test_a_missing_picture_is_unusable(source):
    with pytest.raises(Unusable, match="missing"):
        open_picture(source)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_cut_off_picture_is_unusable(format):
    data = encoded(format, (64, 64))
    open_picture({"bytes": data})
    with pytest.raises(Unusable, match="cannot be read"):
        open_picture({"bytes": data[: len(data) // 2]})


@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF"]), st.data())
@settings(max_examples=30, deadline=None)
def test_a_damaged_picture_opens_or_is_unusable(format, data):
    damaged = bytearray(encoded(format))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        open_picture({"bytes": bytes(damaged)}).convert("RGB")
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
        assert open_picture(ImageFolder(given_folder, "images").find([name])).size == (24, 16)


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


def test_a_picture_of_a_record_is_in_the_folder_or_in_the_record(folder):
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


def test_sizes_are_those_of_the_upright_picture():
    picture = Image.new("RGB", (8, 6))
    require_size(picture, 8, 6)
    picture.getexif()[0x0112] = 6
    require_size(picture, 6, 8)
    with pytest.raises(Unusable, match="size"):
        require_size(picture, 8, 6)
