"""A question about an image: the answer, and where the model looked for each of its content words."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from ..analysis.overlay import overlay_sheet
from ..data.chat import ChatEncoder
from ..data.schema import user_message
from ..errors import UserError, checkpoint_errors
from ..evaluation.answers import answer_text, generate
from ..hub import load_checkpoint
from ..modeling_agevlm import AgeVlmForConditionalGeneration
from ..processing import AgeVlmProcessor
from ..processing.images_agevlm import load_rgb


# Words that name nothing in an image.
FUNCTION_WORDS = frozenset(
    "a an and any are as at be been but by can could describe do does for from has have how i in is it its me of on or our "
    "please shall should tell that the their them there these they this those to was we were what when where which who why "
    "will with would yes no not you your picture image photo".split()
)


@dataclass
class Answer:
    """
    Attributes:
        text: what the model said.
        words: content words of question and answer in reading order, each with where the model looked, (rows, columns) of
            weights that sum to 1, see `ask`.
        image: the part of the image that the model sees.
    """

    text: str
    words: list[tuple[str, Tensor]]
    image: PIL.Image.Image

    def sheet(self, question: str | None = None) -> PIL.Image.Image:
        """The image with the attention of each content word painted on it, under the question and the answer if given."""
        return overlay_sheet(self.image, self.words, title=question, answer=question and self.text)


@torch.inference_mode()
def ask(
    model: AgeVlmForConditionalGeneration, processor: AgeVlmProcessor, image, question: str, *, max_new_tokens: int = 64
) -> Answer:
    """Asks one question about one image.

    The attention shown is that of the layers, heads and queries that were aligned in training: when the model had read the
    word, or for a word of the answer, where `alignment.answer_queries` is `predict`, when it predicted it. That is recorded
    while the model generates.

    Args:
        image: whatever the processor takes: path, URL, PIL image, array, tensor.

    Raises:
        UserError: one sentence, for an empty question or an image that cannot be read.
    """
    if not question.strip():
        raise UserError("question: got an empty text, expected a question.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: got {max_new_tokens}, expected at least 1.")
    with checkpoint_errors():
        image = load_rgb(image)
    if not isinstance(image, PIL.Image.Image):
        image = PIL.Image.fromarray(image.permute(1, 2, 0).to(torch.uint8).numpy())
    prompt = [user_message(question, images=1)]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(model.device)
    # One step more: it reads the last token.
    output = generate(model, processor, inputs, max_new_tokens + 1, attention_maps=True)
    generated = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()[:max_new_tokens]
    answer = answer_text(processor, generated)

    chat = ChatEncoder(processor)(prompt)
    read = [(word, tokens[-1]) for word, *span in content_words(question) if (tokens := chat.phrase_tokens(0, *span))]
    words = []
    if read:
        queries = torch.tensor([[0, position] for _, position in read], device=model.device)
        maps = model.attention_maps(queries, **inputs)
        words = [(word, attention.cpu()) for (word, _), attention in zip(read, maps)]
    starts = token_starts(processor.tokenizer, generated)
    # What the answer was stripped of stands in front of it.
    offset = processor.decode(generated, skip_special_tokens=True).index(answer)
    maps = output.attention_maps[0].cpu()
    for word, start, end in content_words(answer):
        # Of the query that predicts a token, or of the next one, which has read it.
        if model.alignment.answer_queries == "predict":
            query = max(0, bisect_right(starts, offset + start) - 1)
        else:
            query = bisect_left(starts, offset + end)
        if query < len(maps):
            words.append((word, maps[query]))
    left, top, right, bottom = processor.image_geometry(image.height, image.width).source_box
    seen = image.crop((max(0, round(left)), max(0, round(top)), round(right), round(bottom)))
    return Answer(answer, words, seen)


def content_words(text: str) -> list[tuple[str, int, int]]:
    """The words of a text that may name something in an image, each with its start and end."""
    found = ((match[0], *match.span()) for match in re.finditer(r"[^\W_]+", text))
    return [each for each in found if each[0].lower() not in FUNCTION_WORDS]


def token_starts(tokenizer, tokens: list[int]) -> list[int]:
    """Where in the text of all tokens, in characters, each of them begins."""
    return [len(tokenizer.decode(tokens[:number], skip_special_tokens=True)) for number in range(len(tokens))]


def load(
    folder: str | Path | None, parts: Mapping[str, str] | None = None
) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Model and processor from a folder or a Hub id; the checkpoint that comes with the repository for `None`.

    Args:
        parts: see `load_checkpoint`.

    Raises:
        UserError: one sentence, where there is none.
    """
    if folder is None:
        folder = bundled_checkpoint()
        if not folder.is_dir():
            raise UserError(
                "model: none was named and the example checkpoint is not here (it comes with the repository, not with the "
                "package), expected --model with a folder or Hub id; `age-vlm demo` trains one."
            )
    model, processor = load_checkpoint(folder, parts=parts)
    return model.eval(), processor


def bundled_checkpoint() -> Path:
    return Path(__file__).parents[3] / "examples" / "checkpoints" / "age-vlm-scenes"
