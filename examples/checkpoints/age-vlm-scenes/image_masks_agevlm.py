"""Which text row sees which picture, derived from the places of the image tokens alone.

Nothing of text length travels beside `input_ids`, so truncation, padding and packing cannot make the two disagree.
"""

from dataclasses import dataclass

import torch

from .cache_agevlm import NO_IMAGE


@dataclass
class PlacedImages:
    """The pictures of a batch, sorted by text row.

    Attributes:
        index: (batch, slots) the picture in each slot of a row, -1 where the row has fewer.
        positions: (batch, places) where in the text the row's image tokens stand, `NO_IMAGE` for padding.
        slots: (batch, places) the slot that an image token refers to, or `None` if place and slot are the same.
    """

    index: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor | None = None

    def unshared(self) -> "PlacedImages":
        """A copy of the picture for each image token: in a cache, where new text follows, place and slot are the same."""
        if self.slots is None:
            return self
        index = self.index.gather(1, self.slots)
        return PlacedImages(index.masked_fill(self.positions == NO_IMAGE, -1), self.positions)


# `torch.export` of the language model alone, as transformers' exporters do for generation, takes tensors out of it.
torch.export.register_dataclass(PlacedImages, serialized_type_name=f"{__name__}.PlacedImages")


def place_images(
    is_image: torch.Tensor, image_indices: torch.Tensor | None = None, offset: int | torch.Tensor = 0
) -> PlacedImages:
    """Sorts pictures, given in the order of their tokens, by text row.

    Args:
        is_image: (batch, length) whether a token stands for a picture; at least one does.
        image_indices: (image tokens,) the picture that each image token stands for, in row-major order, where several
            share one (packed questions about the same picture). Each has its own when left out.
        offset: tokens already in the cache before this text.
    """
    counts = is_image.sum(-1)
    places = int(counts.max())
    ordinal = torch.arange(places, device=is_image.device)
    present = ordinal < counts[:, None]
    # A stable sort brings the image tokens of each row to the front, in order.
    positions = torch.sort(~is_image, dim=-1, stable=True).indices[:, :places]
    positions = torch.where(present, positions + offset, NO_IMAGE)
    first = counts.cumsum(0) - counts
    token = first[:, None] + ordinal
    if image_indices is None:
        return PlacedImages(index=torch.where(present, token, -1), positions=positions)

    image = image_indices[token.clamp(max=len(image_indices) - 1)]
    # Slots are the distinct pictures of a row; duplicates are moved behind them.
    image = torch.where(present, image, NO_IMAGE)
    ordered = image.sort(-1).values
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_new &= ordered != NO_IMAGE
    width = int(is_new.sum(-1).max())
    distinct = torch.where(is_new, ordered, NO_IMAGE).sort(-1).values[:, :width]
    slots = (image[:, :, None] == distinct[:, None, :]).int().argmax(-1)
    return PlacedImages(index=torch.where(distinct == NO_IMAGE, -1, distinct), positions=positions, slots=slots)


def packed_starts(position_ids: torch.Tensor, batch: int) -> torch.Tensor:
    """(batch, length): where in its row the packed sequence of each token starts, seen from positions that restart."""
    position_ids = position_ids.expand(batch, -1)
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = torch.where(position_ids.diff(dim=-1) != 1, torch.arange(1, position_ids.shape[1]).to(starts), 0)
    return starts.cummax(-1).values


def visible_places(
    positions: torch.Tensor, queries: torch.Tensor, visibility: str, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Which image tokens (or cached keys of their pictures) each text token sees.

    Args:
        positions: (batch, places) where they stand, `NO_IMAGE` for padding.
        queries: (length,) places of the text tokens.
        visibility: `"latest"` or `"all_previous"`.
        starts: (batch, length) first place of each token's packed sequence, if any are packed.

    Returns:
        (batch, length, places) bool.
    """
    visible = positions[:, None, :] <= queries[None, :, None]
    if starts is not None:
        visible = visible & (positions[:, None, :] >= starts[:, :, None])
    if visibility == "latest":
        latest = torch.where(visible, positions[:, None, :], -1).amax(-1, keepdim=True)
        visible = visible & (positions[:, None, :] == latest)
    return visible


def places_to_slots(visible: torch.Tensor, slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """(batch, length, places) -> (batch, length, num_slots): how many of the image tokens seen refer to each picture."""
    refers = slots[:, :, None] == torch.arange(num_slots, device=slots.device)
    return (visible[:, :, :, None] & refers[:, None]).sum(2)


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
