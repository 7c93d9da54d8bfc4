"""Where the model looks when it reads a phrase, against the mask of what the phrase names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.collator import GROUNDING_KEYS, AgeVlmCollator
from ..data.questions import EvaluationItem, Question
from ..data.schema import Sample, user_message
from ..errors import UserError
from ..modeling_agevlm.attention_maps_agevlm import attention_on_images
from .answers import _evaluating
from .metrics import attention_mass, pointing_hit


@dataclass
class PhraseAttention:
    """Attention of grounded phrases (phrases, blocks, heads, tokens) and how much of each token their masks cover
    (phrases, tokens), with the questions they are of."""

    attention: Tensor
    coverage: Tensor
    questions: list[Question]

    def scores(self, layers: Sequence[int], heads: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(phrases,) attention mass in the mask and (phrases,) pointing hits of the mean over blocks and heads."""
        attention = self.attention[:, list(layers)][:, :, list(heads)].mean((1, 2))
        return attention_mass(attention, self.coverage), pointing_hit(attention, self.coverage).float()


def phrase_samples(items: Sequence[EvaluationItem]) -> tuple[list[Sample], list[Question]]:
    """The questions that name something visible, each as a sample whose phrase is grounded; once, where POPE's modes ask
    the same."""
    samples, questions, asked = [], [], set()
    for item in items:
        for question in item.questions:
            key = item.image_id, question.text
            if question.mask is None or question.phrase is None or key in asked:
                continue
            asked.add(key)
            start, end = question.phrase
            grounding = {"message": 0, "start": start, "end": end, "image": 0, "mask": question.mask}
            samples.append(
                {
                    "id": question.id,
                    "images": [item.image],
                    "messages": [user_message(question.text, images=1)],
                    "groundings": [grounding],
                }
            )
            questions.append(question)
    return samples, questions


@torch.inference_mode()
def phrase_attention(model, processor, items: Sequence[EvaluationItem], *, batch_size: int = 128) -> PhraseAttention:
    """The model's cross-attention at the last token of every phrase that names something visible."""
    collator = AgeVlmCollator.from_model(model, processor)
    samples, questions = phrase_samples(items)
    attention, coverage, kept = [], [], []
    with _evaluating(model):
        for start in range(0, len(samples), batch_size):
            batch = collator(samples[start : start + batch_size])
            batch.pop("labels")
            grounding = {key: batch.pop(key) for key in GROUNDING_KEYS if key in batch}
            if not grounding:
                continue
            rows = grounding["grounding_queries"].to(model.device)
            inputs = {key: value.to(model.device) for key, value in batch.items()}
            maps = model(**inputs, cross_attention_queries=rows, logits_to_keep=1).cross_attention_maps
            slots = grounding["grounding_slots"].to(model.device)
            tokens = grounding["grounding_coverage"].shape[-1]
            attention.append(attention_on_images(maps, slots, tokens, range(len(maps))).cpu())
            coverage.append(grounding["grounding_coverage"])
            kept += [questions[start + row] for row in grounding["grounding_queries"][:, 0].tolist()]
    if not attention:
        raise UserError("items: got no question whose phrase has a mask, expected at least one.")
    return PhraseAttention(torch.cat(attention), torch.cat(coverage), kept)
