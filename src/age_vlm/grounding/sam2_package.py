"""SAM 2 (Ravi et al. 2024, arXiv 2408.00714) as the package `sam2` has it: boxes and points become masks."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES, build_sam2
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from ..errors import UserError
from .teacher import Prompt, VisualTeacher, is_ambiguous, weights_digest


class Sam2PackageTeacher(VisualTeacher):
    """
    Args:
        model: on its device, in float32.
        dtype: what it computes in; the weights stay as they are, as the package's own examples have it.
    """

    name = "sam2"

    def __init__(self, model: SAM2Base, dtype: torch.dtype = torch.float32) -> None:
        self.predictor, self.dtype = _Predictor(model.eval()), dtype

    @classmethod
    def load(cls, model: str, dtype: str, device: torch.device) -> Sam2PackageTeacher:
        config, weights = _files(model)
        return cls(build_sam2(config, str(weights), device=str(device)), getattr(torch, dtype))

    def identity(self) -> dict[str, str | int]:
        return {
            "teacher": self.name,
            "weights": weights_digest(self.predictor.model),
            "dtype": str(self.dtype).removeprefix("torch."),
            "resolution": self.predictor.model.image_size,
        }

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.predictor.device.type, self.dtype)

    def _encode(self, images: list[Image.Image]) -> None:
        with self._precision():
            self.predictor.set_image_batch([np.array(image) for image in images])

    def _decode(
        self, features: None, number: int, image: Image.Image, prompts: list[Prompt]
    ) -> tuple[np.ndarray, np.ndarray]:
        boxes = points = labels = None
        if prompts[0].box is not None:
            boxes = np.array([prompt.box for prompt in prompts], np.float32)
        if prompts[0].points:
            points = np.array([prompt.points for prompt in prompts], np.float32)
            labels = np.array([prompt.labels for prompt in prompts], np.int32)
        with self._precision():
            masks, scores = self.predictor.predict_one(number, points, labels, boxes, is_ambiguous(prompts[0]))
        rows, best = torch.arange(len(prompts)), scores.argmax(-1)
        return masks[rows, best].numpy(), scores[rows, best].numpy()


class _Predictor(SAM2ImagePredictor):
    def predict_one(self, number: int, points, labels, boxes, several: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (prompts, proposals, height, width) and scores (prompts, proposals) of one image of the batch.

        `predict_batch` wants equally many prompts of every image.
        """
        _, points, labels, boxes = self._prep_prompts(points, labels, boxes, None, True, img_idx=number)
        masks, scores, _ = self._predict(points, labels, boxes, multimask_output=several, img_idx=number)
        return masks.cpu(), scores.float().cpu()


def _files(model: str) -> tuple[str, Path]:
    """Name of the package's configuration, and file of the weights, of a Hub id, a folder, or the weights themselves."""
    known = {weights: config for config, weights in HF_MODEL_ID_TO_FILENAMES.values()}
    path = Path(model)
    if path.exists():
        found = [path] if path.is_file() else sorted(path.glob("*.pt"))
        for file in found:
            if file.name in known:
                return known[file.name], file
        raise UserError(f"it holds none of the files {', '.join(sorted(known))}")
    if model not in HF_MODEL_ID_TO_FILENAMES:
        raise UserError(f"the package knows only {', '.join(HF_MODEL_ID_TO_FILENAMES)}")
    config, weights = HF_MODEL_ID_TO_FILENAMES[model]
    return config, Path(hf_hub_download(model, weights))
