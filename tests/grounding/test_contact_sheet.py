import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from age_vlm.data.masks import encode_mask
from age_vlm.grounding import load_teacher
from age_vlm.grounding.contact_sheet import _BOX, _OUTLINE, _painted, _percent
from age_vlm.grounding.run import GroundSettings, ground


def sample(number, phrase, mask):
    text = f"so many words before it that they are cut, at a space, of course, {phrase} & more"
    start = text.index(phrase)
    return {
        "id": f"s{number}",
        "images": [Image.fromarray(np.random.default_rng(number).integers(0, 256, (*mask.shape, 3), dtype=np.uint8))],
        "messages": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": text}]}],
        "groundings": [
            {
                "message": 0,
                "start": start,
                "end": start + len(phrase),
                "image": 0,
                "mask": encode_mask(mask),
                "box": None,
            }
        ],
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    half = np.zeros((30, 40), bool)
    half[:15] = True
    rows = [sample(number, f"thing {number}", half) for number in range(50)]
    rows += [sample(50, "<script>alert(1)</script>", half), sample(51, "all of it", half | True)]
    rows.append({**rows[0], "id": "broken", "images": [{"bytes": b"", "path": None}]})
    folder = tmp_path_factory.mktemp("run") / "out"
    teacher = load_teacher("annotated", device="cpu")
    return ground(rows, folder, teacher, GroundSettings(max_area=0.9, shard_size=10), progress=False).report.read_text(
        "utf-8"
    )


def tiles(page):
    return page.count("<img src=")


def test_counts_reasons_and_images(page):
    assert "51 of 52 phrases have a mask, in 52 of 53 samples." in page
    assert re.search(r"samples</td><td>image cannot be read.*>1</td>", page)
    assert re.search(r"phrases</td><td>its mask covers more than 0.9 of the image.*>1</td>", page)
    assert "36 phrases, drawn at random" in page and tiles(page) == 37
    assert "left out: its mask covers more than 0.9 of the image" in page
    # All scores are the same: none is the lowest.
    assert "lowest scores" not in page
    assert "so many words" not in page and "… words before it" in page


def test_needs_no_network_and_shows_text_as_text(page):
    assert "<script>" not in page and "http" not in re.sub(r"base64,[^\"]+", "", page)
    assert "&amp; more" in page
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))) as tile:
        assert tile.size == (300, 225)


def test_a_tile_shows_the_mask_and_what_the_teacher_was_told():
    image = Image.new("RGB", (600, 300), (0, 200, 0))
    mask = np.zeros((300, 600), bool)
    mask[:, :300] = True
    tile = np.asarray(_painted(image, encode_mask(mask), {"box": [400, 100, 500, 200], "points": [[100, 100]]}))
    assert tile.shape == (150, 300, 3)
    assert tile[75, 100].tolist() == [0, 200, 0] and len(set(tile[20, 280].tolist())) == 1
    assert tile[75, 150].tolist() == list(_OUTLINE) and tile[50, 220].tolist() == list(_BOX)
    assert tile[50, 50].tolist() == list(_BOX)


@pytest.mark.parametrize("size", [(640, 480), (300, 4000)])
def test_things_at_the_border_are_framed(size):
    width, height = size
    for box in ([width - 2, 10, width, 20], [10, height - 1, 20, height], [width - 1, height - 1, width, height]):
        painted = _painted(Image.new("RGB", size, "grey"), None, {"box": box})
        assert (np.asarray(painted) == _BOX).all(-1).any()


def test_shares_are_short():
    assert [_percent(share) for share in (0.0004, 0.012, 0.05, 0.123, 1)] == ["0.04 %", "1.2 %", "5 %", "12 %", "100 %"]
