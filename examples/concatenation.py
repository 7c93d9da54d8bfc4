"""The baseline of the ablations: image tokens concatenated with the text, in `LlavaForConditionalGeneration`.

The same vision encoder, projector, position encoding, language model, data and loss as AGE-VLM; only the fusion differs.
What the cross-attention blocks would hold goes into a wider feed-forward layer, so that the parameters agree.
"""

import copy

import torch
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from age_vlm import AgeVlmConfig
from age_vlm.data.chat import ChatEncoder
from age_vlm.data.schema import Sample
from age_vlm.modeling_agevlm.vision_agevlm import (
    AgeVlmMultiModalProjector,
    image_tokens,
    position_encoding_2d,
    vision_width,
)


class ConcatenationModel(LlavaModel):
    """`LlavaModel` that takes a feature map and gives it AGE-VLM's projector and 2-D positions."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        width = vision_width(self.vision_tower, config.vision_config)
        self.multi_modal_projector = AgeVlmMultiModalProjector(width, config.text_config.hidden_size)
        nn.init.normal_(self.multi_modal_projector.linear.weight, std=width**-0.5)

    def get_image_features(self, pixel_values, **kwargs):
        states = self.vision_tower(pixel_values, return_dict=True).last_hidden_state
        tokens, rows, columns = image_tokens(self.vision_tower, states, tuple(pixel_values.shape[-2:]))
        tokens = self.multi_modal_projector(tokens)
        tokens = tokens + position_encoding_2d(rows, columns, tokens.shape[-1], like=tokens)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=list(tokens))


class ConcatenationForConditionalGeneration(LlavaForConditionalGeneration):
    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model = ConcatenationModel(config)
        self.tie_weights()


def concatenation_model(config: AgeVlmConfig, intermediate_size: int) -> ConcatenationForConditionalGeneration:
    text = copy.deepcopy(config.text_config)
    text.intermediate_size = intermediate_size
    vision = copy.deepcopy(config.vision_config)
    vision.hidden_size = vision_width(AutoModel.from_config(vision), vision)
    return ConcatenationForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=config.image_token_id,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    )


def matched_intermediate_size(config: AgeVlmConfig, parameters: int) -> int:
    """The feed-forward width with which the concatenation model has nearest to `parameters` parameters."""
    text = config.text_config
    small = sum(p.numel() for p in concatenation_model(config, 8).parameters())
    return 8 + round((parameters - small) / (3 * text.hidden_size * text.num_hidden_layers))


def concatenation_processor(processor, grid: tuple[int, int]) -> LlavaProcessor:
    """LLaVA's processor, for images as AGE-VLM's `processor` prepares them and one text token for each image token."""
    patch_size = processor.image_geometry(64, 64).size[0] // grid[0]
    return LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        image_token=processor.image_token,
        chat_template=processor.chat_template,
    )


class ConcatenationCollator:
    """The questions of a sample as independent texts that share one copy of the image's tokens.

    Every text starts with the same words up to the image, so a row is that beginning once, then each text's rest: a 4-D
    mask lets every rest see the beginning and itself. The same metrics as a row for each text, at a fraction of the cost.
    """

    def __init__(self, processor, tokens: int):
        self.processor = processor
        self.tokens = tokens
        self.encode = ChatEncoder(processor)

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        rows = [self._row(sample) for sample in samples]
        length = max(len(ids) for ids, *_ in rows)
        ids = torch.full((len(rows), length), self.processor.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        positions = torch.zeros((len(rows), length), dtype=torch.long)
        segments = torch.full((len(rows), length), -1)
        for number, (row_ids, row_labels, row_positions, row_segments) in enumerate(rows):
            size = len(row_ids)
            ids[number, :size], labels[number, :size] = torch.tensor(row_ids), torch.tensor(row_labels)
            positions[number, :size], segments[number, :size] = torch.tensor(row_positions), torch.tensor(row_segments)
        seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
        pixels = self.processor.image_processor(
            images=[sample["images"][0].convert("RGB") for sample in samples], return_tensors="pt"
        )["pixel_values"]
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
            "pixel_values": pixels,
        }

    def _row(self, sample: Sample):
        image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        messages = sample["messages"]
        row_ids, row_labels, row_positions, row_segments = [], [], [], []
        for number in range(0, len(messages), 2):
            question, answer = messages[number], messages[number + 1]
            parts = [part for part in question["content"] if part["type"] == "text"]
            turn = {"role": "user", "content": [{"type": "image", "text": None}, *parts]}
            chat = self.encode([turn, answer])
            start = chat.input_ids.index(image)
            if not row_ids:
                row_ids += [*chat.input_ids[:start], *[image] * self.tokens]
                row_labels += [-100] * len(row_ids)
                row_positions += range(len(row_ids))
                row_segments += [0] * len(row_ids)
                shared = len(row_ids)
            rest = chat.input_ids[start + 1 :]
            row_ids += rest
            row_labels += chat.labels[start + 1 :]
            row_positions += range(shared, shared + len(rest))
            row_segments += [number // 2 + 1] * len(rest)
        return row_ids, row_labels, row_positions, row_segments
