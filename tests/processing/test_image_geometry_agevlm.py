"""One geometry for pixels, masks and points: checked against its definition, and against the pixels themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, Emu3ImageProcessor

from age_vlm.processing import image_geometry, whole_image_processor


def stretch(size):
    return whole_image_processor(size)


def crop(edge, size):
    return CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": size, "width": size})


PROCESSORS = {
    "stretch": stretch(32),
    "crop": crop(40, 32),
    "crop of the same size": crop(32, 32),
    "crop larger than the image": crop(24, 33),
    "neither": CLIPImageProcessor(do_resize=False, do_center_crop=False),
    "crop alone": CLIPImageProcessor(do_resize=False, crop_size={"height": 32, "width": 32}),
}
sides = st.integers(9, 70)


@st.composite
def masks(draw):
    height, width = draw(sides), draw(sides)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, top:bottom, left:right] = True
    return mask


@settings(deadline=None, max_examples=150)
@given(masks(), st.sampled_from(list(PROCESSORS)), st.integers(1, 9), st.integers(1, 9))
def test_a_mask_lands_on_exactly_the_cells_that_hold_its_pixels(mask, name, rows, columns):
    height, width = mask.shape[1:]
    geometry = image_geometry(PROCESSORS[name], height, width)
    coverage = geometry.mask_coverage(mask, rows, columns)[0]
    assert coverage.shape == (rows, columns) and coverage.min() >= 0 and coverage.max() <= 1 + 1e-5
    # Corners of every pixel of the mask, mapped as points, must agree with the cells.
    ys, xs = mask[0].nonzero().T
    corners = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).double().view(2, 2)
    (left, top), (right, bottom) = geometry.map_points(corners).tolist()
    cell_height, cell_width = geometry.size[0] / rows, geometry.size[1] / columns
    for row in range(rows):
        for column in range(columns):
            shared_height = min(bottom, (row + 1) * cell_height) - max(top, row * cell_height)
            shared_width = min(right, (column + 1) * cell_width) - max(left, column * cell_width)
            area = max(shared_height, 0) * max(shared_width, 0) / (cell_height * cell_width)
            assert coverage[row, column].item() == pytest.approx(area, abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(masks(), st.integers(1, 9), st.integers(1, 9))
def test_stretching_keeps_the_share_of_the_area(mask, rows, columns):
    geometry = image_geometry(PROCESSORS["stretch"], *mask.shape[1:])
    coverage = geometry.mask_coverage(mask, rows, columns)
    assert coverage.mean().item() == pytest.approx(mask.float().mean().item(), abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(masks(), st.sampled_from(list(PROCESSORS)))
def test_the_pixels_go_where_the_geometry_says(mask, name):
    """A white box on black, through the real processor: brightness of a cell is its coverage."""
    processor, (height, width) = PROCESSORS[name], mask.shape[1:]
    geometry = image_geometry(processor, height, width)
    image = Image.fromarray((mask[0].numpy() * 255).astype("uint8")).convert("RGB")
    # Bilinear and without normalisation: cubic weights overshoot, which is not what is tested.
    pixels = processor(image, resample=2, do_normalize=False, return_tensors="pt")["pixel_values"][0, 0]
    assert tuple(pixels.shape) == geometry.size
    coverage = geometry.mask_coverage(mask, *geometry.size)[0]
    # Interpolation blurs by about a source or an input pixel: compare sums over growing corners.
    blur_y = max(geometry.resized[0] / height, 1) + 1
    blur_x = max(geometry.resized[1] / width, 1) + 1
    got, expected = pixels.cumsum(0).cumsum(1), coverage.cumsum(0).cumsum(1)
    bound = blur_y * geometry.size[1] + blur_x * geometry.size[0]
    assert (got - expected).abs().max() <= 0.5 * bound
    if name in ("neither", "crop alone"):
        torch.testing.assert_close(pixels, coverage)


@settings(deadline=None, max_examples=40)
@given(sides, sides, st.sampled_from(list(PROCESSORS)))
def test_sizes_are_the_processor_s(height, width, name):
    pixels = PROCESSORS[name](Image.new("RGB", (width, height)), return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape[-2:]) == image_geometry(PROCESSORS[name], height, width).size


def test_a_box_shifts_with_the_crop_by_the_right_side():
    # 80 x 40, shortest edge 40, crop 32: 24 pixels go left and right, 4 above and below.
    geometry = image_geometry(crop(40, 32), 40, 80)
    assert geometry.offset == (4, 24)
    assert geometry.source_box == (24.0, 4.0, 56.0, 36.0)
    assert geometry.map_points(torch.tensor([[24.0, 4.0], [40.0, 20.0]])).tolist() == [[0.0, 0.0], [16.0, 16.0]]


def test_a_processor_that_knows_no_crop_does_not_crop():
    processor = Emu3ImageProcessor(do_resize=False, do_pad=False)
    assert not hasattr(processor, "do_center_crop")
    geometry = image_geometry(processor, 20, 30)
    assert (geometry.resized, geometry.offset, geometry.size) == ((20, 30), (0, 0), (20, 30))


def test_a_mask_of_another_size_is_one_sentence():
    geometry = image_geometry(stretch(32), 20, 30)
    with pytest.raises(ValueError, match=r"masks: got size \(30, 20\), expected that of the image, \(20, 30\)"):
        geometry.mask_coverage(torch.zeros(1, 30, 20), 4, 4)


@pytest.mark.parametrize("size", [{"shortest_edge": 20, "longest_edge": 40}, {"longest_edge": 40}])
def test_a_resize_that_masks_cannot_follow_is_one_sentence(size):
    with pytest.raises(ValueError, match=r"image_processor\.size"):
        image_geometry(CLIPImageProcessor(size=size), 20, 30)


def test_padding_is_refused():
    with pytest.raises(ValueError, match="do_pad"):
        image_geometry(CLIPImageProcessor(do_pad=True), 20, 30)


@settings(deadline=None)
@given(st.integers(3, 70), st.integers(3, 70), st.sampled_from(list(PROCESSORS)), st.integers(1, 5), st.integers(1, 5))
def test_a_map_lies_on_the_pixels_that_its_cells_are_of(height, width, name, rows, columns):
    geometry = image_geometry(PROCESSORS[name], height, width)
    maps = torch.rand(2, rows, columns)
    pixels = geometry.to_source(maps)
    assert pixels.shape == (2, height, width)
    left, top, right, bottom = geometry.source_box
    for y, x in {(0, 0), (height // 2, width // 3), (height - 1, width - 1)}:
        down, across = (y + 0.5 - top) / (bottom - top), (x + 0.5 - left) / (right - left)
        if not (0 < down < 1 and 0 < across < 1):
            assert (pixels[:, y, x] == 0).all()
            continue
        # By the definition of bilinear: between the centres of the four cells around it.
        u, v = min(max(down * rows - 0.5, 0), rows - 1), min(max(across * columns - 0.5, 0), columns - 1)
        i, j = min(int(u), max(rows - 2, 0)), min(int(v), max(columns - 2, 0))
        k, m = min(i + 1, rows - 1), min(j + 1, columns - 1)
        du, dv = u - i, v - j
        expected = (maps[:, i, j] * (1 - dv) + maps[:, i, m] * dv) * (1 - du)
        expected = expected + (maps[:, k, j] * (1 - dv) + maps[:, k, m] * dv) * du
        torch.testing.assert_close(pixels[:, y, x], expected, atol=1e-4, rtol=1e-4)
