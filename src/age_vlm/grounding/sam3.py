"""SAM 3 (Carion et al. 2025, arXiv 2511.16719) as `transformers` has it: a phrase becomes masks, with no box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, Sam3Model, Sam3Processor

from ..errors import UserError
from ..hub import check_weights
from .teacher import Masks, Prompt, Teacher, weights_digest


# The model's own post-processing starts here. What scores less than this is noise, unless it is the best there is.
_LEAST_SCORE = 0.3
# Things of the right kind outside of the box that goes with a phrase are not what it names.
_LEAST_INSIDE = 0.5


class Sam3Teacher(Teacher):
    """Finds all things that a phrase names. Where there is a box too, only those with at least half of their pixels in it.

    The thing with the best score is always among the masks, however low the score: a run then says how far it was from
    being kept.

    Args:
        model: on its device and in its dtype.
        processor: the one that goes with it.
    """

    name = "sam3"
    most_at_once = 8

    def __init__(self, model: Sam3Model, processor: Sam3Processor) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(cls, model: str, dtype: str, device: torch.device) -> Sam3Teacher:
        # Looked at: where a file has other weights, or not all, random ones would take their place.
        kind = AutoConfig.from_pretrained(model).model_type
        if kind not in ("sam3", "sam3_video"):
            raise UserError(f"it holds a model of type '{kind}', expected 'sam3'")
        weights, report = Sam3Model.from_pretrained(model, dtype=getattr(torch, dtype), output_loading_info=True)
        check_weights(report)
        return cls(weights.to(device), Sam3Processor.from_pretrained(model))

    def identity(self) -> dict[str, str | int]:
        return {
            "teacher": self.name,
            "weights": weights_digest(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "resolution": self.processor.target_size,
        }

    def lacks(self, prompt: Prompt) -> str | None:
        return None if prompt.phrase.strip() else "it has no words"

    @torch.inference_mode()
    def _ground(self, images: list[Image.Image], prompts: list[Sequence[Prompt]]) -> list[list[Masks]]:
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        features = self.model.get_vision_features(pixels.to(self.model.device, self.model.dtype))
        pairs = [(number, prompt) for number, asked in enumerate(prompts) for prompt in asked]
        answers: list[list[Masks]] = [[] for _ in images]
        for start in range(0, len(pairs), self.most_at_once):
            chunk = pairs[start : start + self.most_at_once]
            for (number, prompt), output in zip(chunk, self._detect(features, chunk)):
                answers[number].append(self._found(output, images[number], prompt))
        return answers

    def _detect(self, features, pairs: list[tuple[int, Prompt]]) -> list:
        """Outputs of the detector, one a pair of an image's number and a prompt."""
        numbers = torch.tensor([number for number, _ in pairs], device=self.model.device)
        # The processor itself pads, but does not cut what is longer than the text encoder reads.
        text = self.processor.tokenizer(
            [" ".join(prompt.phrase.split()) for _, prompt in pairs],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        own = type(features)(
            fpn_hidden_states=tuple(level[numbers] for level in features.fpn_hidden_states),
            fpn_position_encoding=tuple(level[numbers] for level in features.fpn_position_encoding),
        )
        output = self.model(
            vision_embeds=own, input_ids=text["input_ids"], attention_mask=text["attention_mask"], return_dict=True
        )
        wanted = ("pred_logits", "pred_boxes", "pred_masks", "presence_logits")
        return [
            type(output)(**{name: output[name][row : row + 1].float() for name in wanted}) for row in range(len(pairs))
        ]

    def _found(self, output, image: Image.Image, prompt: Prompt) -> Masks:
        best = (output.pred_logits.sigmoid() * output.presence_logits.sigmoid()).max().item()
        (found,) = self.processor.post_process_instance_segmentation(
            output,
            # Only what is above the threshold is kept.
            threshold=min(_LEAST_SCORE, best * (1 - 1e-6)),
            target_sizes=[(image.height, image.width)],
        )
        # Without any found thing, they have the decoder's resolution.
        masks = found["masks"].reshape(-1, image.height, image.width).bool().cpu().numpy()
        scores = found["scores"].cpu().numpy()
        if prompt.box is not None and len(masks):
            x0, y0, x1, y1 = (round(value) for value in prompt.box)
            inside = masks[:, max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)].sum((1, 2))
            kept = inside >= _LEAST_INSIDE * np.maximum(masks.sum((1, 2)), 1)
            masks, scores = masks[kept], scores[kept]
        return Masks(masks, scores)
