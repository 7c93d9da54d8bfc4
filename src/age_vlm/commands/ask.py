"""A question about a picture: the answer, and where the model looked for each of its content words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from ..analysis.overlay import overlay_sheet
from ..data.chat import ChatEncoder
from ..data.collator import token_grid_size
from ..data.schema import assistant_message, user_message
from ..errors import UserError, checkpoint_errors
from ..evaluation.answers import generate_texts
from ..evaluation.attention import chosen_heads, picture_attention
from ..hub import load_checkpoint
from ..modeling_agevlm import AgeVlmForConditionalGeneration
from ..processing import AgeVlmProcessor
from ..processing.images_agevlm import load_rgb
from ..training.alignment import AlignmentConfig


# Words that name nothing in a picture.
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
        words: content words of question and answer in reading order, each with the attention (rows, columns) of the
            model when it read the word; it sums to 1.
        picture: the part of the picture that the model sees.
    """

    text: str
    words: list[tuple[str, Tensor]]
    picture: PIL.Image.Image

    def sheet(self, question: str | None = None) -> PIL.Image.Image:
        """The picture with the attention of each content word painted on it, under the question and the answer if given."""
        return overlay_sheet(self.picture, self.words, title=question, answer=question and self.text)


@torch.inference_mode()
def ask(
    model: AgeVlmForConditionalGeneration, processor: AgeVlmProcessor, image, question: str, *, max_new_tokens: int = 64
) -> Answer:
    """Asks one question about one picture.

    The attention shown is that of the blocks and heads that were aligned in training, of the first half of the heads of
    the first block where the model does not say.

    Args:
        image: whatever the processor takes: path, URL, PIL image, array, tensor.

    Raises:
        UserError: one sentence, for an empty question or a picture that cannot be read.
    """
    if not question.strip():
        raise UserError("question: got an empty text, expected a question.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: got {max_new_tokens}, expected at least 1.")
    with checkpoint_errors():
        picture = load_rgb(image)
    if not isinstance(picture, PIL.Image.Image):
        picture = PIL.Image.fromarray(picture.permute(1, 2, 0).to(torch.uint8).numpy())
    prompt = [user_message(question, images=1)]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(model.device)
    answer = generate_texts(model, processor, inputs, max_new_tokens)[0]

    chat = ChatEncoder(processor)([*prompt, assistant_message(answer)])
    named = []
    for message, said in enumerate((question, answer)):
        for match in re.finditer(r"[^\W_]+", said):
            tokens = chat.phrase_tokens(message, *match.span())
            if match[0].lower() not in FUNCTION_WORDS and tokens:
                named.append((match[0], tokens[-1]))
    left, top, right, bottom = processor.image_geometry(picture.height, picture.width).source_box
    seen = picture.crop((max(0, round(left)), max(0, round(top)), round(right), round(bottom)))
    if not named:
        return Answer(answer, [], seen)
    rows, columns = token_grid_size(model, processor)
    maps = model(
        input_ids=torch.tensor([chat.input_ids], device=model.device),
        pixel_values=inputs["pixel_values"],
        cross_attention_rows=torch.tensor([[0, position] for _, position in named], device=model.device),
        logits_to_keep=1,
    ).cross_attention_maps
    aligned = AlignmentConfig(**(model.config.alignment or {}))
    slots = torch.zeros(len(named), dtype=torch.long, device=model.device)
    attention = picture_attention(maps, slots, rows * columns, aligned.layers)
    attention = (
        attention[:, :, chosen_heads(aligned.heads, attention.shape[2])].mean((1, 2)).unflatten(-1, (rows, columns))
    )
    return Answer(answer, [(word, attention[i].cpu()) for i, (word, _) in enumerate(named)], seen)


def load(folder: str | Path | None) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Model and processor from a folder or a Hub id; the checkpoint that comes with the repository for `None`.

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
    model, processor = load_checkpoint(folder)
    return model.eval(), processor


def bundled_checkpoint() -> Path:
    return Path(__file__).parents[3] / "examples" / "checkpoints" / "age-vlm-scenes"
