"""Where a pixel of a source image lands in the model's input: one geometry for pixels, masks and coordinates."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ImageGeometry:
    """What an image processor did to one image: resize, then a crop (or a pad, where the crop is larger).

    Attributes:
        source: (height, width) of the image, pixels.
        resized: (height, width) after resizing.
        offset: (top, left) of the input within the resized image, negative where it was padded.
        size: (height, width) of the model's input.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    def source_edges(self, axis: int, cells: int) -> torch.Tensor:
        """(cells + 1,) borders, in source pixels, of `cells` equal parts of the input's rows (axis 0) or columns (1)."""
        edges = torch.arange(cells + 1, dtype=torch.float64) * (self.size[axis] / cells)
        return (edges + self.offset[axis]) * (self.source[axis] / self.resized[axis])

    @property
    def source_box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom, in source pixels, of what the model sees."""
        (top, bottom), (left, right) = (self.source_edges(axis, 1).tolist() for axis in (0, 1))
        return left, top, right, bottom

    def map_points(self, points: torch.Tensor) -> torch.Tensor:
        """(..., 2) x, y in source pixels -> x, y in pixels of the model's input."""
        scale = points.new_tensor([self.resized[1] / self.source[1], self.resized[0] / self.source[0]])
        return points * scale - points.new_tensor([self.offset[1], self.offset[0]])

    def mask_coverage(self, masks: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """How much of each grid cell the mask covers, exactly: no small object is lost to sampling.

        Args:
            masks: (masks, height, width) at source resolution, bool or 0 to 1.

        Returns:
            (masks, rows, columns) float32, 0 to 1.

        Raises:
            ValueError: if the masks are not of the image's size.
        """
        if tuple(masks.shape[-2:]) != self.source:
            raise ValueError(f"masks: got size {tuple(masks.shape[-2:])}, expected that of the image, {self.source}.")
        vertical = _overlap(self.source_edges(0, rows), self.source[0])
        horizontal = _overlap(self.source_edges(1, columns), self.source[1])
        return vertical @ masks.float() @ horizontal.T

    def to_source(self, maps: torch.Tensor) -> torch.Tensor:
        """Values on a grid over the model's input, on the pixels of the source: bilinear, 0 where the model sees nothing.

        Args:
            maps: (maps, rows, columns).

        Returns:
            (maps, height, width) float32.
        """
        axes, inside = [], []
        for axis in (0, 1):
            start, end = self.source_edges(axis, 1)
            center = (torch.arange(self.source[axis], dtype=torch.float64) + 0.5 - start) / (end - start)
            axes.append((2 * center - 1).float().to(maps.device))
            inside.append(((center > 0) & (center < 1)).to(maps.device))
        points = torch.stack([axes[1].expand(*self.source), axes[0][:, None].expand(*self.source)], -1)
        values = torch.nn.functional.grid_sample(
            maps.float()[None], points[None], padding_mode="border", align_corners=False
        )[0]
        return values * (inside[0][:, None] & inside[1])


def _overlap(edges: torch.Tensor, pixels: int) -> torch.Tensor:
    """(cells, pixels): the part of each cell that lies in each pixel."""
    start, end = edges[:-1, None], edges[1:, None]
    pixel = torch.arange(pixels, dtype=edges.dtype)
    shared = torch.minimum(end, pixel + 1) - torch.maximum(start, pixel)
    return (shared.clamp(min=0) / (end - start)).float()


def image_geometry(image_processor, height: int, width: int) -> ImageGeometry:
    """The geometry that a transformers image processor applies to an image of `height` x `width` pixels.

    Raises:
        ValueError: for a processor that resizes in another way than to a size or a shortest edge, or pads.
    """
    resized = (height, width)
    if image_processor.do_resize:
        size = dict(image_processor.size)
        if size.get("height") and size.get("width"):
            resized = (size["height"], size["width"])
        elif size.get("shortest_edge") and not size.get("longest_edge"):
            short, edge = min(height, width), size["shortest_edge"]
            resized = tuple(edge if side == short else int(edge * side / short) for side in (height, width))
        else:
            raise ValueError(
                f"image_processor.size: got {size}, expected height and width, or shortest_edge: masks must follow the pixels."
            )
    if getattr(image_processor, "do_pad", False):
        raise ValueError("image_processor.do_pad: got True, expected False: masks must follow the pixels.")
    if not getattr(image_processor, "do_center_crop", False):
        return ImageGeometry((height, width), resized, (0, 0), resized)
    crop = (image_processor.crop_size["height"], image_processor.crop_size["width"])
    offset = tuple((side - part) // 2 if side >= part else -((part - side) // 2) for side, part in zip(resized, crop))
    return ImageGeometry((height, width), resized, offset, crop)
