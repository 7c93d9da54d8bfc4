"""Pretraining of a vision encoder that starts from random weights, as a classifier of single images.

A vision encoder from scratch does not learn from hard scenes within a small budget; a warm one does. No mask and no
position is shown to it: whatever points at objects later has learned that elsewhere.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from ..modeling_agevlm.vision_agevlm import image_tokens, vision_width
from .distributed import keep_to_one_gpu


class VisionClassifier(nn.Module):
    """A vision encoder with a linear classifier on every cell of its map; the image's score is a soft maximum of theirs,
    so that cells learn to name what they hold and the background need not (multiple-instance learning)."""

    def __init__(self, vision_tower: nn.Module, labels: int):
        super().__init__()
        self.vision_tower = vision_tower
        self.norm = nn.LayerNorm(vision_width(vision_tower, vision_tower.config))
        self.classifier = nn.Linear(self.norm.normalized_shape[0], labels)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """(images, channels, height, width), (images,) -> loss, logits (images, classes)"""
        states = self.vision_tower(pixel_values, return_dict=True).last_hidden_state
        tokens, _, _ = image_tokens(self.vision_tower, states, tuple(pixel_values.shape[-2:]))
        logits = self.classifier(self.norm(tokens)).logsumexp(1)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


def warm_start(
    vision_tower: nn.Module,
    image_processor,
    images: Dataset,
    labels: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    folder: str,
    progress: bool = True,
) -> float:
    """Trains `vision_tower` in place; returns the loss of the last tenth of the steps.

    Args:
        images: samples `{"image": PIL image, "label": int}`, all of one size, which need not be the model's own.
        labels: number of classes.
        folder: for the trainer's own use; nothing is kept there.
    """
    samples = [images[index] for index in range(min(len(images), steps * batch_size))]
    # Prepared once: the same images are seen in several epochs, and drawing them costs more than learning from them.
    prepared = image_processor(images=[sample["image"] for sample in samples], do_resize=False, return_tensors="pt")
    tensors = [
        {"pixel_values": pixels, "labels": torch.tensor(sample["label"])}
        for pixels, sample in zip(prepared["pixel_values"], samples)
    ]

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.05,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=seed,
        disable_tqdm=not progress,
    )
    # As in the run that it is part of: one process, one GPU.
    keep_to_one_gpu(arguments)
    trainer = Trainer(VisionClassifier(vision_tower, labels), arguments, train_dataset=tensors)
    for callback in (ProgressCallback, PrinterCallback) if not progress else ():
        trainer.remove_callback(callback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
