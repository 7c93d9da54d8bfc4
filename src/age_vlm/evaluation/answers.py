"""Questions to answers, for any image-text-to-text model of transformers, ours or a peer's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product

import torch

from ..data.questions import EvaluationItem, Question
from ..errors import UserError, checkpoint_errors
from ..processing.chat_agevlm import assistant_turn, stop_at_end_of_turn
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
    asked, first = _asked_once(items)
    with _evaluating(model):
        for questions, inputs in _batches(model, processor, asked, batch_size):
            texts = generate_texts(model, processor, inputs, max_new_tokens)
            answers.update({question.id: text for question, text in zip(questions, texts)})
    return {id: answers[asked_as] for id, asked_as in first.items()}


def generate_texts(model, processor, inputs: Mapping[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    """What the model says after each prompt, see `generate`."""
    generated = generate(model, processor, inputs, max_new_tokens)[:, inputs["input_ids"].shape[1] :]
    return [answer_text(processor, tokens) for tokens in generated]


def generate(
    model, processor, inputs: Mapping[str, torch.Tensor], max_new_tokens: int, *, attention_maps: bool = False
):
    """`model.generate`, greedily, to where the processor's chat template ends an answer.

    Args:
        attention_maps: return them too, of a model of ours: the output of `generate` instead of the tokens.
    """
    config = copy.deepcopy(model.generation_config)
    with suppress(ValueError):  # nothing but the model's own configuration ends its answers
        stop_at_end_of_turn(config, processor.tokenizer, _template(processor))
    config.do_sample, config.max_new_tokens = False, max_new_tokens
    settings = {"output_attention_maps": True} if attention_maps else {}
    config.return_dict_in_generate = attention_maps
    return model.generate(**inputs, generation_config=config, tokenizer=processor.tokenizer, **settings)


def answer_text(processor, tokens: Sequence[int] | torch.Tensor) -> str:
    """The text of an answer, without what ends it."""
    end = ""
    with suppress(ValueError):
        end = assistant_turn(processor.tokenizer, _template(processor)).end
    # Of ordinary text the end is no special token.
    return processor.decode(tokens, skip_special_tokens=True).strip().removesuffix(end.strip()).strip()


def _template(processor) -> str:
    return processor.chat_template or processor.tokenizer.chat_template


@torch.inference_mode()
def yes_scores(model, processor, items: Sequence[EvaluationItem], *, batch_size: int = 128) -> dict[str, float]:
    """Question id -> how much rather the answer begins with a yes than with a no: a difference of log-probabilities.

    Every way in which data spell the two words counts, see `answer_tokens`.

    Raises:
        UserError: where the tokenizer begins both words with the same tokens.
    """
    scores = {}
    asked, first = _asked_once(items)
    with _evaluating(model):
        tokens = None
        for questions, inputs in _batches(model, processor, asked, batch_size):
            if tokens is None:
                tokens = answer_tokens(processor.tokenizer, _prompt(processor, questions[0].text))
            logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
            yes, no = (logits[:, ids].logsumexp(-1) for ids in tokens)
            scores.update(zip((question.id for question in questions), (yes - no).tolist()))
    return {id: scores[asked_as] for id, asked_as in first.items()}


def _asked_once(items: Sequence[EvaluationItem]) -> tuple[list[EvaluationItem], dict[str, str]]:
    """Items without the questions that were asked about the same image object before, and for each question's id that of
    the one that is asked: POPE's modes ask about what is there three times, and a blank image is always the same."""
    asked, first, ids = [], {}, {}
    for item in items:
        questions = []
        for question in item.questions:
            key = id(item.image), question.text
            if key not in ids:
                ids[key] = question.id
                questions.append(question)
            first[question.id] = ids[key]
        if questions:
            asked.append(replace(item, questions=tuple(questions)))
    return asked, first


def answer_tokens(tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    """The tokens with which a yes begins after a prompt, and those with which a no does.

    Upper and lower case, with and without a blank before and a period or comma after. A token that may begin either, such
    as a blank, tells nothing and is left out.

    Raises:
        UserError: where none is left for one of the two.
    """
    firsts = []
    for word in ("yes", "no"):
        firsts.append(set())
        spellings = product(("", " "), (word, word.capitalize(), word.upper()), ("", ".", ","))
        # Inside a text, too: of the prompt's end and the word one token may be made, which a model cannot say any more.
        for context, spelling in product((prompt, "\n", ""), spellings):
            before, ids = (
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (context, context + "".join(spelling))
            )
            if ids[: len(before)] == before:
                firsts[-1].update(ids[len(before) :][:1])
    neither = {index for index in firsts[0] | firsts[1] if not tokenizer.decode([index]).strip()}
    neither |= {*(firsts[0] & firsts[1]), tokenizer.unk_token_id}
    yes, no = (sorted(ids - neither) for ids in firsts)
    if not yes or not no:
        raise UserError("tokenizer: begins 'yes' and 'no' with the same tokens, expected some that tell them apart.")
    return yes, no


def _batches(model, processor, items, batch_size) -> Iterator[tuple[list[Question], dict]]:
    """Batches of whole images with all their questions. Where the model lets several texts share an image, as ours
    does, an image is prepared and encoded once; a peer gets it again for each question."""
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
