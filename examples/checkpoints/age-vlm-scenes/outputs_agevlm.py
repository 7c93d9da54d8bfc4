"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import MultimodalBaseModelOutputWithPast, MultimodalCausalLMOutputWithPast


@dataclass
class AgeVlmModelOutputWithPast(MultimodalBaseModelOutputWithPast):
    """
    Attributes:
        image_outputs: of `get_image_features`; `pooler_output` are the image tokens, (images, tokens, text width).
        cross_attentions: one (batch, heads, length, image tokens) a block, for `output_attentions=True` under eager.
        cross_attention_maps: one (maps, heads, image tokens) a block, for `cross_attention_queries`, under every backend.
        Others: as for any model with images.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attention_maps: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AgeVlmCausalLMOutputWithPast(MultimodalCausalLMOutputWithPast):
    """As [`AgeVlmModelOutputWithPast`], with `loss` and `logits`."""

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attention_maps: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AgeVlmGenerateOutput(GenerateDecoderOnlyOutput):
    """
    Attributes:
        cross_attentions: one tuple a generated token, of one (sequences, heads, length, image tokens) a cross-attention
            block; for `output_attentions=True`, where the backend gives weights.
        attention_maps: (sequences, generated tokens, rows, columns) float32, for `output_attention_maps=True`: where the
            model looked when it predicted each token; `None` where no row has an image.
    """

    cross_attentions: tuple[tuple[torch.FloatTensor, ...], ...] | None = None
    attention_maps: torch.FloatTensor | None = None


@dataclass
class AgeVlmGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """As [`AgeVlmGenerateOutput`]; `attention_maps` follow the beams that were chosen, `cross_attentions` hold all."""

    cross_attentions: tuple[tuple[torch.FloatTensor, ...], ...] | None = None
    attention_maps: torch.FloatTensor | None = None
