"""Which part of the cross-attention is meant: images, blocks, heads; and what a model looked at while it answered."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from .alignment_agevlm import AlignmentConfig
from .outputs_agevlm import AgeVlmGenerateBeamOutput, AgeVlmGenerateOutput


def attention_on_images(maps: Sequence[Tensor], images: Tensor, tokens: int, layers: Sequence[int]) -> Tensor:
    """Attention of each query on one image of its row.

    Args:
        maps: one (queries, heads, images x tokens) a cross-attention block.
        images: (queries,) which of the distinct images of its row, in the order of the batch.
        tokens: image tokens of one image.
        layers: blocks, counted from 0.

    Returns:
        (queries, layers, heads, tokens).

    Raises:
        ValueError: for a number of tokens that is not the model's.
    """
    if maps[0].shape[-1] % tokens:
        raise ValueError(
            f"attention maps: got {tokens} image tokens an image, expected a divisor of the model's {maps[0].shape[-1]}."
        )
    stacked = torch.stack([maps[layer] for layer in layers], dim=1).unflatten(-1, (-1, tokens))
    return stacked[torch.arange(len(images), device=images.device), :, :, images]


def mean_attention(
    maps: Sequence[Tensor], grid: tuple[int, int], layers: Sequence[int], heads: Sequence[int]
) -> Tensor:
    """(queries, rows, columns): the mean over blocks and heads, on the image that a query sees, on the last one where it
    sees several; zeros where it sees none.

    Args:
        maps: one (queries, heads, images x tokens) a cross-attention block.
        grid: rows and columns of image tokens.
    """
    mean = torch.stack([maps[layer][:, heads] for layer in layers]).mean((0, 2)).unflatten(-1, (-1, *grid))
    # A softmax leaves nothing of what is visible at zero.
    seen = mean.flatten(2).sum(-1) > 0
    last = (seen * torch.arange(1, mean.shape[1] + 1, device=mean.device)).argmax(-1)
    return mean[torch.arange(len(mean), device=mean.device), last]


class AttentionRecorder:
    """Collects cross-attention while a model generates, one step after the other.

    Args:
        grid: rows and columns of image tokens, where maps are wanted.
        alignment: whose layers and heads make a map.
    """

    def __init__(self, grid: tuple[int, int] | None, alignment: AlignmentConfig):
        self.grid, self.alignment = grid, alignment
        self.maps: list[Tensor | None] = []
        self.cross_attentions: list[tuple[Tensor, ...] | None] = []

    def add(self, outputs) -> None:
        """Takes what one step returned."""
        self.cross_attentions.append(outputs.cross_attentions)
        maps = outputs.cross_attention_maps
        if maps is not None and self.grid is not None:
            layers, heads = self.alignment.layer_indices(len(maps)), self.alignment.head_indices(maps[0].shape[1])
            maps = mean_attention(maps, self.grid, layers, heads)
        self.maps.append(maps)

    def completed(self, output: GenerateDecoderOnlyOutput, prompt: int) -> GenerateDecoderOnlyOutput:
        """`output` with what was recorded.

        Args:
            prompt: tokens of `output.sequences` that were not generated.
        """
        steps = output.sequences.shape[1] - prompt
        attentions = tuple(self.cross_attentions[:steps])
        beams = isinstance(output, GenerateBeamDecoderOnlyOutput)
        return (AgeVlmGenerateBeamOutput if beams else AgeVlmGenerateOutput)(
            **output,
            cross_attentions=attentions if attentions and attentions[0] is not None else None,
            attention_maps=self._maps(output.beam_indices if beams else None, steps),
        )

    def _maps(self, beams: Tensor | None, steps: int) -> Tensor | None:
        # Some decoding goes one step further than the tokens that it keeps.
        maps = self.maps[:steps]
        if not maps or maps[0] is None or self.grid is None:
            return None
        stacked = torch.stack(maps, dim=1)
        if beams is None:
            return stacked
        beams = beams[:, :steps]
        chosen = stacked[beams.clamp(min=0), torch.arange(beams.shape[1], device=beams.device)]
        return chosen * (beams >= 0)[..., None, None]


def check_queries(queries: torch.Tensor | None, batch: int, length: int) -> None:
    """Raises ValueError, one sentence, for queries that are not (maps, 2) batch index and position in a text of that size."""
    if queries is None or torch.compiler.is_compiling():
        return
    if queries.ndim != 2 or queries.shape[1] != 2:
        raise ValueError(
            f"cross_attention_queries: got shape {tuple(queries.shape)}, expected (maps, 2): batch index and position."
        )
    wrong = queries[(queries < 0).any(-1) | (queries[:, 0] >= batch) | (queries[:, 1] >= length)]
    if len(wrong):
        raise ValueError(
            f"cross_attention_queries: got {wrong[0].tolist()}, expected a position of the {batch} x {length} text."
        )
