import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.analysis.overlay import overlay, overlay_sheet


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(8, 60), st.integers(8, 60), st.data())
def test_heat_peaks_where_the_attention_does(h, w, height, width, data):
    row, column = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    attention = torch.zeros(h, w)
    attention[row, column] = 1.0
    image = Image.new("RGB", (width, height))
    painted = overlay(image, attention, alpha=1.0, colormap="gray")
    assert painted.size == image.size
    heat = np.asarray(painted)[..., 0].astype(int)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    # Between the centres of two cells the nearer one decides; one pixel of slack for cells that do not end at a pixel.
    assert abs((y + 0.5) * h / height - (row + 0.5)) <= 0.5 + h / height
    assert abs((x + 0.5) * w / width - (column + 0.5)) <= 0.5 + w / width


def test_alpha_zero_is_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(overlay(image, torch.rand(4, 4), alpha=0)), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode_and_no_attention_at_all(mode):
    assert overlay(Image.new(mode, (9, 5)), torch.zeros(2, 2)).size == (9, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_map_may_come_from_a_graph(dtype):
    assert overlay(Image.new("RGB", (8, 8)), torch.ones(2, 2, dtype=dtype, requires_grad=True)).mode == "RGB"


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        (torch.ones(4), {}, r"got \(4,\), expected \(h, w\)"),
        (torch.ones(0, 3), {}, r"got \(0, 3\)"),
        (-torch.ones(2, 2), {}, "non-negative"),
        (torch.full((2, 2), float("nan")), {}, "finite"),
        (torch.ones(2, 2), {"alpha": 1.5}, r"got 1.5, expected a number in \[0, 1\]"),
        (torch.ones(2, 2), {"colormap": "heat"}, "'heat'"),
    ],
)
def test_overlay_refuses(attention, options, message):
    with pytest.raises(ValueError, match=message):
        overlay(Image.new("RGB", (8, 8)), attention, **options)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 7), st.integers(1, 5), st.integers(1, 300), st.integers(1, 300))
def test_sheet_holds_a_readable_tile_for_every_word(words, columns, width, height):
    sheet = overlay_sheet(
        Image.new("RGB", (width, height), "green"),
        [(f"word{i}", torch.ones(2, 2)) for i in range(words)],
        "a question " * 20,
        "an answer",
        columns=columns,
    )
    scale = 224 / max(width, height)
    across, down = min(columns, words + 1), -(-(words + 1) // columns)
    assert sheet.width >= across * int(width * scale) and sheet.height >= down * int(height * scale)


def test_small_image_is_enlarged_and_words_differ():
    image = Image.new("RGB", (64, 64), "white")
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    one, other = (overlay_sheet(image, [("word", attention)]) for attention in (left, right))
    assert min(one.size) >= 224
    assert np.any(np.asarray(one) != np.asarray(other))
    assert np.any(np.asarray(one) != np.asarray(overlay_sheet(image, [("sky", left)])))


@pytest.mark.parametrize("options", [{"columns": 0}, {"tile": 0}])
def test_sheet_refuses(options):
    with pytest.raises(ValueError, match="at least 1"):
        overlay_sheet(Image.new("RGB", (8, 8)), [], **options)
