"""Questions to answers, for any image-text-to-text model of transformers, ours or a peer's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..data.questions import EvaluationItem, Question


@torch.inference_mode()
def generate_answers(
    model, processor, items: Sequence[EvaluationItem], *, batch_size: int = 128, max_new_tokens: int = 8
) -> dict[str, str]:
    """Question id -> the model's own answer, greedily decoded.

    Args:
        model: an `AutoModelForImageTextToText`.
        processor: the processor that goes with it, with a chat template.
    """
    answers = {}
    with _evaluating(model):
        for questions, inputs in _batches(model, processor, items, batch_size):
            generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.update({question.id: text.strip() for question, text in zip(questions, texts)})
    return answers


@torch.inference_mode()
def yes_scores(model, processor, items: Sequence[EvaluationItem], *, batch_size: int = 128) -> dict[str, float]:
    """Question id -> logit of "yes" minus logit of "no" as the first word of the answer."""
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    scores = {}
    with _evaluating(model):
        for questions, inputs in _batches(model, processor, items, batch_size):
            logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
            scores.update(zip((question.id for question in questions), (logits[:, yes] - logits[:, no]).tolist()))
    return scores


def _batches(model, processor, items, batch_size) -> Iterator[tuple[list[Question], dict]]:
    """Batches of questions of similar length: little padding, and the pictures of a batch are prepared once each."""
    asked = [(item, question) for item in items for question in item.questions]
    asked.sort(key=lambda pair: len(pair[1].text))
    texts = {}
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        for _, question in part:
            if question.text not in texts:
                message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
                texts[question.text] = processor.apply_chat_template(
                    [message], add_generation_prompt=True, tokenize=False
                )
        inputs = processor(
            images=[item.image for item, _ in part],
            text=[texts[question.text] for _, question in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,
        )
        inputs.pop("token_type_ids", None)
        yield [question for _, question in part], inputs.to(model.device)


@contextmanager
def _evaluating(model):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
