"""Attention painted on the image it looks at."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError, nearest


_MARGIN = 12
_FONT_SIZE = 15
_INK, _PAPER, _FAINT = (28, 32, 38), (255, 255, 255), (110, 118, 128)


def overlay(image: Image.Image, attention: Tensor, *, alpha: float = 0.65, colormap: str = "inferno") -> Image.Image:
    """Paint a heat map on an image.

    The map is stretched over the whole image (bilinear) and scaled so that its peak has the colormap's last colour.
    Where the attention is low the image shows through, darkened; where it is high the colour covers it by `alpha`.

    Args:
        image: the image, any mode.
        attention: (h, w) non-negative weights on the token grid; h and w need not have the image's proportions.
        alpha: opacity of the peak, 0 (the image alone) to 1.
        colormap: name of a matplotlib colormap.

    Returns:
        RGB image of the size of `image`.

    Raises UserError for a map that is not (h, w), finite and non-negative, an alpha outside [0, 1] or an unknown
    colormap.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: got {alpha}, expected a number in [0, 1].")
    if colormap not in matplotlib.colormaps:
        raise UserError(
            f"colormap: got {colormap!r}, expected the name of a colormap of matplotlib{nearest(colormap, matplotlib.colormaps)}."
        )
    heat = _stretched(attention, image.size)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    colour = matplotlib.colormaps[colormap](heat)[..., :3].astype(np.float32) * 255
    # Half of the opacity everywhere dims what is not looked at, so that the peak stands out on a bright image as
    # well.
    opacity = alpha * (0.5 + 0.5 * heat[..., None])
    return Image.fromarray((pixels * (1 - opacity) + colour * opacity).round().clip(0, 255).astype(np.uint8))


def _stretched(attention: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(height, width) float32 in [0, 1], of an image of `size` (width, height); 0 is no attention, 1 the peak."""
    attention = torch.as_tensor(attention).detach().float().cpu()
    if attention.ndim != 2 or attention.numel() == 0:
        raise UserError(f"attention: got {tuple(attention.shape)}, expected (h, w).")
    if not (torch.isfinite(attention).all() and (attention >= 0).all()):
        raise UserError("attention: got values that are negative or not finite, expected non-negative numbers.")
    heat = F.interpolate(attention[None, None], size=size[::-1], mode="bilinear", align_corners=False)[0, 0]
    return (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)).numpy()


def overlay_sheet(
    image: Image.Image,
    maps: Sequence[tuple[str, Tensor]],
    title: str | None = None,
    answer: str | None = None,
    *,
    columns: int = 4,
    tile: int = 224,
    alpha: float = 0.65,
) -> Image.Image:
    """A sheet: the image, then the image with the attention of each word painted on it, labelled.

    Args:
        image: the image; small ones are enlarged so that their longer side fills a tile.
        maps: (word, (h, w) attention) pairs, in reading order.
        title: a line above the tiles, usually the question.
        answer: a second line, in a fainter colour.
        columns: most tiles in a row.
        tile: longer side of a tile in pixels.

    Raises UserError for columns or a tile below 1, and what `overlay` refuses.
    """
    if columns < 1 or tile < 1:
        raise UserError(f"columns and tile: got {columns} and {tile}, expected at least 1.")
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # A drawn 64-pixel scene keeps its pixels when enlarged; a photograph is smoothed down.
    base = image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
    tiles = [("image", base)] + [(word, overlay(base, attention, alpha=alpha)) for word, attention in maps]

    regular, bold = _font(), _font(bold=True)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    # Tall images make narrow tiles: the cell stays wide enough for its label.
    cell_width = max(size[0], tile // 2)
    width = columns * cell_width + (columns + 1) * _MARGIN
    lines = [(part, bold, _INK) for part in _wrapped(title, bold, width - 2 * _MARGIN)]
    lines += [(part, regular, _FAINT) for part in _wrapped(answer, regular, width - 2 * _MARGIN)]
    line_height, label_height = round(_FONT_SIZE * 1.5), round(_FONT_SIZE * 1.6)
    top = _MARGIN + len(lines) * line_height
    height = top + rows * (size[1] + label_height) + (rows - 1) * _MARGIN + _MARGIN // 2

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (text, font, colour) in enumerate(lines):
        draw.text((_MARGIN, _MARGIN // 2 + number * line_height), text, font=font, fill=colour)
    for number, (word, painted) in enumerate(tiles):
        row, column = divmod(number, columns)
        x = _MARGIN + column * (cell_width + _MARGIN)
        y = top + row * (size[1] + label_height + _MARGIN)
        sheet.paste(painted, (x, y))
        font, colour = (regular, _FAINT) if number == 0 else (bold, _INK)
        draw.text((x, y + size[1] + 3), _shortened(word, font, cell_width), font=font, fill=colour)
    return sheet


def _font(bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu Sans, so the sheet looks the same on a machine without fonts.
    properties = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "regular")
    return ImageFont.truetype(font_manager.findfont(properties), _FONT_SIZE)


def _wrapped(text: str | None, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in (text or "").split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(_shortened(word, font, width))
    return lines


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
