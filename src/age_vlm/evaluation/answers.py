"""Questions to answers, for any image-text-to-text model of transformers, ours or a peer's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..data.questions import EvaluationItem, Question
from ..errors import checkpoint_errors
from ..processing.images_agevlm import load_rgb


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
    """Batches of whole pictures with all their questions. Where the model lets several texts share a picture, as ours
    does, a picture is prepared and encoded once; a peer gets it again for each question."""
    shares = "image_indices" in inspect.signature(model.forward).parameters
    for part in _chunks(items, batch_size):
        asked = [(number, question) for number, item in enumerate(part) for question in item.questions]
        texts = [_prompt(processor, question.text) for _, question in asked]
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
        if shares:
            inputs = processor.tokenizer(texts, **options)
            with checkpoint_errors():
                images = [load_rgb(item.image) for item in part]
            inputs |= processor.image_processor(images=images, return_tensors="pt")
            inputs["image_indices"] = torch.tensor([number for number, _ in asked])
        else:
            inputs = processor(images=[part[number].image for number, _ in asked], text=texts, **options)
        inputs = {key: value.to(model.device) for key, value in inputs.items() if key != "token_type_ids"}
        yield [question for _, question in asked], inputs


def _chunks(items, batch_size) -> Iterator[list[EvaluationItem]]:
    part: list[EvaluationItem] = []
    for item in items:
        if part and sum(len(other.questions) for other in [*part, item]) > batch_size:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def _prompt(processor, question: str) -> str:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


@contextmanager
def _evaluating(model):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
