"""Which query sees which image, derived from the positions of the image tokens alone.

Nothing of text length travels beside `input_ids`, so truncation, padding and packing cannot make the two disagree.
"""

from dataclasses import dataclass

import torch

from .cache_agevlm import NO_IMAGE


@dataclass
class ImagesByRow:
    """The images of a batch, sorted by the row of the text that they are in.

    Attributes:
        index: (batch, slots) the image in each slot of a row, -1 where the row has fewer.
        positions: (batch, image tokens) where in the text the row's image tokens stand, `NO_IMAGE` for padding.
        slots: (batch, image tokens) the slot that an image token refers to, where several may share one; else `None`: each
            has its own, in order.
    """

    index: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor | None = None


# `torch.export` of the language model alone, as transformers' exporters do for generation, takes tensors out of it.
torch.export.register_dataclass(ImagesByRow, serialized_type_name=f"{__name__}.ImagesByRow")


def group_images_by_row(
    is_image: torch.Tensor, image_indices: torch.Tensor | None = None, offset: int | torch.Tensor = 0
) -> ImagesByRow:
    """Sorts images, given in the order of their tokens, by row.

    Args:
        is_image: (batch, length) whether a token stands for an image; at least one does.
        image_indices: (image tokens,) the image that each image token stands for, in row-major order, where several
            share one (packed questions about the same image). Each has its own when left out.
        offset: tokens already in the cache before this text.
    """
    counts = is_image.sum(-1)
    most = int(counts.max())
    ordinal = torch.arange(most, device=is_image.device)
    present = ordinal < counts[:, None]
    # A stable sort brings the image tokens of each row to the front, in order.
    positions = torch.sort(~is_image, dim=-1, stable=True).indices[:, :most]
    positions = torch.where(present, positions + offset, NO_IMAGE)
    first = counts.cumsum(0) - counts
    token = first[:, None] + ordinal
    if image_indices is None:
        return ImagesByRow(index=torch.where(present, token, -1), positions=positions)

    image = image_indices[token.clamp(max=len(image_indices) - 1)]
    # Slots are the distinct images of a row; duplicates are moved behind them.
    image = torch.where(present, image, NO_IMAGE)
    ordered = image.sort(-1).values
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_new &= ordered != NO_IMAGE
    width = int(is_new.sum(-1).max())
    distinct = torch.where(is_new, ordered, NO_IMAGE).sort(-1).values[:, :width]
    slots = (image[:, :, None] == distinct[:, None, :]).int().argmax(-1)
    return ImagesByRow(index=torch.where(distinct == NO_IMAGE, -1, distinct), positions=positions, slots=slots)


def packed_starts(position_ids: torch.Tensor, batch: int) -> torch.Tensor:
    """(batch, length): where in its row the packed sequence of each token starts, seen from positions that restart."""
    position_ids = position_ids.expand(batch, -1)
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = torch.where(position_ids.diff(dim=-1) != 1, torch.arange(1, position_ids.shape[1]).to(starts), 0)
    return starts.cummax(-1).values


def visible_images(
    positions: torch.Tensor, queries: torch.Tensor, visibility: str, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Which image tokens (or cached keys of their images) each query sees.

    Args:
        positions: (batch, image tokens) where they stand, `NO_IMAGE` for padding.
        queries: (length,) positions of the queries.
        visibility: `"latest"` or `"all_previous"`.
        starts: (batch, length) first position of each query's packed sequence, if any are packed.

    Returns:
        (batch, length, image tokens) bool.
    """
    visible = positions[:, None, :] <= queries[None, :, None]
    if starts is not None:
        visible = visible & (positions[:, None, :] >= starts[:, :, None])
    if visibility == "latest":
        latest = torch.where(visible, positions[:, None, :], -1).amax(-1, keepdim=True)
        visible = visible & (positions[:, None, :] == latest)
    return visible


def visible_slots(visible: torch.Tensor, slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Which slots each query sees, from the image tokens that it sees and the slot of each.

    Args:
        visible: (batch, length, image tokens) bool.
        slots: (batch, image tokens).

    Returns:
        (batch, length, num_slots) bool.

    Raises:
        ValueError: where a query sees two image tokens of one image.
    """
    refers = slots[:, :, None] == torch.arange(num_slots, device=slots.device)
    times = (visible[:, :, :, None] & refers[:, None]).sum(2)
    if not torch.compiler.is_compiling() and (times > 1).any():
        raise ValueError(
            "image_indices: got one image for two image tokens of a text, expected copies of it: with "
            "image_visibility='all_previous' its tokens would count once."
        )
    return times > 0


def mask_for_backend(mask: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as it is for SDPA, and as what others add to scores of that type: to those, true would be a one."""
    if implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def check_image_count(tokens: int, images: int, image_indices: torch.Tensor | None) -> None:
    if image_indices is not None:
        if len(image_indices) != tokens:
            raise ValueError(
                f"image_indices: got {len(image_indices)}, expected one for each of {tokens} image tokens."
            )
        wrong = image_indices[(image_indices < 0) | (image_indices >= images)]
        if len(wrong):
            raise ValueError(f"image_indices: got {int(wrong[0])}, expected indices of the {images} images.")
    elif tokens != images:
        # The words at the end are those that the tests of transformers' models look for.
        raise ValueError(
            f"pixel_values: got {images} images for {tokens} image tokens in the text, expected as many: Image features and "
            "image tokens do not match."
        )
