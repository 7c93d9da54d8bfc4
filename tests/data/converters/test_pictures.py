from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.converters.pictures import find_picture, open_picture, require_size, stored_picture
from age_vlm.data.left_out import Unusable


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
    assert find_picture(tmp_path, ["a.jpg", "b.jpg"]) == tmp_path / "b.jpg"
    with pytest.raises(Unusable, match="image file is missing"):
        find_picture(tmp_path, ["a.jpg"])


def test_sizes_are_those_of_the_upright_picture():
    picture = Image.new("RGB", (8, 6))
    require_size(picture, 8, 6)
    picture.getexif()[0x0112] = 6
    require_size(picture, 6, 8)
    with pytest.raises(Unusable, match="size"):
        require_size(picture, 8, 6)
