"""SAM 2 (Ravi et al. 2024, arXiv 2408.00714) as `transformers` has it: boxes and points become masks."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, Sam2Model, Sam2Processor

from ..errors import UserError
from ..hub import check_weights
from .teacher import Prompt, VisualTeacher, is_ambiguous, weights_digest


class Sam2Teacher(VisualTeacher):
    """
    Args:
        model: on its device and in its dtype.
        processor: the one that goes with it.
    """

    name = "sam2-transformers"

    def __init__(self, model: Sam2Model, processor: Sam2Processor) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(cls, model: str, dtype: str, device: torch.device) -> Sam2Teacher:
        # Looked at: where a file has other weights, or not all, random ones would take their place.
        kind = AutoConfig.from_pretrained(model).model_type
        if kind not in ("sam2", "sam2_video"):
            raise UserError(f"it holds a model of type '{kind}', expected 'sam2'")
        weights, report = Sam2Model.from_pretrained(model, dtype=getattr(torch, dtype), output_loading_info=True)
        check_weights(report)
        return cls(weights.to(device), Sam2Processor.from_pretrained(model))

    def identity(self) -> dict[str, str | int]:
        return {
            "teacher": self.name,
            "weights": weights_digest(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "resolution": self.processor.target_size,
        }

    def _encode(self, images: list[Image.Image]) -> list[torch.Tensor]:
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self.model.get_image_embeddings(pixels.to(self.model.device, self.model.dtype))

    def _decode(
        self, features: list[torch.Tensor], number: int, image: Image.Image, prompts: list[Prompt]
    ) -> tuple[np.ndarray, np.ndarray]:
        size = [image.height, image.width]
        told = {}
        if prompts[0].box is not None:
            told["input_boxes"] = [[[float(value) for value in prompt.box] for prompt in prompts]]
        if prompts[0].points:
            told["input_points"] = [
                [[[float(value) for value in point] for point in prompt.points] for prompt in prompts]
            ]
            told["input_labels"] = [[list(prompt.labels) for prompt in prompts]]
        inputs = self.processor(original_sizes=[size], return_tensors="pt", **told)
        output = self.model(
            image_embeddings=[level[number : number + 1] for level in features],
            multimask_output=is_ambiguous(prompts[0]),
            **{name: inputs[name].to(self.model.device) for name in told},
        )
        scores = output.iou_scores[0].float()
        best = scores.argmax(-1)
        rows = torch.arange(len(prompts), device=best.device)
        chosen = output.pred_masks[0][rows, best][:, None].float()
        masks = self.processor.post_process_masks([chosen], [size])[0]
        return masks[:, 0].cpu().numpy(), scores[rows, best].cpu().numpy()
